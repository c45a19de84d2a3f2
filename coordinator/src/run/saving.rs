//! When a checkpoint is due that nobody asked for by its step: a crash should not cost more than `save_minutes`. Pure: the time is an
//! argument. One clock decides, the coordinator's, so that all ranks save after the same step.

use std::time::{Duration, Instant};

use dyad_proto::RunConfig;

/// Since when no checkpoint was ordered.
#[derive(Debug)]
pub struct Saving {
    /// At most so long.
    every: Option<Duration>,
    since: Instant,
}

impl Saving {
    /// Nothing is saved yet, and nothing done yet that could be lost.
    #[must_use]
    pub fn new(config: &RunConfig, now: Instant) -> Self {
        let every = Duration::try_from_secs_f64(config.save_minutes * 60.0).ok();
        Self { every: every.filter(|every| !every.is_zero()), since: now }
    }

    /// Whether the next step is to be saved for its time alone.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.every.is_some_and(|every| now.saturating_duration_since(self.since) >= every)
    }

    /// A step that goes out now is saved, for whatever reason.
    pub fn ordered(&mut self, now: Instant) {
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_due_when_none_was_ordered_for_so_long() {
        let start = Instant::now();
        let at = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let mut saving = Saving::new(&RunConfig::default(), start);
        assert!(!saving.is_due(at(29)) && saving.is_due(at(30)) && saving.is_due(at(31)));
        saving.ordered(at(31));
        assert!(!saving.is_due(at(60)) && saving.is_due(at(61)));
    }

    #[test]
    fn zero_minutes_are_never() {
        let config = RunConfig { save_minutes: 0.0, ..RunConfig::default() };
        let start = Instant::now();
        assert!(!Saving::new(&config, start).is_due(start + Duration::from_secs(1 << 30)));
    }
}
