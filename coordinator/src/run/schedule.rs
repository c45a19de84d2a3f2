//! The number of steps of a run, and the steps after which it saves and evaluates. Pure.

use std::fmt;

use dyad_proto::RunConfig;

/// A unit of work that all ranks do together.
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

/// The steps of a run, computed once the number of kept pairs is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Steps of one pass over the kept pairs.
    pub steps_per_epoch: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps that are followed by `checkpoint-N`.
    checkpoints: EvenlySpaced,
    /// Further checkpoints: after every multiple of this many steps.
    save_steps: Option<u64>,
    /// Steps that are followed by an evaluation. `None` without a validation file.
    evaluations: Option<EvenlySpaced>,
    /// Evaluations after every multiple of this many steps and after the last step, instead of evenly spaced ones.
    eval_steps: Option<u64>,
    /// Whether there is an evaluation before the first step too.
    eval_on_start: bool,
}

impl Schedule {
    /// The schedule of a run over `kept` pairs (at least one).
    #[must_use]
    pub fn new(config: &RunConfig, kept: usize) -> Self {
        let steps_per_epoch = kept.div_ceil(config.batch_size as usize) as u64;
        let total_steps = config.max_steps.unwrap_or(u64::from(config.n_epochs) * steps_per_epoch);
        let spaced = |count| EvenlySpaced { total: total_steps, count };
        Self {
            steps_per_epoch,
            total_steps,
            checkpoints: spaced(config.n_checkpoints),
            save_steps: config.save_steps,
            evaluations: config.validation_file.is_some().then(|| spaced(config.n_evals())),
            eval_steps: config.eval_steps,
            eval_on_start: config.eval_on_start,
        }
    }

    /// Whether the user asked for `checkpoint-N` after this step. The last step writes `final` instead.
    #[must_use]
    pub fn saves(&self, step: u64) -> bool {
        let every = self.save_steps.is_some_and(|every| step.is_multiple_of(every));
        (1..self.total_steps).contains(&step) && (every || self.checkpoints.contains(step))
    }

    /// Whether an evaluation follows this step; step 0 is before the first one.
    #[must_use]
    pub fn evaluates(&self, step: u64) -> bool {
        let Some(spaced) = self.evaluations else { return false };
        match (step, self.eval_steps) {
            (0, _) => self.eval_on_start,
            (_, Some(every)) => step.is_multiple_of(every) || step == self.total_steps,
            (_, None) => spaced.contains(step),
        }
    }

    /// Number of evaluations after the first step.
    #[must_use]
    pub fn evals(&self) -> u64 {
        match (self.evaluations, self.eval_steps) {
            (None, _) => 0,
            (Some(_), Some(every)) => self.total_steps.div_ceil(every),
            (Some(spaced), None) => u64::from(spaced.count).min(self.total_steps),
        }
    }

    /// Number of passes over the data that are done after a step.
    #[must_use]
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.steps_per_epoch as f64
    }

    /// The first work after `start_step` steps; skips an evaluation due there if it was `evaluated`.
    #[must_use]
    pub fn first(&self, start_step: u64, evaluated: bool) -> Option<Work> {
        if evaluated { self.after(Work::Evaluation(start_step)) } else { self.after(Work::Step(start_step)) }
    }

    /// The work after another one; `None` when the run is done.
    #[must_use]
    pub fn after(&self, work: Work) -> Option<Work> {
        match work {
            Work::Step(step) if self.evaluates(step) => Some(Work::Evaluation(step)),
            Work::Step(step) | Work::Evaluation(step) => {
                (step < self.total_steps).then_some(Work::Step(step + 1))
            }
            Work::Reference(_) => None,
        }
    }
}

/// Steps `round(k * total / count)` for k = 1..=count. Not stored as a list, because users may set both numbers very high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct EvenlySpaced {
    total: u64,
    count: u32,
}

impl EvenlySpaced {
    fn contains(self, step: u64) -> bool {
        // At most one per step.
        let count = u128::from(self.count).min(u128::from(self.total));
        let (total, step) = (u128::from(self.total), u128::from(step));
        if count == 0 || step == 0 || step > total {
            return false;
        }
        let place = |k: u128| (2 * k * total + count) / (2 * count);
        // Rounding moves a place by less than one step, and places are at least one step apart.
        let near = step * count / total;
        (near.max(1)..=(near + 1).min(count)).any(|k| place(k) == step)
    }
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
            let schedule = Schedule::new(&config, 4);
            (0..=total).filter(|step| schedule.saves(*step)).collect::<Vec<_>>()
        };
        assert_eq!(of(1, 10), [] as [u64; 0]);
        assert_eq!(of(4, 10), [3, 5, 8]);
        assert_eq!(of(20, 3), [1, 2]);
        assert_eq!(of(3, 1), [] as [u64; 0]);
        let all = |total: u64, count: u64| -> Vec<u64> {
            let count = count.min(total);
            (1..=count).map(|k| (2 * k * total + count) / (2 * count)).filter(|step| *step < total).collect()
        };
        for (total, n) in (1..40).flat_map(|total| (1..45).map(move |n| (total, n))) {
            assert_eq!(of(n, total), all(total, u64::from(n)), "{n} of {total}");
        }
        let endless = RunConfig { n_checkpoints: u32::MAX, max_steps: Some(u64::MAX), ..config(1, 1) };
        let endless = Schedule::new(&endless, 4);
        assert_eq!(
            (1..=u64::from(u32::MAX) + 2).rev().take(9).filter(|step| endless.saves(*step)).count(),
            1
        );
    }

    #[test]
    fn save_steps_add_to_the_evenly_spaced_checkpoints() {
        let config = RunConfig { n_checkpoints: 2, save_steps: Some(3), max_steps: Some(9), ..config(1, 1) };
        let schedule = Schedule::new(&config, 4);
        assert_eq!((0..=9).filter(|step| schedule.saves(*step)).collect::<Vec<_>>(), [3, 5, 6]);
    }

    #[test]
    fn evaluations_start_at_zero_and_end_at_the_last_step() {
        let of = |config: &RunConfig| {
            let schedule = Schedule::new(config, 4);
            (0..=10).filter(|step| schedule.evaluates(*step)).collect::<Vec<_>>()
        };
        let validation_file = Some("v.jsonl".into());
        let with = RunConfig { validation_file, n_evals: Some(3), max_steps: Some(10), ..config(1, 1) };
        assert_eq!(of(&with), [0, 3, 7, 10]);
        assert_eq!(of(&RunConfig { n_evals: Some(0), ..with.clone() }), [0]);
        assert_eq!(of(&RunConfig { n_evals: None, ..with.clone() }), [0, 10]);
        assert_eq!(of(&RunConfig { validation_file: None, ..with }), [] as [u64; 0]);
    }

    #[test]
    fn evaluations_by_steps_come_at_multiples_and_at_the_end() {
        let validation_file = Some("v.jsonl".into());
        let config = RunConfig { validation_file, eval_steps: Some(4), max_steps: Some(10), ..config(1, 1) };
        let of = |config: &RunConfig| {
            let schedule = Schedule::new(config, 4);
            (0..=10).filter(|step| schedule.evaluates(*step)).collect::<Vec<_>>()
        };
        assert_eq!(of(&config), [0, 4, 8, 10]);
        assert_eq!(of(&RunConfig { eval_on_start: false, ..config.clone() }), [4, 8, 10]);
        assert_eq!(of(&RunConfig { eval_steps: Some(5), ..config.clone() }), [0, 5, 10]);
        assert_eq!(of(&RunConfig { eval_steps: Some(50), ..config.clone() }), [0, 10]);
        for (every, evals) in [(4, 3), (5, 2), (50, 1)] {
            assert_eq!(
                Schedule::new(&RunConfig { eval_steps: Some(every), ..config.clone() }, 4).evals(),
                evals
            );
        }
        assert_eq!(of(&RunConfig { validation_file: None, ..config }), [] as [u64; 0]);
    }

    #[test]
    fn works_alternate_and_resume_repeats_nothing() {
        let validation_file = Some("v.jsonl".into());
        let config = RunConfig { validation_file, n_evals: Some(2), max_steps: Some(4), ..config(1, 1) };
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
