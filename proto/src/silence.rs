//! Decides when a silent process counts as lost. Pure: counts checks instead of reading a clock.
//!
//! A clock goes on while a laptop sleeps, or while a whole run is stopped and continued (Ctrl-Z, `kill -STOP`). The watching process was
//! stopped as well and missed no sign of life. So this counts how often it checked in vain.

use std::time::Duration;

/// Time between two checks, and between two heartbeats.
pub const TICK: Duration = Duration::from_secs(1);
/// Limit for a trainer in ticks. Its heartbeat has its own thread; the limit leaves time for a machine that swaps.
pub const TRAINER: u32 = 30;
/// Limit for the coordinator in ticks. It sends heartbeats between its writes, and a network file system may be slow.
pub const COORDINATOR: u32 = 60;
/// Smallest limit in ticks; a smaller one would produce false alarms.
const LEAST: u32 = 2;

/// Longest permitted silence in seconds: `usual`, shortened to `--stall-timeout` if that is smaller and not 0.
#[must_use]
pub fn limit(usual: u32, stall_timeout: Option<u64>) -> u32 {
    match stall_timeout {
        None | Some(0) => usual,
        Some(seconds) => u32::try_from(seconds).unwrap_or(usual).clamp(LEAST, usual),
    }
}

/// Number of checks since the last sign of life of another process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silence(u32);

impl Silence {
    /// Records a sign of life.
    pub fn broken(&mut self) {
        self.0 = 0;
    }

    /// Records a check in vain, a [`TICK`] after the last one. Returns whether the silence is longer than `limit` ticks.
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
