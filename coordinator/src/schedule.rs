//! How long a run is, and after which steps it saves and evaluates. Pure.

use std::fmt;

use dyad_proto::RunConfig;

/// One thing that all ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Optimizer step, 1-based.
    Step(u64),
    /// Evaluation after that many steps.
    Evaluation(u64),
    /// Chunk of the pairs that the reference model scores before the first step, from 0.
    Reference(u64),
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(step) => write!(f, "step {step}"),
            Self::Evaluation(step) => write!(f, "the evaluation after step {step}"),
            Self::Reference(chunk) => write!(f, "chunk {chunk} of the reference scores"),
        }
    }
}

/// The steps of a run, known once it is known how many pairs are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Steps that one pass over the kept pairs takes.
    pub steps_per_epoch: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps that are followed by `checkpoint-N`, ascending; the last step writes `final` instead.
    pub checkpoints: Vec<u64>,
    /// Steps that are followed by an evaluation, ascending; step 0 is before the first step.
    pub evaluations: Vec<u64>,
}

impl Schedule {
    /// The schedule of a run over `kept` pairs (at least one).
    #[must_use]
    pub fn new(config: &RunConfig, kept: usize) -> Self {
        let steps_per_epoch = kept.div_ceil(config.batch_size as usize) as u64;
        let total_steps = config.max_steps.unwrap_or(u64::from(config.n_epochs) * steps_per_epoch);
        let checkpoints = evenly_spaced(total_steps, config.n_checkpoints);
        let mut evaluations = Vec::new();
        if config.validation_file.is_some() {
            evaluations = evenly_spaced(total_steps, config.n_evals);
            evaluations.insert(0, 0);
        }
        Self {
            steps_per_epoch,
            total_steps,
            checkpoints: checkpoints.into_iter().filter(|step| *step < total_steps).collect(),
            evaluations,
        }
    }

    /// Passes done after a step.
    #[must_use]
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.steps_per_epoch as f64
    }

    /// What comes first after `start_step` steps; an evaluation due right there is left out when it was `evaluated`.
    #[must_use]
    pub fn first(&self, start_step: u64, evaluated: bool) -> Option<Work> {
        if evaluated { self.after(Work::Evaluation(start_step)) } else { self.after(Work::Step(start_step)) }
    }

    /// What comes after a work; nothing when the run is done.
    #[must_use]
    pub fn after(&self, work: Work) -> Option<Work> {
        match work {
            Work::Step(step) if self.evaluations.binary_search(&step).is_ok() => Some(Work::Evaluation(step)),
            Work::Step(step) | Work::Evaluation(step) => {
                (step < self.total_steps).then_some(Work::Step(step + 1))
            }
            Work::Reference(_) => None,
        }
    }
}

/// `round(k * total / count)` for k = 1..=count: ascending, above 0, no step twice.
fn evenly_spaced(total: u64, count: u32) -> Vec<u64> {
    // More than one a step is one a step.
    let count = u64::from(count).min(total);
    let round =
        |k: u64| (2 * u128::from(k) * u128::from(total) + u128::from(count)) / (2 * u128::from(count));
    (1..=count).map(|k| round(k) as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(n_epochs: u32, batch_size: u32) -> RunConfig {
        RunConfig { n_epochs, batch_size, ..RunConfig::default() }
    }

    #[test]
    fn steps_follow_from_epochs_unless_max_steps_is_set() {
        let schedule = Schedule::new(&config(3, 4), 10);
        assert_eq!((schedule.steps_per_epoch, schedule.total_steps), (3, 9));
        let schedule = Schedule::new(&RunConfig { max_steps: Some(5), ..config(3, 4) }, 10);
        assert_eq!((schedule.steps_per_epoch, schedule.total_steps), (3, 5));
        assert_eq!(schedule.epoch(5), 5.0 / 3.0);
    }

    #[test]
    fn checkpoints_are_interior_and_evenly_spaced() {
        let of = |n, total| {
            let config = RunConfig { n_checkpoints: n, max_steps: Some(total), ..config(1, 1) };
            Schedule::new(&config, 4).checkpoints
        };
        assert_eq!(of(1, 10), [] as [u64; 0]);
        assert_eq!(of(4, 10), [3, 5, 8]);
        assert_eq!(of(20, 3), [1, 2]);
        assert_eq!(of(3, 1), [] as [u64; 0]);
    }

    #[test]
    fn evaluations_start_at_zero_and_end_at_the_last_step() {
        let validation_file = Some("v.jsonl".to_owned());
        let with = RunConfig { validation_file, n_evals: 3, max_steps: Some(10), ..config(1, 1) };
        assert_eq!(Schedule::new(&with, 4).evaluations, [0, 3, 7, 10]);
        assert_eq!(Schedule::new(&RunConfig { n_evals: 0, ..with.clone() }, 4).evaluations, [0]);
        assert_eq!(
            Schedule::new(&RunConfig { validation_file: None, ..with }, 4).evaluations,
            [] as [u64; 0]
        );
    }

    #[test]
    fn works_alternate_and_resume_repeats_nothing() {
        let validation_file = Some("v.jsonl".to_owned());
        let config = RunConfig { validation_file, n_evals: 2, max_steps: Some(4), ..config(1, 1) };
        let schedule = Schedule::new(&config, 4);
        use Work::{Evaluation, Step};
        let all = [Evaluation(0), Step(1), Step(2), Evaluation(2), Step(3), Step(4), Evaluation(4)];
        let works = |start_step, evaluated| -> Vec<Work> {
            std::iter::successors(schedule.first(start_step, evaluated), |work| schedule.after(*work))
                .collect()
        };
        assert_eq!(works(0, false), all);
        assert_eq!(works(2, false), all[3..]);
        assert_eq!(works(2, true), all[4..]);
        assert_eq!(works(1, false), all[2..]);
        assert_eq!(works(4, true), []);
    }
}
