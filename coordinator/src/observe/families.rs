//! The metrics by group: names, help texts and types.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

use dyad_proto::names::metric;
use dyad_proto::plain;
use dyad_proto::wire::ErrorCode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

use crate::run::metrics_row::MetricsRow;

/// Escapes a label value for OpenMetrics, because the encoder does not. Control characters are shown as text.
pub(super) fn label(value: &str) -> String {
    let lines = value.split('\n').map(|line| plain::line(line).replace('\\', "\\\\").replace('"', "\\\""));
    lines.collect::<Vec<_>>().join("\\n")
}

/// Label names and values.
pub(super) type Labels = Vec<(&'static str, String)>;
/// Gauges by labels; a gauge is shown once it is set.
pub(super) type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
/// Counters of seconds by labels.
pub(super) type Seconds = Family<Labels, Counter<f64, AtomicU64>>;

/// Key of a row, name of its metric, help text.
type Named = (&'static str, &'static str, &'static str);

/// Metrics of steps and evaluations; those of evaluations have the prefix `eval_`.
const BOTH: [Named; 15] = [
    (metric::LOSS, "loss", "Loss of the last step"),
    (
        metric::REWARDS_ACCURACIES,
        "reward_accuracy_ratio",
        "Share of pairs whose chosen answer has the higher reward",
    ),
    (metric::REWARDS_MARGINS, "reward_margin", "Mean reward of chosen minus rejected answers"),
    (metric::REWARDS_CHOSEN, "reward_chosen", "Mean reward of chosen answers"),
    (metric::REWARDS_REJECTED, "reward_rejected", "Mean reward of rejected answers"),
    (metric::LOGPS_CHOSEN, "logps_chosen", "Mean log-probability of chosen answers under the policy, nats"),
    (
        metric::LOGPS_REJECTED,
        "logps_rejected",
        "Mean log-probability of rejected answers under the policy, nats",
    ),
    (metric::KL, "kl_nats", "KL divergence of policy and reference per completion token"),
    (
        metric::KL_CHOSEN,
        "kl_chosen_nats",
        "KL divergence of policy and reference per token of chosen answers",
    ),
    (
        metric::KL_REJECTED,
        "kl_rejected_nats",
        "KL divergence of policy and reference per token of rejected answers",
    ),
    (
        metric::LOGITS_CHOSEN,
        "logits_chosen",
        "Mean logit over the tokens of chosen answers and the vocabulary",
    ),
    (
        metric::LOGITS_REJECTED,
        "logits_rejected",
        "Mean logit over the tokens of rejected answers and the vocabulary",
    ),
    (metric::ENTROPY, "entropy_nats", "Entropy of the policy's distribution per completion token"),
    (
        metric::MEAN_TOKEN_ACCURACY,
        "mean_token_accuracy_ratio",
        "Share of the tokens of chosen answers that are the policy's most likely ones",
    ),
    (
        metric::NLL_LOSS,
        "nll_loss",
        "Negative log-likelihood of chosen answers per token, where it is a term of the loss",
    ),
];

/// Metrics of evaluations with early stopping.
const EARLY_STOPPING: [Named; 3] = [
    (metric::BEST_METRIC, "eval_best_metric", "Best value so far of the metric that early stopping compares"),
    (metric::BEST_STEP, "eval_best_step", "Optimizer step of the best evaluation so far"),
    (
        metric::PATIENCE_COUNTER,
        "eval_patience_counter",
        "Evaluations in a row without an improvement; early_stopping_patience of them stop the run",
    ),
];

/// Metrics of steps only.
const STEPS_ALONE: [Named; 4] = [
    (metric::GRAD_NORM, "gradient_norm", "Global gradient norm before clipping"),
    (metric::LEARNING_RATE, "learning_rate", "Learning rate of the last step"),
    (metric::EPOCH, "epoch", "Passes over the training data"),
    (metric::STEP, "step", "Last optimizer step that is done"),
];

pub(super) fn added<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    given(registry, name, help, M::default())
}

/// Registers a metric that has no default, such as a histogram with its buckets.
fn given<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// From 10 ms to 3 hours.
fn durations() -> impl Iterator<Item = f64> {
    exponential_buckets(0.01, 2.0, 21)
}

/// The keys of one metrics file, each with its gauge.
pub(super) struct MetricGauges(Vec<(String, Gauges)>);

impl MetricGauges {
    pub(super) fn of_steps(r: &mut Registry) -> Self {
        let all = BOTH.into_iter().chain(STEPS_ALONE);
        Self(all.map(|(key, name, help)| (key.to_owned(), added(r, name, help))).collect())
    }

    pub(super) fn of_evaluations(r: &mut Registry) -> Self {
        let gauges = |(key, name, _): Named| {
            let help = format!("As {name}, of the last evaluation");
            (format!("{}{key}", metric::EVAL), added(r, &format!("eval_{name}"), &help))
        };
        let mut all: Vec<_> = BOTH.map(gauges).into();
        all.extend(EARLY_STOPPING.map(|(key, name, help)| (key.to_owned(), added(r, name, help))));
        Self(all)
    }

    /// Sets the gauges whose keys the row has.
    pub(super) fn set(&self, row: &MetricsRow) {
        for (key, gauges) in &self.0 {
            if let Some(value) = row.get(key) {
                gauges.get_or_create(&Labels::new()).set(value);
            }
        }
    }
}

/// The states of a run, one at a time.
const STATES: [&str; 4] = ["running", "complete", "stopped", "failed"];

/// The state of the run. `done` and `failed` lack the label `run`, because alerts ask for the last state at an address, of any run.
pub(super) struct Life {
    pub(super) done: Gauge,
    failed: Gauge,
    states: Family<Labels, Gauge>,
    pub(super) early_stopped: Gauges,
    pub(super) last_progress: Gauges,
}

impl Life {
    /// Registers the metrics; also returns the registry whose metrics carry the label `run`.
    pub(super) fn new(process: &mut Registry, run: String) -> (Self, &mut Registry) {
        let done = "1 once the run has ended, with or without success, and its coordinator is about to exit";
        let failed = "1 once the run has failed; a stop on request is no failure";
        let (done, failed) =
            (added(process, "coordinator_done", done), added(process, "coordinator_failed", failed));
        let r = process.sub_registry_with_label(("run".into(), run.into()));
        let states = added(r, "run_state", "1 for the run's state: running, complete, stopped or failed");
        let last = "When a rank last made progress with any work";
        let last_progress = added(r, "last_progress_timestamp_seconds", last);
        let early = "1 once evaluations no longer improve and the run stops before its last step";
        let early_stopped = added(r, "early_stopped", early);
        let life = Self { done, failed, states, early_stopped, last_progress };
        life.enter(STATES[0]);
        (life, r)
    }

    fn enter(&self, now: &str) {
        for state in STATES {
            let shown = self.states.get_or_create_owned(&vec![("state", state.to_owned())]);
            shown.set(i64::from(state == now));
        }
    }

    /// Sets the metrics of a run that has ended.
    pub(super) fn end(&self, failure: Option<ErrorCode>) {
        let (state, failed) = match failure {
            None => (STATES[1], false),
            Some(ErrorCode::Interrupted) => (STATES[2], false),
            Some(_) => (STATES[3], true),
        };
        self.enter(state);
        self.failed.set(failed.into());
        // Last, so that a scrape with done = 1 has all other final values.
        self.done.set(1);
    }
}

/// Progress and speed.
pub(super) struct ProgressGauges {
    pub(super) planned_steps: Gauge<f64, AtomicU64>,
    pub(super) steps: Counter,
    pub(super) tokens: Counter,
    pub(super) pairs: Counter,
    pub(super) flops: Counter<f64, AtomicU64>,
    pub(super) utilisation: Gauges,
    pub(super) step_duration: HistogramWithExemplars<Labels>,
    pub(super) last_step: Gauges,
    pub(super) evaluations: Counter,
}

impl ProgressGauges {
    pub(super) fn new(r: &mut Registry) -> Self {
        let utilisation = "Model FLOPs utilisation of the last step, where the peak of every device is known";
        let step = HistogramWithExemplars::new(durations());
        Self {
            planned_steps: added(r, "planned_steps", "Optimizer steps of the whole run"),
            steps: added(r, "steps", "Optimizer steps done by this coordinator"),
            tokens: added(r, "tokens", "Tokens trained on, prompts counted for each answer"),
            pairs: added(r, "pairs", "Preference pairs trained on"),
            flops: added(r, "model_flops", "Floating-point operations that the model needs"),
            utilisation: added(r, "model_flops_utilization_ratio", utilisation),
            step_duration: given(r, "step_duration_seconds", "Optimizer steps, slowest rank", step),
            last_step: added(r, "last_step_timestamp_seconds", "When the last step was done"),
            evaluations: added(r, "evaluations", "Evaluations done"),
        }
    }
}

/// Most distinct phases, and longest name of a phase in bytes; trainers have nine phases.
const PHASES: (usize, usize) = (32, 64);

/// Durations of the phases of a step. Their names come from the trainers, so their number and length are bounded here.
pub(super) struct PhaseMetrics {
    family: Family<Labels, Histogram, fn() -> Histogram>,
    known: Mutex<HashMap<String, Histogram>>,
}

impl PhaseMetrics {
    fn new(r: &mut Registry) -> Self {
        // From 0.1 ms to 8 minutes: phases of small models are short.
        let durations: fn() -> Histogram = || Histogram::new(exponential_buckets(1e-4, 3.0, 15));
        let family = Family::new_with_constructor(durations);
        let family = given(r, "phase_duration_seconds", "Phases of a step, every rank", family);
        Self { family, known: Mutex::default() }
    }

    /// Records a duration; ignores a name that is too long or one too many.
    pub(super) fn observe(&self, phase: &str, seconds: f64) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(histogram) = known.get(phase) {
            return histogram.observe(seconds);
        }
        let (most, longest) = PHASES;
        if known.len() < most && phase.len() <= longest {
            let histogram = self.family.get_or_create_owned(&vec![("phase", label(phase))]);
            histogram.observe(seconds);
            known.insert(phase.to_owned(), histogram);
        }
    }
}

/// Metrics by rank, and of the communicator.
pub(super) struct Ranks {
    pub(super) phases: PhaseMetrics,
    pub(super) collective_wait: Seconds,
    pub(super) data_wait: Seconds,
    pub(super) busy: Seconds,
    pub(super) memory: Gauges,
    pub(super) heartbeat_age: Gauges,
    pub(super) trainers: Gauge,
    pub(super) world_size: Gauge,
    pub(super) generation: Gauge,
}

impl Ranks {
    pub(super) fn new(r: &mut Registry) -> Self {
        let wait = "Time that a rank has waited for other ranks' gradients; the straggler waits least";
        let busy = "Time that a rank has spent in steps without waiting for others";
        let memory = "Peak memory of a rank: of its GPU, or resident on the host";
        let generation = "Generation of the communicator";
        Self {
            phases: PhaseMetrics::new(r),
            collective_wait: added(r, "collective_wait_seconds", wait),
            data_wait: added(r, "data_wait_seconds", "Time that a rank has waited for its pairs"),
            busy: added(r, "busy_seconds", busy),
            memory: added(r, "peak_memory_bytes", memory),
            heartbeat_age: added(r, "heartbeat_age_seconds", "Time since a rank was last heard of"),
            trainers: added(r, "trainers", "Trainers that take part now"),
            world_size: added(r, "world_size", "Trainers that the run needs"),
            generation: added(r, "generation", generation),
        }
    }
}

/// Failures and checkpoints.
pub(super) struct Safety {
    pub(super) failures: Family<Labels, Counter>,
    pub(super) checkpoints: Counter,
    pub(super) checkpoint_duration: Histogram,
    pub(super) last_checkpoint: Gauges,
    pub(super) checkpoint_due: Gauge<f64, AtomicU64>,
}

impl Safety {
    pub(super) fn new(r: &mut Registry) -> Self {
        let (last, due) = ("last_checkpoint_timestamp_seconds", "checkpoint_due_timestamp_seconds");
        let duration = Histogram::new(durations());
        Self {
            failures: added(r, "failures", "Failures of the run by reason"),
            checkpoints: added(r, "checkpoints", "Checkpoints written"),
            checkpoint_duration: given(r, "checkpoint_duration_seconds", "Writing of a checkpoint", duration),
            last_checkpoint: added(r, last, "When the last checkpoint was complete"),
            checkpoint_due: added(r, due, "When the pending checkpoint became due; 0 if none is pending"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against a trainer of another build, or a malicious one.
    #[test]
    fn new_phase_names_without_end_do_not_fill_memory() {
        let mut registry = Registry::default();
        let phases = PhaseMetrics::new(&mut registry);
        phases.observe(&"x".repeat(PHASES.1 + 1), 1.0);
        for index in 0..1000 {
            phases.observe(&format!("phase{index}"), 1.0);
            phases.observe("phase0", 1.0);
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert_eq!(text.matches("phase_duration_seconds_count{").count(), PHASES.0);
        assert!(text.contains("phase_duration_seconds_count{phase=\"phase0\"} 1001\n"), "{text}");
        assert!(!text.contains("xxx"));
    }
}
