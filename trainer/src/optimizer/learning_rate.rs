//! Learning rate of a step, by transformers' rules with a floor.

use std::f64::consts::PI;

use dyad_proto::RunConfig;
use dyad_proto::run_config::LrSchedulerType;

/// Steps in which `inverse_sqrt` falls to `1 / sqrt(2)` of the peak rate without a warmup, as in transformers.
const USUAL_TIMESCALE: u64 = 10_000;

/// Schedule of the learning rate over a run.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    shape: LrSchedulerType,
    peak: f64,
    min_ratio: f64,
    cycles: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl LearningRate {
    /// The schedule of a run of `total_steps` optimizer steps.
    #[must_use]
    pub fn new(config: &RunConfig, total_steps: u64) -> Self {
        Self {
            shape: config.lr_scheduler_type,
            peak: config.learning_rate,
            min_ratio: config.min_lr_ratio,
            cycles: config.scheduler_num_cycles(),
            warmup_steps: (config.warmup_ratio * total_steps as f64).ceil() as u64,
            total_steps,
        }
    }

    /// Rate used by the `step`-th optimizer step, counted from 1. Warmup starts at 0, as in transformers.
    #[must_use]
    pub fn rate(&self, step: u64) -> f64 {
        let done = step.saturating_sub(1);
        if done < self.warmup_steps {
            return self.peak * done as f64 / self.warmup_steps as f64;
        }
        let progress =
            (done - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps).max(1) as f64;
        let shape = match self.shape {
            LrSchedulerType::Constant => return self.peak,
            LrSchedulerType::Linear => 1.0 - progress,
            LrSchedulerType::Cosine => 0.5 * (1.0 + (PI * self.cycles * 2.0 * progress).cos()),
            LrSchedulerType::CosineWithRestarts if progress >= 1.0 => 0.0,
            LrSchedulerType::CosineWithRestarts => {
                0.5 * (1.0 + (PI * (self.cycles * progress).fract()).cos())
            }
            LrSchedulerType::InverseSqrt => {
                let timescale = if self.warmup_steps > 0 { self.warmup_steps } else { USUAL_TIMESCALE };
                ((done - self.warmup_steps) as f64 / timescale as f64 + 1.0).sqrt().recip()
            }
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * shape.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: LrSchedulerType, warmup_ratio: f64, min_lr_ratio: f64) -> LearningRate {
        let config = RunConfig {
            lr_scheduler_type: shape,
            warmup_ratio,
            min_lr_ratio,
            learning_rate: 2.0,
            ..Default::default()
        };
        LearningRate::new(&config, 10)
    }

    #[test]
    fn linear_starts_full_and_falls_towards_the_floor() {
        let linear = schedule(LrSchedulerType::Linear, 0.0, 0.0);
        assert_eq!((linear.rate(1), linear.rate(6)), (2.0, 1.0));
        assert!((linear.rate(10) - 0.2).abs() < 1e-12);
        let floored = schedule(LrSchedulerType::Linear, 0.0, 0.5);
        assert_eq!((floored.rate(1), floored.rate(11)), (2.0, 1.0));
    }

    #[test]
    fn warmup_rises_from_zero() {
        let cosine = schedule(LrSchedulerType::Cosine, 0.2, 0.0);
        assert_eq!((cosine.rate(1), cosine.rate(2), cosine.rate(3)), (0.0, 1.0, 2.0));
        assert!((cosine.rate(7) - 1.0).abs() < 1e-12);
        assert_eq!(schedule(LrSchedulerType::Constant, 0.0, 0.0).rate(9), 2.0);
    }

    #[test]
    fn cycles_are_waves_of_a_cosine_or_restarts_of_half_a_wave() {
        let of = |shape, cycles| {
            let config = RunConfig {
                lr_scheduler_type: shape,
                scheduler_num_cycles: Some(cycles),
                learning_rate: 1.0,
                ..Default::default()
            };
            let schedule = LearningRate::new(&config, 8);
            (1..=9).map(|step| (schedule.rate(step) * 1000.0).round() / 1000.0).collect::<Vec<_>>()
        };
        assert_eq!(of(LrSchedulerType::Cosine, 1.0), [1.0, 0.854, 0.5, 0.146, 0.0, 0.146, 0.5, 0.854, 1.0]);
        assert_eq!(
            of(LrSchedulerType::CosineWithRestarts, 2.0),
            [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146, 0.0]
        );
    }
}
