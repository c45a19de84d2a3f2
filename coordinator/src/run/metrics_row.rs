//! Computes one row of metrics from the sums of all ranks, with TRL's names. Pure.
//!
//! CRD-Y1: the values of a row are sums over ranks, divided once by global counts; never a mean of means.

use std::collections::HashMap;

use dyad_proto::names::metric;
use dyad_proto::run_config::Objective;
use dyad_proto::wire::{EvaluationReport, PreferenceSums, StepReport};
use serde_json::{Map, Value};

/// One line of `metrics.jsonl` or `eval_metrics.jsonl`, with the keys in writing order.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsRow(Vec<(String, f64)>);

/// Keys of counts (steps, tokens, bytes), which are written without a decimal point.
const WHOLE_NUMBERS: [&str; 5] = [
    metric::STEP,
    metric::NUM_TOKENS,
    metric::PEAK_MEMORY_BYTES,
    metric::BEST_STEP,
    metric::PATIENCE_COUNTER,
];

impl MetricsRow {
    /// The row as one line of JSON, without the line end. NaN and infinity become `null`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let object: Map<String, Value> = self
            .0
            .iter()
            .map(|(key, value)| {
                let whole = WHOLE_NUMBERS.contains(&key.as_str());
                (key.clone(), if whole { Value::from(*value as u64) } else { Value::from(*value) })
            })
            .collect();
        Value::Object(object).to_string()
    }

    /// The row as a map, for wire messages.
    #[must_use]
    pub fn values(&self) -> HashMap<String, f64> {
        self.0.iter().cloned().collect()
    }

    /// The value of a key, if the row has it.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<f64> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| *value)
    }

    /// The first value that is NaN or infinite, except durations, speeds and mean logits.
    #[must_use]
    pub fn no_number(&self) -> Option<(&str, f64)> {
        // Times and speeds do not depend on the model. A model that masks tokens has logits of minus infinity.
        let may = |name: &str| {
            name.ends_with("seconds") || name.ends_with("_per_second") || name.contains("logits/")
        };
        self.iter().find(|(name, value)| !value.is_finite() && !may(name))
    }

    /// All keys and values, in writing order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(key, value)| (key.as_str(), *value))
    }

    /// Adds a value at the end.
    pub(super) fn push(&mut self, key: impl Into<String>, value: f64) {
        self.0.push((key.into(), value));
    }
}

#[cfg(test)]
impl<const N: usize> From<[(&str, f64); N]> for MetricsRow {
    fn from(values: [(&str, f64); N]) -> Self {
        Self(values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }
}

/// Adds up the sums of all ranks.
#[must_use]
pub fn total<'a>(sums: impl IntoIterator<Item = &'a PreferenceSums>) -> PreferenceSums {
    sums.into_iter().fold(PreferenceSums::default(), |total, rank| PreferenceSums {
        pairs: total.pairs + rank.pairs,
        loss: total.loss + rank.loss,
        nll: total.nll + rank.nll,
        rewards_chosen: total.rewards_chosen + rank.rewards_chosen,
        rewards_rejected: total.rewards_rejected + rank.rewards_rejected,
        rewards_correct: total.rewards_correct + rank.rewards_correct,
        logps_chosen: total.logps_chosen + rank.logps_chosen,
        logps_rejected: total.logps_rejected + rank.logps_rejected,
        logps_correct: total.logps_correct + rank.logps_correct,
        kl_chosen: total.kl_chosen + rank.kl_chosen,
        kl_rejected: total.kl_rejected + rank.kl_rejected,
        logits_chosen: total.logits_chosen + rank.logits_chosen,
        logits_rejected: total.logits_rejected + rank.logits_rejected,
        entropy: total.entropy + rank.entropy,
        chosen_tokens_correct: total.chosen_tokens_correct + rank.chosen_tokens_correct,
        completion_tokens: total.completion_tokens + rank.completion_tokens,
        chosen_tokens: total.chosen_tokens + rank.chosen_tokens,
        tokens: total.tokens + rank.tokens,
        kl_tokens: total.kl_tokens + rank.kl_tokens,
        kl_chosen_tokens: total.kl_chosen_tokens + rank.kl_chosen_tokens,
        aux_loss: total.aux_loss + rank.aux_loss,
        desirable: total.desirable + rank.desirable,
        kl_estimate: total.kl_estimate + rank.kl_estimate,
    })
}

/// Input of a step's row in addition to the reports.
#[derive(Clone, Copy, Debug)]
pub struct StepContext {
    /// Determines the keys, and the divisor of the loss.
    pub objective: Objective,
    /// Number of passes over the data that are done after this step.
    pub epoch: f64,
    /// Tokens trained on before this step.
    pub tokens_before: u64,
}

/// The row of one optimizer step, from one report per rank in rank order.
#[must_use]
pub fn step_row(reports: &[StepReport], context: StepContext) -> MetricsRow {
    let sums = total(reports.iter().filter_map(|report| report.sums.as_ref()));
    let first = reports.first().cloned().unwrap_or_default();
    let seconds = slowest(reports.iter().map(|report| report.step_seconds));
    let mut row =
        MetricsRow(vec![(metric::STEP.into(), first.step as f64), (metric::EPOCH.into(), context.epoch)]);
    row.push(metric::LOSS, loss(&sums, context.objective));
    row.push(metric::GRAD_NORM, first.grad_norm);
    row.push(metric::LEARNING_RATE, first.learning_rate);
    push_preferences(&mut row, &sums, context.objective, "");
    row.push(metric::NUM_TOKENS, (context.tokens_before + sums.tokens) as f64);
    row.push(metric::STEP_SECONDS, seconds);
    row.push(metric::TOKENS_PER_SECOND, sums.tokens as f64 / seconds);
    row.push(metric::PAIRS_PER_SECOND, sums.pairs as f64 / seconds);
    // The maximum over ranks: that rank runs out of memory first.
    let peak = reports.iter().map(|report| report.peak_memory_bytes).max().unwrap_or(0);
    row.push(metric::PEAK_MEMORY_BYTES, peak as f64);
    row
}

/// The row of one evaluation, from one report per rank in rank order.
#[must_use]
pub fn evaluation_row(reports: &[EvaluationReport], objective: Objective) -> MetricsRow {
    let sums = total(reports.iter().filter_map(|report| report.sums.as_ref()));
    let step = reports.first().map_or(0, |report| report.step);
    let mut row = MetricsRow(vec![(metric::STEP.into(), step as f64)]);
    row.push(format!("{}{}", metric::EVAL, metric::LOSS), loss(&sums, objective));
    push_preferences(&mut row, &sums, objective, metric::EVAL);
    if objective.scores_both_outputs() {
        row.push(
            format!("{}{}", metric::EVAL, metric::LOGPS_ACCURACIES),
            sums.logps_correct as f64 / sums.pairs as f64,
        );
    }
    row.push(metric::EVAL_SECONDS, slowest(reports.iter().map(|report| report.seconds)));
    row
}

/// Mean loss over pairs, plus the likelihood term and the layers' own loss.
fn loss(sums: &PreferenceSums, objective: Objective) -> f64 {
    let likelihood = match objective.nll_weight() {
        0.0 => 0.0,
        factor => factor * nll(sums),
    };
    sums.loss / sums.pairs as f64 + likelihood + sums.aux_loss
}

/// Negative log-likelihood of the chosen outputs, a mean over their tokens.
fn nll(sums: &PreferenceSums) -> f64 {
    sums.nll / sums.chosen_tokens as f64
}

fn push_preferences(row: &mut MetricsRow, sums: &PreferenceSums, objective: Objective, prefix: &str) {
    let both = objective.scores_both_outputs();
    let mut values = of_answers(sums, objective);
    values.extend(token_means(sums, both || objective.is_labelled()));
    if both && objective.nll_weight() != 0.0 {
        values.push((metric::NLL_LOSS, nll(sums)));
    }
    if sums.aux_loss != 0.0 {
        values.push((metric::AUX_LOSS, sums.aux_loss));
    }
    // There is no KL for pairs with known reference scores: the reference model did not run on them.
    if objective.needs_reference() && sums.kl_tokens > 0 {
        let (all, chosen) = (sums.kl_tokens, sums.kl_chosen_tokens);
        values.push(match objective.estimates_kl() {
            true => (metric::KL, sums.kl_estimate / sums.pairs as f64),
            false => (metric::KL, (sums.kl_chosen + sums.kl_rejected) / all as f64),
        });
        let sides = [
            (metric::KL_CHOSEN, sums.kl_chosen, chosen),
            (metric::KL_REJECTED, sums.kl_rejected, all.saturating_sub(chosen)),
        ];
        let with_tokens = sides.into_iter().filter(|(.., tokens)| *tokens > 0);
        values.extend(with_tokens.map(|(key, sum, tokens)| (key, sum / tokens as f64)));
    }
    for (key, value) in values {
        row.push(format!("{prefix}{key}"), value);
    }
}

/// Metrics that are means over answers. Those of labelled answers are means over the desirable and over the other ones.
fn of_answers(sums: &PreferenceSums, objective: Objective) -> Vec<(&'static str, f64)> {
    let pairs = sums.pairs as f64;
    let (chosen, rejected) = match objective.is_labelled() {
        true => (sums.desirable as f64, pairs - sums.desirable as f64),
        false => (pairs, pairs),
    };
    if !objective.is_labelled() && !objective.scores_both_outputs() {
        return vec![(metric::LOGPS_CHOSEN, sums.logps_chosen / pairs)];
    }
    let (rewards_chosen, rewards_rejected) = (sums.rewards_chosen / chosen, sums.rewards_rejected / rejected);
    let mut values = vec![
        (metric::REWARDS_CHOSEN, rewards_chosen, chosen),
        (metric::REWARDS_REJECTED, rewards_rejected, rejected),
        (metric::REWARDS_ACCURACIES, sums.rewards_correct as f64 / pairs, pairs),
        (metric::REWARDS_MARGINS, rewards_chosen - rewards_rejected, chosen.min(rejected)),
        (metric::LOGPS_CHOSEN, sums.logps_chosen / chosen, chosen),
        (metric::LOGPS_REJECTED, sums.logps_rejected / rejected, rejected),
    ];
    // A label is no comparison of two answers.
    values.retain(|(name, ..)| !objective.is_labelled() || *name != metric::REWARDS_ACCURACIES);
    values.into_iter().filter(|(.., count)| *count > 0.0).map(|(name, value, _)| (name, value)).collect()
}

/// Metrics that are means over completion tokens, without those that have no tokens.
fn token_means(sums: &PreferenceSums, both: bool) -> Vec<(&'static str, f64)> {
    let (all, chosen) = (sums.completion_tokens, sums.chosen_tokens);
    let rejected = all.saturating_sub(chosen);
    let means = [
        (metric::LOGITS_CHOSEN, sums.logits_chosen, chosen),
        (metric::LOGITS_REJECTED, sums.logits_rejected, if both { rejected } else { 0 }),
        (metric::ENTROPY, sums.entropy, all),
        (metric::MEAN_TOKEN_ACCURACY, sums.chosen_tokens_correct as f64, chosen),
    ];
    let with_tokens = means.into_iter().filter(|(.., tokens)| *tokens > 0);
    with_tokens.map(|(key, sum, tokens)| (key, sum / tokens as f64)).collect()
}

fn slowest(seconds: impl Iterator<Item = f64>) -> f64 {
    seconds.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use dyad_proto::run_config::LossType;

    use super::*;

    fn reports() -> [StepReport; 2] {
        let small = PreferenceSums {
            pairs: 1,
            loss: 0.9,
            rewards_chosen: 0.1,
            rewards_rejected: 0.3,
            rewards_correct: 0,
            logps_chosen: -10.0,
            logps_rejected: -12.0,
            logps_correct: 1,
            kl_chosen: 0.2,
            kl_rejected: 0.3,
            kl_chosen_tokens: 5,
            logits_chosen: 5.0,
            logits_rejected: -5.0,
            entropy: 20.0,
            chosen_tokens_correct: 4,
            completion_tokens: 10,
            chosen_tokens: 5,
            nll: 0.0,
            tokens: 40,
            kl_tokens: 10,
            aux_loss: 0.0,
            ..PreferenceSums::default()
        };
        let large = PreferenceSums {
            pairs: 3,
            loss: 0.3,
            rewards_chosen: 1.5,
            rewards_rejected: -0.7,
            rewards_correct: 3,
            logps_chosen: -50.0,
            logps_rejected: -48.0,
            logps_correct: 1,
            kl_chosen: 0.8,
            kl_rejected: 0.7,
            kl_chosen_tokens: 45,
            logits_chosen: 45.0,
            logits_rejected: 0.0,
            entropy: 80.0,
            chosen_tokens_correct: 6,
            completion_tokens: 90,
            chosen_tokens: 45,
            nll: 0.0,
            tokens: 360,
            kl_tokens: 90,
            aux_loss: 0.0,
            ..PreferenceSums::default()
        };
        let report = |sums: PreferenceSums, step_seconds| StepReport {
            peak_memory_bytes: 100 * sums.pairs,
            step: 7,
            sums: Some(sums),
            grad_norm: 2.5,
            learning_rate: 1e-5,
            step_seconds,
            ..StepReport::default()
        };
        [report(small, 0.5), report(large, 2.0)]
    }

    fn sigmoid() -> Objective {
        Objective::of_loss(LossType::Sigmoid)
    }

    fn dpo() -> StepContext {
        StepContext { objective: sigmoid(), epoch: 0.5, tokens_before: 1000 }
    }

    /// Ranks hold 1 and 3 pairs: a mean of the ranks' means would give loss 0.5, not 0.3.
    #[test]
    fn ranks_weigh_by_their_pairs_and_tokens() {
        let row = step_row(&reports(), dpo());
        let close = |key: &str, expected: f64| {
            let value = row.get(key).unwrap();
            assert!((value - expected).abs() < 1e-12, "{key}: {value} is not {expected}");
        };
        close("loss", 0.3);
        close("rewards/chosen", 0.4);
        close("rewards/rejected", -0.1);
        close("rewards/margins", 0.5);
        close("rewards/accuracies", 0.75);
        close("logps/chosen", -15.0);
        close("logps/rejected", -15.0);
        close("kl", 0.02);
        close("kl/chosen", 0.02);
        close("kl/rejected", 0.02);
        close("logits/chosen", 1.0);
        close("logits/rejected", -0.1);
        close("entropy", 1.0);
        close("mean_token_accuracy", 0.2);
        close("num_tokens", 1400.0);
        close("step_seconds", 2.0);
        close("tokens_per_second", 200.0);
        close("pairs_per_second", 2.0);
        close("peak_memory_bytes", 300.0);
    }

    #[test]
    fn keys_come_in_the_documented_order() {
        let json = step_row(&reports(), dpo()).to_json();
        let keys: Map<String, Value> = serde_json::from_str(&json).unwrap();
        let expected = "step epoch loss grad_norm learning_rate rewards/chosen rewards/rejected rewards/accuracies \
                        rewards/margins logps/chosen logps/rejected logits/chosen logits/rejected entropy \
                        mean_token_accuracy kl kl/chosen kl/rejected num_tokens step_seconds tokens_per_second \
                        pairs_per_second peak_memory_bytes";
        assert_eq!(keys.keys().map(String::as_str).collect::<Vec<_>>().join(" "), expected);
        assert!(
            json.starts_with(r#"{"step":7,"epoch":0.5,"#) && json.contains(r#""num_tokens":1400,"#),
            "{json}"
        );
    }

    #[test]
    fn fine_tuning_divides_by_tokens_and_has_no_preference_keys() {
        let mut reports = reports();
        for (report, nll) in reports.iter_mut().zip([0.4, 0.2]) {
            let sums = report.sums.as_mut().unwrap();
            (sums.loss, sums.nll) = (0.0, nll);
        }
        let row = step_row(&reports, StepContext { objective: Objective::LIKELIHOOD, ..dpo() });
        // 50 tokens of chosen outputs.
        assert!((row.get("loss").unwrap() - 0.012).abs() < 1e-12);
        assert_eq!(row.get("logps/chosen"), Some(-15.0));
        for absent in ["rewards/chosen", "rewards/margins", "logps/rejected", "kl"] {
            assert_eq!(row.get(absent), None, "{absent}");
        }
    }

    #[test]
    fn evaluation_keys_carry_their_prefix() {
        let reports = reports().map(|report| EvaluationReport {
            step: 7,
            sums: report.sums,
            seconds: report.step_seconds,
            ..EvaluationReport::default()
        });
        let row = evaluation_row(&reports, sigmoid());
        assert!((row.get("eval_loss").unwrap() - 0.3).abs() < 1e-12);
        assert_eq!(row.get("eval_logps/accuracies"), Some(0.5));
        assert_eq!(row.get("eval_rewards/accuracies"), Some(0.75));
        assert_eq!(row.get("eval_seconds"), Some(2.0));
        assert!(row.values().keys().all(|key| key == "step" || key.starts_with("eval_")));
        assert_eq!(evaluation_row(&reports, Objective::LIKELIHOOD).values().len(), 7);
    }

    #[test]
    fn kl_is_a_mean_over_the_tokens_that_it_was_measured_on() {
        let mut reports = reports();
        let sums = reports[1].sums.as_mut().unwrap();
        (sums.kl_chosen, sums.kl_rejected, sums.kl_tokens, sums.kl_chosen_tokens) = (0.0, 0.0, 0, 0);
        assert_eq!(step_row(&reports, dpo()).get("kl"), Some(0.05));
        reports[0].sums.as_mut().unwrap().kl_tokens = 0;
        assert_eq!(step_row(&reports, dpo()).get("kl"), None);
    }

    #[test]
    fn the_layers_own_loss_is_part_of_the_loss() {
        let mut reports = reports();
        for report in &mut reports {
            report.sums.as_mut().unwrap().aux_loss = 0.125;
        }
        let row = step_row(&reports, dpo());
        assert_eq!((row.get("loss"), row.get("aux_loss")), (Some(0.3 + 0.25), Some(0.25)));
    }

    #[test]
    fn values_that_are_not_finite_are_null() {
        let mut reports = reports();
        reports[0].grad_norm = f64::NAN;
        assert!(step_row(&reports, dpo()).to_json().contains(r#""grad_norm":null,"#));
    }
}
