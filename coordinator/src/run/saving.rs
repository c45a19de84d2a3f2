//! Checkpoints by time, so that a crash costs no more than about `save_minutes`. Pure: the time is an argument. Only the coordinator's
//! clock decides, so that all ranks save after the same step.

use std::time::{Duration, Instant};

use dyad_proto::RunConfig;

/// The time since the last checkpoint was ordered.
#[derive(Debug)]
pub struct Saving {
    /// Longest time between checkpoints; `None` for no limit.
    every: Option<Duration>,
    since: Instant,
}

impl Saving {
    /// Starts to count at `now`, the start of the training.
    #[must_use]
    pub fn new(config: &RunConfig, now: Instant) -> Self {
        let every = Duration::try_from_secs_f64(config.save_minutes * 60.0).ok();
        Self { every: every.filter(|every| !every.is_zero()), since: now }
    }

    /// Whether the next step is to be saved because of the time.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.every.is_some_and(|every| now.saturating_duration_since(self.since) >= every)
    }

    /// Records that a step sent out now will be saved, for any reason.
    pub fn ordered(&mut self, now: Instant) {
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_due_save_minutes_after_the_last_order() {
        let start = Instant::now();
        let at = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let mut saving = Saving::new(&RunConfig::default(), start);
        assert!(!saving.is_due(at(29)) && saving.is_due(at(30)) && saving.is_due(at(31)));
        saving.ordered(at(31));
        assert!(!saving.is_due(at(60)) && saving.is_due(at(61)));
    }

    #[test]
    fn zero_save_minutes_disable_timed_checkpoints() {
        let config = RunConfig { save_minutes: 0.0, ..RunConfig::default() };
        let start = Instant::now();
        assert!(!Saving::new(&config, start).is_due(start + Duration::from_secs(1 << 30)));
    }
}
