//! Shows the run's events on the console.

use std::collections::HashMap;
use std::time::Instant;

use dyad_proto::names::metric;
use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{DataReport, EarlyStopping, Phase};
use dyad_proto::{agrees, counted, grouped, plain, thousands};

use crate::show::console::Console;
use crate::show::live_plot::LivePlot;
use crate::show::pace::Pace;
use crate::show::reached::Reached;

/// Follows one run.
#[derive(Debug)]
pub struct Progress {
    console: Console,
    total: u64,
    pace: Pace,
    /// Start of the step count.
    counted_from: Instant,
    /// Plot that new rows redraw; `None` without a plot.
    plot: Option<LivePlot>,
    /// Progress of the run.
    pub reached: Reached,
}

impl Progress {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(console: Console, plot: Option<LivePlot>) -> Self {
        Self {
            console,
            total: 0,
            pace: Pace::default(),
            counted_from: Instant::now(),
            plot,
            reached: Reached::default(),
        }
    }

    /// Shows one event.
    pub fn show(&mut self, event: &Body) {
        self.reached.note(event);
        if let (Some(plot), Body::Step(_) | Body::Evaluation(_)) = (&self.plot, event) {
            plot.has_changed();
        }
        match event {
            Body::Started(started) => {
                self.console.status(&format!("waiting for {}", counted(started.world_size, "trainer")));
            }
            Body::Arrived(_) | Body::Joined(_) | Body::Ended(_) | Body::Beat(_) => {}
            Body::Skipped(skipped) => self.console.line(&format!(
                "behind   {} of the run {} not shown here; metrics.jsonl has every step",
                grouped(skipped.events, "event"),
                agrees(skipped.events, "is", "are")
            )),
            Body::Phase(changed) => {
                if let Some(text) = phase_text(changed.phase()) {
                    self.console.status(text);
                }
            }
            Body::Model(model) => self.console.line(&format!(
                "model    {} with {}, {} trainable, computed in {}",
                model.architecture,
                grouped(model.parameters, "parameter"),
                thousands(model.trainable_parameters),
                plain::line(&model.precision)
            )),
            Body::Data(data) => {
                self.total = data.total_steps;
                data.notes
                    .iter()
                    .for_each(|note| self.console.line(&format!("data     {}", plain::line(note))));
                self.console.line(&data_line(data));
                self.counted_from = Instant::now();
                // Without steps the run only evaluates.
                match data.total_steps {
                    0 => self.console.status("evaluating"),
                    total => self.console.count(data.start_step, total),
                }
            }
            Body::Reference(progress) if progress.pairs == progress.total => {
                let pairs = grouped(progress.total, "pair");
                self.console.line(&format!("scored   {pairs} with the reference model"));
            }
            Body::Reference(progress) => self.console.status(&format!(
                "scoring with the reference model: {} of {}",
                thousands(progress.pairs),
                grouped(progress.total, "pair")
            )),
            Body::Step(step) => {
                self.pace.step(seconds(&step.values, metric::STEP_SECONDS));
                let left = self.pace.left(self.total.saturating_sub(step.step), self.counted_from.elapsed());
                self.console.step(step.step, self.total, left, &step_line(&step.values));
            }
            Body::Evaluation(evaluation) => {
                self.pace.evaluation(seconds(&evaluation.values, metric::EVAL_SECONDS));
                self.console.line(&format!(
                    "eval     step {}: {}",
                    evaluation.step,
                    evaluation_line(&evaluation.values)
                ));
            }
            Body::Checkpoint(saved) if !saved.r#final => {
                self.console.line(&format!("saved    {}", saved.path))
            }
            Body::Checkpoint(_) => {}
            Body::EarlyStopping(stopping) => self.console.line(&early_stopping_line(stopping)),
        }
    }
}

fn early_stopping_line(stopping: &EarlyStopping) -> String {
    let (step, best, value) = (stopping.step, stopping.best_step, stopping.best_value);
    let metric = plain::line(&stopping.metric);
    if stopping.stops {
        return format!(
            "stops    early after step {step}: {} without an improvement of {metric}; the best was {value:.4} at step {best}",
            counted(stopping.patience_counter, "evaluation")
        );
    }
    if step == best {
        return format!("best     step {step}: {metric} {value:.4}");
    }
    format!(
        "best     is still step {best}: {metric} {value:.4} ({} of {} without an improvement)",
        stopping.patience_counter,
        counted(stopping.patience, "evaluation")
    )
}

fn seconds(values: &HashMap<String, f64>, name: &str) -> f64 {
    values.get(name).copied().unwrap_or(f64::NAN)
}

fn phase_text(phase: Phase) -> Option<&'static str> {
    match phase {
        Phase::Loading => Some("loading the model"),
        Phase::Measuring => Some("tokenising the pairs"),
        Phase::Rendezvous => Some("connecting the trainers"),
        Phase::Saving => Some("saving"),
        Phase::Training | Phase::Evaluating | Phase::Unspecified => None,
    }
}

fn data_line(data: &DataReport) -> String {
    if data.total_steps == 0 {
        return format!("data     {}", validation_text(data));
    }
    let mut line = format!(
        "data     {}, {} per epoch, {}",
        counted(data.pairs, "pair"),
        counted(data.steps_per_epoch, "step"),
        counted(data.total_steps, "step")
    );
    let counts = [
        data.truncated,
        data.dropped_too_long,
        data.dropped_empty,
        data.dropped_identical,
        data.dropped_weight,
    ];
    for fate in fates(counts) {
        line += &format!(", {fate}");
    }
    if data.validation_pairs > 0 {
        line += &format!(", {}", validation_text(data));
    }
    if data.start_step > 0 {
        line += &format!(", resumed after step {}", data.start_step);
    }
    line
}

fn validation_text(data: &DataReport) -> String {
    let fates: Vec<String> = fates([
        data.validation_truncated,
        data.validation_dropped_too_long,
        data.validation_dropped_empty,
        data.validation_dropped_identical,
        data.validation_dropped_weight,
    ])
    .collect();
    let pairs = counted(data.validation_pairs, "validation pair");
    if fates.is_empty() { pairs } else { format!("{pairs} ({})", fates.join(", ")) }
}

/// Text for each non-zero count of truncated or dropped pairs.
fn fates(counts: [u64; 5]) -> impl Iterator<Item = String> {
    let words = [
        "cut at max_seq_length",
        "dropped: prompt fills max_seq_length",
        "dropped: nothing to train on",
        "dropped: both sides the same tokens",
        "dropped: weight 0",
    ];
    let counted = counts.into_iter().zip(words).filter(|(count, _)| *count > 0);
    counted.map(|(count, what)| format!("{count} {what}"))
}

/// Metrics of a step as text: the loss, then the method's other metrics.
pub(crate) fn step_line(values: &HashMap<String, f64>) -> String {
    let shown = [
        (metric::LOSS, "loss", 4),
        (metric::REWARDS_ACCURACIES, "accuracy", 2),
        (metric::REWARDS_MARGINS, "margin", 3),
        (metric::KL, "kl", 4),
        (metric::PAIRS_PER_SECOND, "pairs/s", 1),
    ];
    list(values, "", &shown)
}

fn evaluation_line(values: &HashMap<String, f64>) -> String {
    let shown = [
        (metric::LOSS, "loss", 4),
        (metric::REWARDS_ACCURACIES, "accuracy", 3),
        (metric::REWARDS_MARGINS, "margin", 3),
        (metric::KL, "kl", 4),
    ];
    list(values, metric::EVAL, &shown)
}

fn list(values: &HashMap<String, f64>, prefix: &str, shown: &[(&str, &str, usize)]) -> String {
    let parts = shown.iter().filter_map(|(key, label, digits)| {
        values.get(&format!("{prefix}{key}")).map(|value| format!("{label} {value:.digits$}"))
    });
    parts.collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_pairs_are_never_silent() {
        let data = DataReport {
            pairs: 7,
            total_steps: 4,
            steps_per_epoch: 2,
            dropped_too_long: 3,
            ..Default::default()
        };
        let line = data_line(&data);
        assert!(
            line.contains("7 pairs") && line.contains("3 dropped: prompt fills max_seq_length"),
            "{line}"
        );
        assert!(!line.contains("cut at"));
        let data = DataReport {
            dropped_identical: 2,
            validation_pairs: 9,
            validation_truncated: 4,
            validation_dropped_identical: 1,
            ..data
        };
        let line = data_line(&data);
        assert!(
            line.contains(
                "2 dropped: both sides the same tokens, 9 validation pairs (4 cut at max_seq_length, 1 dropped: both sides"
            ),
            "{line}"
        );
    }

    #[test]
    fn words_agree_with_the_numbers_before_them() {
        let data = DataReport {
            pairs: 1,
            total_steps: 1,
            steps_per_epoch: 1,
            validation_pairs: 1,
            ..Default::default()
        };
        assert_eq!(data_line(&data), "data     1 pair, 1 step per epoch, 1 step, 1 validation pair");
    }

    #[test]
    fn a_supervised_step_shows_no_rewards() {
        let values = HashMap::from([("loss".to_owned(), 1.5), ("pairs_per_second".to_owned(), 20.0)]);
        assert_eq!(step_line(&values), "loss 1.5000  pairs/s 20.0");
    }
}
