//! When a run stops early: its keys, their defaults, and what may be set together.

use super::RunConfig;
use crate::names::metric;
use crate::{Fault, counted};

/// When a run stops early.
#[derive(Clone, Debug, PartialEq)]
pub struct EarlyStoppingRule {
    /// The metric of an evaluation that is compared, with the prefix `eval_`.
    pub metric: String,
    /// Whether a greater value of it is better.
    pub greater_is_better: bool,
    /// Evaluations in a row without an improvement after which the run stops.
    pub patience: u32,
    /// The value must be better than the best one by more than this to count as an improvement.
    pub min_delta: f64,
    /// First evaluations that do not count against the patience.
    pub warmup_evals: u32,
}

impl EarlyStoppingRule {
    /// Fewest evaluations after the first step that make sense: with fewer, no run could stop before its end.
    #[must_use]
    pub fn fewest_evals(&self) -> u64 {
        u64::from(self.patience) + u64::from(self.warmup_evals) + 1
    }

    /// The error for a run with too few evaluations; `set` is the key that says how many there are.
    pub fn check_evals(&self, evals: u64, set: &str) -> Result<(), Fault> {
        if evals >= self.fewest_evals() {
            return Ok(());
        }
        Err(Fault::input(format!(
            "early stopping needs {} (early_stopping_patience + early_stopping_warmup_evals + 1), but {set} gives {evals}",
            counted(self.fewest_evals(), "evaluation")
        ))
        .hint(format!("change {set}, or lower early_stopping_patience or early_stopping_warmup_evals")))
    }
}

/// Keys that need `early_stopping_enabled`.
pub const EARLY_STOPPING_KEYS: [&str; 6] = [
    "early_stopping_enabled",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "early_stopping_warmup_evals",
    "metric_for_best_model",
    "greater_is_better",
];

/// Whether a greater value of a metric is better; `None` if the user must say it.
fn direction(name: &str) -> Option<bool> {
    match name {
        metric::KL => Some(false),
        metric::REWARDS_ACCURACIES
        | metric::REWARDS_MARGINS
        | metric::REWARDS_CHOSEN
        | metric::LOGPS_ACCURACIES
        | metric::LOGPS_CHOSEN => Some(true),
        // As in transformers, which says for every other name that greater is better.
        name if name.ends_with(metric::LOSS) => Some(false),
        _ => None,
    }
}

impl RunConfig {
    /// When the run stops early; `None` if it does not.
    #[must_use]
    pub fn early_stopping(&self) -> Option<EarlyStoppingRule> {
        let name = self.watched();
        self.early_stopping_enabled.then(|| EarlyStoppingRule {
            metric: format!("{}{name}", metric::EVAL),
            greater_is_better: self.greater_is_better.or(direction(name)).unwrap_or(false),
            patience: self.early_stopping_patience.unwrap_or(2),
            min_delta: self.early_stopping_min_delta.unwrap_or(0.0),
            warmup_evals: self.early_stopping_warmup_evals.unwrap_or(1),
        })
    }

    /// The metric that is compared, without the prefix `eval_`.
    fn watched(&self) -> &str {
        let name = self.metric_for_best_model.as_deref().unwrap_or(metric::LOSS);
        name.strip_prefix(metric::EVAL).unwrap_or(name)
    }

    pub(super) fn check_early_stopping(&self) -> Result<(), Fault> {
        let Some(rule) = self.early_stopping() else {
            let set = [
                ("early_stopping_patience", self.early_stopping_patience.is_some()),
                ("early_stopping_min_delta", self.early_stopping_min_delta.is_some()),
                ("early_stopping_warmup_evals", self.early_stopping_warmup_evals.is_some()),
                ("metric_for_best_model", self.metric_for_best_model.is_some()),
                ("greater_is_better", self.greater_is_better.is_some()),
            ];
            return match set.iter().find(|(_, set)| *set) {
                Some((key, _)) => {
                    Err(Fault::input(format!("{key} is set, but early_stopping_enabled is not"))
                        .hint(format!("set early_stopping_enabled = true, or remove {key}")))
                }
                None => Ok(()),
            };
        };
        if self.validation_file.is_none() {
            return Err(Fault::input("early_stopping_enabled is set but validation_file is not")
                .hint("add `validation_file = \"…\"`, on whose pairs the run is evaluated"));
        }
        if self.greater_is_better.is_none() && direction(self.watched()).is_none() {
            return Err(Fault::input(format!(
                "metric_for_best_model = {:?}: whether a greater value is better is not known",
                self.watched()
            ))
            .hint("set greater_is_better to true or false"));
        }
        match self.eval_steps {
            // Their number follows from the number of steps, which is not known yet.
            Some(_) => Ok(()),
            None => rule.check_evals(u64::from(self.n_evals()), "n_evals"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(keys: &str) -> Result<RunConfig, Fault> {
        let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\nvalidation_file = \"v\"\n";
        RunConfig::from_toml(&format!("{good}{keys}\n"), "run.toml", &[])
    }

    fn message(keys: &str) -> String {
        checked(keys).unwrap_err().message
    }

    #[test]
    fn defaults_are_those_of_the_fine_tuning_api() {
        let rule = checked("early_stopping_enabled = true\nn_evals = 4").unwrap().early_stopping().unwrap();
        let expected = EarlyStoppingRule {
            metric: "eval_loss".into(),
            greater_is_better: false,
            patience: 2,
            min_delta: 0.0,
            warmup_evals: 1,
        };
        assert_eq!(rule, expected);
        assert_eq!(checked("n_evals = 4").unwrap().early_stopping(), None);
    }

    #[test]
    fn too_few_evaluations_are_refused() {
        assert_eq!(
            message("early_stopping_enabled = true\nn_evals = 3"),
            "early stopping needs 4 evaluations (early_stopping_patience + early_stopping_warmup_evals + 1), but n_evals gives 3"
        );
        assert!(checked("early_stopping_enabled = true\neval_steps = 3").is_ok());
    }

    #[test]
    fn keys_of_early_stopping_need_it() {
        for key in [
            "early_stopping_patience = 2",
            "early_stopping_min_delta = 0.1",
            "early_stopping_warmup_evals = 0",
            "metric_for_best_model = \"loss\"",
            "greater_is_better = true",
        ] {
            assert!(message(key).ends_with("is set, but early_stopping_enabled is not"), "{key}");
        }
        let bare =
            "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\nearly_stopping_enabled = true\n";
        let fault = RunConfig::from_toml(bare, "run.toml", &[]).unwrap_err();
        assert_eq!(fault.message, "early_stopping_enabled is set but validation_file is not");
    }

    #[test]
    fn the_direction_of_a_metric_follows_from_its_name_or_is_asked_for() {
        let with = |name: &str, more: &str| {
            checked(&format!(
                "early_stopping_enabled = true\nn_evals = 9\nmetric_for_best_model = \"{name}\"\n{more}"
            ))
        };
        for (name, greater) in [("eval_loss", false), ("rewards/accuracies", true), ("eval_kl", false)] {
            let rule = with(name, "").unwrap().early_stopping().unwrap();
            assert_eq!(rule.greater_is_better, greater, "{name}");
            assert_eq!(rule.metric, format!("eval_{}", name.trim_start_matches("eval_")));
        }
        assert!(with("logps/rejected", "").unwrap_err().hint.contains("greater_is_better"));
        let rule = with("logps/rejected", "greater_is_better = false").unwrap().early_stopping().unwrap();
        assert!(!rule.greater_is_better);
    }
}
