//! When a process that says nothing counts as lost. Pure: time is counted in own ticks.
//!
//! A clock on the wall goes on while a laptop sleeps, or while a whole run is stopped and continued (Ctrl-Z, `kill -STOP`). Whoever
//! stood still as well has missed nothing, so what is counted is how often one has looked and heard nothing.

use std::time::Duration;

/// Between two looks, and between two signs of life.
pub const TICK: Duration = Duration::from_secs(1);
/// A trainer beats from a thread that does nothing else. A machine that swaps for a while is not lost yet.
pub const TRAINER: u32 = 30;
/// The coordinator beats between its writes, and a network file system may take a while.
pub const COORDINATOR: u32 = 60;
/// Less would be a guess.
const LEAST: u32 = 2;

/// How long a silence may be, in seconds, beside the usual one: `--stall-timeout` can only shorten it. 0 leaves it as it is.
#[must_use]
pub fn limit(usual: u32, stall_timeout: Option<u64>) -> u32 {
    match stall_timeout {
        None | Some(0) => usual,
        Some(seconds) => u32::try_from(seconds).unwrap_or(usual).clamp(LEAST, usual),
    }
}

/// Looks in vain since another process was last heard.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silence(u32);

impl Silence {
    /// A sign of life.
    pub fn broken(&mut self) {
        self.0 = 0;
    }

    /// One more look, a [`TICK`] after the last, without one. True when the silence is longer than `limit`.
    #[must_use]
    pub fn lasts(&mut self, limit: u32) -> bool {
        self.0 = self.0.saturating_add(1);
        self.0 > limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_ends_with_any_sign_of_life() {
        let mut silence = Silence::default();
        assert!(!silence.lasts(2) && !silence.lasts(2));
        silence.broken();
        assert!(!silence.lasts(2) && !silence.lasts(2) && silence.lasts(2));
    }

    #[test]
    fn the_flag_shortens_silences_and_never_lengthens_them() {
        assert_eq!(limit(60, None), 60);
        assert_eq!(limit(60, Some(0)), 60);
        assert_eq!(limit(60, Some(5)), 5);
        assert_eq!(limit(60, Some(1)), 2);
        assert_eq!(limit(60, Some(u64::MAX)), 60);
    }
}
