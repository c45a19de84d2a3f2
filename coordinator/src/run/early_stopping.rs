//! Whether the run stops because its evaluations no longer improve, and which of them is the best. Pure. The coordinator decides for all
//! ranks, and the decision depends only on the rows of the evaluations, so that a resumed run decides the same.
//!
//! The best evaluation is the one with the best value, as transformers' `Trainer` chooses it. Whether an evaluation counts as an
//! improvement on the best one before it is decided as in its `EarlyStoppingCallback`.

use dyad_proto::names::metric;
use dyad_proto::run_config::EarlyStoppingRule;
use dyad_proto::wire;
use dyad_proto::{Fault, RunConfig};
use serde_json::Value;

use crate::run::metrics_row::MetricsRow;

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BestEvaluation {
    /// Optimizer steps before it.
    pub step: u64,
    /// Its value of the metric.
    pub value: f64,
}

/// Follows the evaluations of a run.
#[derive(Clone, Debug)]
pub struct EarlyStopping {
    rule: EarlyStoppingRule,
    /// Evaluations so far, without the one before the first step.
    seen: u64,
    best: Option<BestEvaluation>,
    /// Evaluations in a row without an improvement, after the warmup.
    patience_counter: u32,
}

impl EarlyStopping {
    /// Before the first evaluation; `None` for a run that does not stop early.
    #[must_use]
    pub fn new(config: &RunConfig) -> Option<Self> {
        let rule = config.early_stopping()?;
        Some(Self { rule, seen: 0, best: None, patience_counter: 0 })
    }

    /// After the evaluations with these rows of `eval_metrics.jsonl`.
    #[must_use]
    pub fn resumed(config: &RunConfig, rows: &[Value]) -> Option<Self> {
        let mut stopping = Self::new(config)?;
        for row in rows {
            let value = row.get(&stopping.rule.metric).and_then(Value::as_f64);
            if let (Some(step), Some(value)) = (row.get(metric::STEP).and_then(Value::as_u64), value) {
                stopping.take(step, value);
            }
        }
        Some(stopping)
    }

    /// When the run stops.
    #[must_use]
    pub fn rule(&self) -> &EarlyStoppingRule {
        &self.rule
    }

    /// The best evaluation so far.
    #[must_use]
    pub fn best(&self) -> Option<BestEvaluation> {
        self.best
    }

    /// Whether the run stops now.
    #[must_use]
    pub fn stops(&self) -> bool {
        self.patience_counter >= self.rule.patience
    }

    /// Takes the value of the evaluation after `step` steps. The one before the first step does not count: its model is not trained.
    pub fn take(&mut self, step: u64, value: f64) {
        if step == 0 {
            return;
        }
        let better = |than: f64| match self.rule.greater_is_better {
            true => value > than,
            false => value < than,
        };
        let best = self.best.map(|best| best.value);
        let improves = best.is_none_or(|best| better(best) && (value - best).abs() > self.rule.min_delta);
        if value.is_finite() && best.is_none_or(better) {
            self.best = Some(BestEvaluation { step, value });
        }
        self.seen += 1;
        self.patience_counter = match improves {
            true => 0,
            // The run has stopped when the counter reaches the patience; a resume with a longer one goes on counting.
            false => self.patience_counter + u32::from(self.seen > u64::from(self.rule.warmup_evals)),
        };
    }

    /// Takes the row of the evaluation after `step` steps, and adds the state to the row. Fails if the row lacks the metric.
    pub fn judge(&mut self, step: u64, row: &mut MetricsRow) -> Result<Option<wire::EarlyStopping>, Fault> {
        let Some(value) = row.get(&self.rule.metric) else {
            let known: Vec<&str> =
                row.iter().map(|(key, _)| key).filter(|key| *key != metric::STEP).collect();
            return Err(Fault::input(format!(
                "metric_for_best_model: evaluations of this run have no `{}`",
                self.rule.metric
            ))
            .hint(format!("they have {}", known.join(", "))));
        };
        self.take(step, value);
        let Some(best) = self.best else { return Ok(None) };
        row.push(metric::BEST_METRIC, best.value);
        row.push(metric::BEST_STEP, best.step as f64);
        row.push(metric::PATIENCE_COUNTER, f64::from(self.patience_counter));
        Ok((step > 0).then(|| wire::EarlyStopping {
            step,
            metric: self.rule.metric.clone(),
            best_step: best.step,
            best_value: best.value,
            patience_counter: self.patience_counter,
            patience: self.rule.patience,
            // The caller knows whether there are further steps.
            stops: self.stops(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopping(change: impl FnOnce(&mut RunConfig)) -> EarlyStopping {
        let mut config = RunConfig { early_stopping_enabled: true, ..RunConfig::default() };
        change(&mut config);
        EarlyStopping::new(&config).unwrap()
    }

    /// The step at which the run stops, and the best step; evaluations come after steps 10, 20, ….
    fn ends(mut stopping: EarlyStopping, values: &[f64]) -> (Option<u64>, u64) {
        for (step, value) in (1..).map(|count| count * 10).zip(values) {
            stopping.take(step, *value);
            if stopping.stops() {
                return (Some(step), stopping.best().unwrap().step);
            }
        }
        (None, stopping.best().unwrap().step)
    }

    #[test]
    fn the_run_stops_after_patience_evaluations_without_an_improvement() {
        assert_eq!(ends(stopping(|_| {}), &[0.7, 0.6, 0.65, 0.66, 0.1]), (Some(40), 20));
        assert_eq!(ends(stopping(|_| {}), &[0.7, 0.6, 0.65, 0.5, 0.55, 0.5]), (Some(60), 40));
        assert_eq!(ends(stopping(|_| {}), &[0.7, 0.6, 0.65, 0.5]), (None, 40));
    }

    #[test]
    fn evaluations_of_the_warmup_may_be_the_best_but_do_not_count() {
        let values = [0.1, 0.5, 0.5, 0.5, 0.5];
        let warmup = |evals| stopping(|config| config.early_stopping_warmup_evals = Some(evals));
        assert_eq!(ends(warmup(0), &values), (Some(30), 10));
        assert_eq!(ends(warmup(1), &values), (Some(30), 10));
        assert_eq!(ends(warmup(3), &values), (Some(50), 10));
    }

    #[test]
    fn a_small_improvement_becomes_the_best_but_counts_against_the_patience() {
        let stopping = stopping(|config| config.early_stopping_min_delta = Some(0.1));
        assert_eq!(ends(stopping, &[0.7, 0.65, 0.6, 0.4]), (Some(30), 30));
    }

    /// `tests/parity/early_stopping.py` writes the file; `tests/tests/parity.rs` compares it with the installed transformers.
    #[test]
    fn decisions_equal_those_of_transformers() {
        type Case = (bool, u32, f64, Vec<f64>, Option<u64>, u64);
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/early_stopping.json")).unwrap();
        assert!(cases.len() > 100);
        for case in cases {
            let (greater, patience, min_delta, values, stop, best) = case.clone();
            let stopping = stopping(|config| {
                config.greater_is_better = Some(greater);
                config.early_stopping_patience = Some(patience);
                config.early_stopping_min_delta = Some(min_delta);
                config.early_stopping_warmup_evals = Some(0);
            });
            let (stopped, found) = ends(stopping, &values);
            assert_eq!((stopped.map(|step| step / 10), found / 10), (stop, best), "{case:?}");
        }
    }

    #[test]
    fn greater_is_better_for_an_accuracy() {
        let stopping = stopping(|config| config.metric_for_best_model = Some("rewards/accuracies".into()));
        assert_eq!(ends(stopping, &[0.5, 0.8, 0.7, 0.8]), (Some(40), 20));
    }

    #[test]
    fn the_state_after_a_resume_is_that_of_the_undisturbed_run() {
        let config = RunConfig { early_stopping_enabled: true, ..RunConfig::default() };
        let values = [0.3, 0.9, 0.5, 0.6, 0.4, 0.45, 0.47];
        let row = |at: usize| serde_json::json!({ "step": at * 10, "eval_loss": values[at] });
        for resumed_at in 1..values.len() {
            let rows: Vec<Value> = (0..=resumed_at).map(row).collect();
            let mut resumed = EarlyStopping::resumed(&config, &rows).unwrap();
            let mut whole = EarlyStopping::new(&config).unwrap();
            for (at, value) in values.iter().enumerate() {
                whole.take(at as u64 * 10, *value);
                if at > resumed_at {
                    resumed.take(at as u64 * 10, *value);
                }
            }
            assert_eq!(resumed.best(), whole.best());
            assert_eq!((resumed.patience_counter, resumed.seen), (whole.patience_counter, whole.seen));
        }
    }

    #[test]
    fn a_metric_that_evaluations_lack_is_refused_with_those_that_they_have() {
        let mut stopping = stopping(|config| config.metric_for_best_model = Some("eval_kl".into()));
        let mut row = MetricsRow::from([("step", 0.0), ("eval_loss", 0.7)]);
        let fault = stopping.judge(0, &mut row).unwrap_err();
        assert!(fault.message.contains("have no `eval_kl`") && fault.hint.contains("eval_loss"), "{fault:?}");
    }
}
