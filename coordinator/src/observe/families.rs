//! The metrics by group: names, help texts and kinds.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

use crate::metrics::Row;

/// Label names and values.
pub(super) type Labels = Vec<(&'static str, String)>;
/// A gauge by labels; nothing is shown before it is set.
pub(super) type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
/// Seconds that add up, by labels.
pub(super) type Seconds = Family<Labels, Counter<f64, AtomicU64>>;

/// Key of a row, name of its metric, what it says.
type Named = (&'static str, &'static str, &'static str);

/// Metrics of the step rows.
pub(super) const STEP_ROWS: [Named; 12] = [
    ("loss", "loss", "Loss of the last step"),
    (
        "rewards/accuracies",
        "reward_accuracy_ratio",
        "Share of pairs whose chosen answer has the higher reward",
    ),
    ("rewards/margins", "reward_margin", "Mean reward of chosen minus rejected answers"),
    ("rewards/chosen", "reward_chosen", "Mean reward of chosen answers"),
    ("rewards/rejected", "reward_rejected", "Mean reward of rejected answers"),
    ("logps/chosen", "logps_chosen", "Mean log-probability of chosen answers under the policy, nats"),
    ("logps/rejected", "logps_rejected", "Mean log-probability of rejected answers under the policy, nats"),
    ("kl", "kl_nats", "KL divergence of policy and reference per completion token"),
    ("grad_norm", "gradient_norm", "Global gradient norm before clipping"),
    ("learning_rate", "learning_rate", "Learning rate of the last step"),
    ("epoch", "epoch", "Passes over the training data"),
    ("step", "step", "Last optimizer step that is done"),
];

/// Metrics of the evaluation rows.
pub(super) const EVALUATION_ROWS: [Named; 6] = [
    ("eval_loss", "eval_loss", "Loss of the last evaluation"),
    (
        "eval_rewards/accuracies",
        "eval_reward_accuracy_ratio",
        "As reward_accuracy_ratio, of the last evaluation",
    ),
    ("eval_rewards/margins", "eval_reward_margin", "As reward_margin, of the last evaluation"),
    ("eval_logps/chosen", "eval_logps_chosen", "As logps_chosen, of the last evaluation"),
    ("eval_logps/rejected", "eval_logps_rejected", "As logps_rejected, of the last evaluation"),
    ("eval_kl", "eval_kl_nats", "As kl_nats, of the last evaluation"),
];

fn added<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// From 10 ms to 3 hours.
fn durations() -> impl Iterator<Item = f64> {
    exponential_buckets(0.01, 2.0, 21)
}

/// From 0.1 ms to 8 minutes: phases of small models are short.
fn phase_durations() -> Histogram {
    Histogram::new(exponential_buckets(1e-4, 3.0, 15))
}

/// What the metrics files say.
pub(super) struct Rows(HashMap<&'static str, Gauges>);

impl Rows {
    pub(super) fn new(r: &mut Registry) -> Self {
        let all = STEP_ROWS.into_iter().chain(EVALUATION_ROWS);
        Self(all.map(|(key, name, help)| (key, added(r, name, help, Gauges::default()))).collect())
    }

    /// Shows those values of a row that it has.
    pub(super) fn set(&self, names: &[Named], row: &Row) {
        for (key, _, _) in names {
            if let (Some(gauges), Some(value)) = (self.0.get(key), row.get(key)) {
                gauges.get_or_create(&Labels::new()).set(value);
            }
        }
    }
}

/// How far, how fast.
pub(super) struct Pace {
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

impl Pace {
    pub(super) fn new(r: &mut Registry) -> Self {
        let utilisation = "Model FLOPs utilisation of the last step, where the peak of every device is known";
        let step = HistogramWithExemplars::new(durations());
        Self {
            planned_steps: added(r, "planned_steps", "Optimizer steps of the whole run", Gauge::default()),
            steps: added(r, "steps", "Optimizer steps done by this coordinator", Counter::default()),
            tokens: added(
                r,
                "tokens",
                "Tokens trained on, prompts counted for each answer",
                Counter::default(),
            ),
            pairs: added(r, "pairs", "Preference pairs trained on", Counter::default()),
            flops: added(r, "model_flops", "Operations that the model asked for", Counter::default()),
            utilisation: added(r, "model_flops_utilization_ratio", utilisation, Gauges::default()),
            step_duration: added(r, "step_duration_seconds", "Optimizer steps, slowest rank", step),
            last_step: added(
                r,
                "last_step_timestamp_seconds",
                "When the last step was done",
                Gauges::default(),
            ),
            evaluations: added(r, "evaluations", "Evaluations done", Counter::default()),
        }
    }
}

/// Rank by rank.
pub(super) struct Ranks {
    pub(super) phases: Family<Labels, Histogram, fn() -> Histogram>,
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
        let phases = Family::new_with_constructor(phase_durations as fn() -> Histogram);
        let wait = "Time that a rank has waited for other ranks' gradients; the straggler waits least";
        let busy = "Time that a rank has spent in steps without waiting for others";
        let memory = "Most memory that a rank has held: of its GPU, or resident on the host";
        let generation = "Generation of the communicator; grows when the membership changes";
        Self {
            phases: added(r, "phase_duration_seconds", "Phases of a step, every rank", phases),
            collective_wait: added(r, "collective_wait_seconds", wait, Seconds::default()),
            data_wait: added(
                r,
                "data_wait_seconds",
                "Time that a rank has waited for its pairs",
                Seconds::default(),
            ),
            busy: added(r, "busy_seconds", busy, Seconds::default()),
            memory: added(r, "peak_memory_bytes", memory, Gauges::default()),
            heartbeat_age: added(
                r,
                "heartbeat_age_seconds",
                "Time since a rank was last heard of",
                Gauges::default(),
            ),
            trainers: added(r, "trainers", "Trainers that take part right now", Gauge::default()),
            world_size: added(r, "world_size", "Trainers that the run is meant to have", Gauge::default()),
            generation: added(r, "generation", generation, Gauge::default()),
        }
    }
}

/// What broke, and what would be lost.
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
            failures: added(r, "failures", "Failures of the run by reason", Family::default()),
            checkpoints: added(r, "checkpoints", "Checkpoints written", Counter::default()),
            checkpoint_duration: added(r, "checkpoint_duration_seconds", "Writing of a checkpoint", duration),
            last_checkpoint: added(r, last, "When the last checkpoint was complete", Gauges::default()),
            checkpoint_due: added(
                r,
                due,
                "Since when a checkpoint is waited for; 0 if none is",
                Gauge::default(),
            ),
        }
    }
}
