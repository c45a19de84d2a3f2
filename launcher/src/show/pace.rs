//! Estimates the time left from the time of the steps so far. Pure.
//!
//! LNC-P1: there are two estimates of the time per step. One is the time since steps began to be counted, divided by the steps seen; it
//! includes the work between steps. The other is the recorded time of recent steps, plus their share of evaluations. The larger one
//! counts: a late watcher sees a thousand steps at once, which makes the first too small, and a run may become slower.

use std::time::Duration;

/// The mean covers about this many recent steps.
const MEMORY: f64 = 50.0;

/// Recorded times of the run so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    steps: f64,
    /// Mean seconds per step: of all steps at first, then mainly of the last [`MEMORY`].
    seconds: f64,
    /// Seconds of all evaluations.
    evaluations: f64,
}

impl Pace {
    /// Adds a step; NaN is skipped.
    pub fn step(&mut self, seconds: f64) {
        if seconds.is_finite() {
            self.steps += 1.0;
            self.seconds += (seconds - self.seconds) / self.steps.min(MEMORY);
        }
    }

    /// Adds an evaluation; NaN is skipped. Evaluations recur, so their time is spread over all steps.
    pub fn evaluation(&mut self, seconds: f64) {
        if seconds.is_finite() {
            self.evaluations += seconds;
        }
    }

    /// Estimated time for `steps` more steps; `None` before the first step. `heard` is the time since steps began to be counted.
    #[must_use]
    pub fn left(&self, steps: u64, heard: Duration) -> Option<Duration> {
        let said = self.seconds + self.evaluations / self.steps;
        let each = said.max(heard.as_secs_f64() / self.steps);
        Some(each * steps as f64)
            .filter(|_| self.steps > 0.0)
            .and_then(|left| Duration::try_from_secs_f64(left).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_evaluations_tell_how_long_the_rest_takes() {
        let mut pace = Pace::default();
        let at_once = Duration::ZERO;
        assert_eq!(pace.left(3, at_once), None);
        pace.evaluation(4.0);
        assert_eq!(pace.left(3, at_once), None, "an evaluation before the first step tells nothing of steps");
        for _ in 0..4 {
            pace.step(2.0);
        }
        assert_eq!(pace.left(10, at_once), Some(Duration::from_secs(30)));
        assert_eq!(pace.left(0, at_once), Some(Duration::ZERO));
        pace.step(f64::NAN);
        assert_eq!(pace.left(10, at_once), Some(Duration::from_secs(30)));
    }

    /// The recorded time of a step excludes writing rows and checkpoints, and delays by other processes.
    #[test]
    fn time_between_steps_counts() {
        let mut pace = Pace::default();
        (0..4).for_each(|_| pace.step(0.5));
        assert_eq!(pace.left(10, Duration::from_secs(20)), Some(Duration::from_secs(50)));
    }

    #[test]
    fn a_run_that_slows_down_is_noticed() {
        let mut pace = Pace::default();
        (0..1000).for_each(|_| pace.step(1.0));
        (0..200).for_each(|_| pace.step(3.0));
        let left = pace.left(100, Duration::from_secs(1600)).unwrap().as_secs();
        assert!((290..=300).contains(&left), "{left}");
    }
}
