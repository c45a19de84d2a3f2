//! How long the steps that are left will take, from how long those before them took. Pure.
//!
//! LNC-P1: two means are known: that of the time in which this process heard of steps, which has in it whatever goes on between them, and what
//! the rows say of the last steps and of evaluations. The greater one counts: a watcher that comes late hears of a thousand steps at once,
//! and a run may become slower.

use std::time::Duration;

/// As many steps, about, count.
const MEMORY: f64 = 50.0;

/// Of the run so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    steps: f64,
    /// Mean over the steps at first, over the last of them later on.
    seconds: f64,
    /// Of all evaluations.
    evaluations: f64,
}

impl Pace {
    /// A step is done, which took so long.
    pub fn step(&mut self, seconds: f64) {
        if seconds.is_finite() {
            self.steps += 1.0;
            self.seconds += (seconds - self.seconds) / self.steps.min(MEMORY);
        }
    }

    /// So is an evaluation. They come again after so many steps, so each step has its share of them.
    pub fn evaluation(&mut self, seconds: f64) {
        if seconds.is_finite() {
            self.evaluations += seconds;
        }
    }

    /// For so many more steps, after those so far were heard of in this time; none where no step is done yet.
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

    /// Rows, checkpoints, other processes on the machine: none of that is in the time of a step.
    #[test]
    fn what_goes_on_between_steps_counts() {
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
