//! Metrics of the run for Prometheus: base units, names with the prefix `dyad_`, few labels.
//!
//! - CRD-M1: the number of label values does not grow with the length of a run. `run` has one value, `rank` and `gpu` have one per rank;
//!   `phase` is bounded by [`PhaseMetrics`](super::families::PhaseMetrics) whatever trainers report; `reason` and `state` are closed sets.
//! - CRD-M2: gauges show NaN and infinity as they are; sums never add them, because a sum would stay NaN.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dyad_proto::RunConfig;
use dyad_proto::names::{metric, phase};
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{
    CheckpointReport, DataReport, ErrorCode, Failure, Heartbeat, ModelReport, RunEnded, StepReport,
};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::families::{Labels, Life, MetricGauges, ProgressGauges, Ranks, Safety, label};
use super::gpus::GpuMetrics;
use crate::run::metrics_row::MetricsRow;

/// Why runs fail: the closed set of error codes.
const REASONS: [(ErrorCode, &str); 4] = [
    (ErrorCode::InvalidInput, "invalid_input"),
    (ErrorCode::Unavailable, "unavailable"),
    (ErrorCode::Failed, "failed"),
    (ErrorCode::Interrupted, "interrupted"),
];

/// All metrics of one run.
pub struct Metrics {
    registry: Registry,
    steps: MetricGauges,
    evaluations: MetricGauges,
    pace: ProgressGauges,
    ranks: Ranks,
    safety: Safety,
    life: Life,
    gpus: GpuMetrics,
    state: Mutex<MetricSources>,
}

/// State from which metrics are derived.
#[derive(Debug, Default)]
struct MetricSources {
    heard: HashMap<u32, Instant>,
    /// The progress counter of each rank's last heartbeat.
    work: HashMap<u32, u64>,
    peak_flops: HashMap<u32, f64>,
    /// Steps after which a checkpoint follows.
    checkpoints: Vec<u64>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn rank_label(rank: u32) -> Labels {
    vec![("rank", rank.to_string())]
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Metrics {
    /// The metrics of a run that has just begun.
    #[must_use]
    pub fn new(run_id: &str, config: &RunConfig, world_size: u32) -> Self {
        let mut registry = Registry::with_prefix("dyad");
        let (life, r) = Life::new(&mut registry, label(run_id));
        let folder = std::path::absolute(&config.output_dir);
        let folder = folder.map_or_else(|_| config.output_dir.clone(), |dir| dir.display().to_string());
        let host = dyad_proto::files::of_kernel("/proc/sys/kernel/hostname").unwrap_or_default();
        let info: Labels = vec![
            ("training_method", format!("{:?}", config.training_method).to_lowercase()),
            ("model", label(&config.model)),
            ("host", label(host.trim())),
            ("output_dir", label(&folder)),
        ];
        r.register("run", "The run and its output folder", Info::new(info));
        let (steps, evaluations) = (MetricGauges::of_steps(r), MetricGauges::of_evaluations(r));
        let (pace, ranks, safety) = (ProgressGauges::new(r), Ranks::new(r), Safety::new(r));
        let gpus = GpuMetrics::new(r);
        ranks.world_size.set(i64::from(world_size));
        for (_, reason) in REASONS {
            // The rate of a failure that never happened must be 0, not absent.
            let _ = safety.failures.get_or_create(&vec![("reason", reason.to_owned())]);
        }
        Self { registry, steps, evaluations, pace, ranks, safety, life, gpus, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, MetricSources> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let now = Instant::now();
        for (&rank, heard) in &self.state().heard {
            self.ranks.heartbeat_age.get_or_create(&rank_label(rank)).set((now - *heard).as_secs_f64());
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Records that a rank has its place in a generation.
    pub fn placed(&self, rank: u32, generation: u64, now: Instant) {
        self.ranks.generation.set(generation as i64);
        let mut state = self.state();
        state.heard.insert(rank, now);
        self.ranks.trainers.set(state.heard.len() as i64);
    }

    /// Records a sign of life of a rank.
    pub fn heard(&self, rank: u32, now: Instant) {
        self.state().heard.insert(rank, now);
    }

    /// Records a rank's heartbeat: its progress and its GPU's reading.
    pub fn beat(&self, rank: u32, beat: &Heartbeat) {
        if let Some(progress) = &beat.progress {
            let work = progress.marks.wrapping_add(progress.fed);
            if self.state().work.insert(rank, work) != Some(work) {
                self.life.last_progress.get_or_create(&Labels::new()).set(unix(SystemTime::now()));
            }
        }
        self.gpus.show(rank, beat.gpu.as_ref());
    }

    /// Removes a rank whose stream has ended.
    pub fn left(&self, rank: u32) {
        self.gpus.show(rank, None);
        let mut state = self.state();
        state.heard.remove(&rank);
        state.work.remove(&rank);
        self.ranks.trainers.set(state.heard.len() as i64);
        // Under the lock, so that a concurrent scrape does not create the gauge again.
        self.ranks.heartbeat_age.remove(&rank_label(rank));
    }

    /// Records the peak speed of a rank's device (operations per second), from its model report.
    pub fn model(&self, rank: u32, report: &ModelReport) {
        if report.peak_flops.is_finite() && report.peak_flops > 0.0 {
            self.state().peak_flops.insert(rank, report.peak_flops);
        }
    }

    /// Records an event for the watchers.
    pub fn happens(&self, happening: &EventBody) {
        match happening {
            EventBody::Data(data) => self.planned(data),
            EventBody::Checkpoint(report) => self.checkpoint(report),
            EventBody::EarlyStopping(stopping) => {
                let stops = f64::from(u8::from(stopping.stops));
                self.life.early_stopped.get_or_create(&Labels::new()).set(stops);
                if stopping.stops {
                    // No further step is planned: otherwise alerts would wait for it.
                    self.pace.planned_steps.set(stopping.step as f64);
                }
            }
            EventBody::Ended(RunEnded { failure }) => {
                if let Some(failure) = failure {
                    self.failed(failure);
                }
                self.life.end(failure.as_ref().map(Failure::code));
            }
            _ => {}
        }
    }

    /// Whether the metrics show that the run has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.life.done.get() == 1
    }

    fn planned(&self, data: &DataReport) {
        self.pace.planned_steps.set(data.total_steps as f64);
    }

    /// Records that a checkpoint will follow a step.
    pub fn checkpoint_follows(&self, step: u64) {
        let mut state = self.state();
        if !state.checkpoints.contains(&step) {
            state.checkpoints.push(step);
        }
    }

    /// Records a step that all ranks have done.
    pub fn step(&self, step: u64, row: &MetricsRow, reports: &[StepReport], trace_id: Option<&str>) {
        let now = SystemTime::now();
        self.steps.set(row);
        self.pace.steps.inc();
        for sums in reports.iter().filter_map(|report| report.sums.as_ref()) {
            self.pace.tokens.inc_by(sums.tokens);
            self.pace.pairs.inc_by(sums.pairs);
        }
        self.pace.last_step.get_or_create(&Labels::new()).set(unix(now));
        if let Some(seconds) = row.get(metric::STEP_SECONDS).filter(|seconds| seconds.is_finite()) {
            let exemplar = trace_id.map(|id| vec![("trace_id", label(id))]);
            self.pace.step_duration.observe(seconds, exemplar, Some(now));
            self.utilise(seconds, reports);
        }
        for (rank, report) in reports.iter().enumerate() {
            self.rank(rank as u32, report);
        }
        if self.state().checkpoints.contains(&step) && self.safety.checkpoint_due.get() == 0.0 {
            self.safety.checkpoint_due.set(unix(now));
        }
    }

    fn utilise(&self, seconds: f64, reports: &[StepReport]) {
        let flops: f64 = reports.iter().map(|report| report.flops).filter(|flops| *flops > 0.0).sum();
        if flops.is_finite() {
            self.pace.flops.inc_by(flops);
        }
        let state = self.state();
        // Only if every rank's peak is known: a ratio over some of the devices would be wrong.
        if state.peak_flops.len() == reports.len() && seconds > 0.0 {
            let peak: f64 = state.peak_flops.values().sum();
            self.pace.utilisation.get_or_create(&Labels::new()).set(flops / seconds / peak);
        }
    }

    fn rank(&self, rank: u32, report: &StepReport) {
        let label = rank_label(rank);
        for (phase, &seconds) in report.phase_seconds.iter().filter(|(_, seconds)| is_time(**seconds)) {
            self.ranks.phases.observe(phase, seconds);
        }
        let spent =
            |name| report.phase_seconds.get(name).copied().filter(|seconds| is_time(*seconds)).unwrap_or(0.0);
        self.ranks.collective_wait.get_or_create(&label).inc_by(spent(phase::ALL_REDUCE_WAIT));
        self.ranks.data_wait.get_or_create(&label).inc_by(spent(phase::FETCH));
        let busy = report.step_seconds - spent(phase::ALL_REDUCE_WAIT);
        self.ranks.busy.get_or_create(&label).inc_by(if is_time(busy) { busy } else { 0.0 });
        self.ranks.memory.get_or_create(&label).set(report.peak_memory_bytes as f64);
    }

    /// Records an evaluation that all ranks have done.
    pub fn evaluation(&self, row: &MetricsRow) {
        self.evaluations.set(row);
        self.pace.evaluations.inc();
    }

    fn checkpoint(&self, report: &CheckpointReport) {
        self.safety.checkpoints.inc();
        if is_time(report.seconds) {
            self.safety.checkpoint_duration.observe(report.seconds);
        }
        self.safety.last_checkpoint.get_or_create(&Labels::new()).set(unix(SystemTime::now()));
        self.safety.checkpoint_due.set(0.0);
        self.state().checkpoints.retain(|step| *step > report.step);
    }

    fn failed(&self, failure: &Failure) {
        let reason =
            REASONS.iter().find(|(code, _)| *code == failure.code()).map_or("failed", |(_, name)| name);
        self.safety.failures.get_or_create(&vec![("reason", reason.to_owned())]).inc();
    }
}

/// Whether a trainer's value is a valid duration in seconds: not NaN, not negative, finite.
fn is_time(seconds: f64) -> bool {
    (0.0..Duration::MAX.as_secs_f64()).contains(&seconds)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use dyad_proto::run_config::{LossType, Objective};
    use dyad_proto::wire::{EvaluationReport, PreferenceSums};

    use super::*;
    use crate::run::metrics_row::{StepContext, evaluation_row, step_row};

    fn metrics() -> Metrics {
        let config = r#"{"model":"m","training_file":"f","output_dir":"o"}"#;
        Metrics::new("run-1", &RunConfig::from_json(config).unwrap(), 2)
    }

    fn step(metrics: &Metrics, loss: f64, trace: Option<&str>) {
        let report = |rank: u32| StepReport {
            step: 1,
            sums: Some(PreferenceSums { pairs: 4, loss, tokens: 100, ..PreferenceSums::default() }),
            step_seconds: 0.5,
            flops: 1e9,
            peak_memory_bytes: 1 << 20,
            phase_seconds: HashMap::from([
                ("all_reduce_wait".to_owned(), 0.1 * f64::from(rank)),
                ("fetch".to_owned(), 0.25),
            ]),
            ..StepReport::default()
        };
        let reports = [report(0), report(1)];
        let context =
            StepContext { objective: Objective::of_loss(LossType::Sigmoid), epoch: 0.5, tokens_before: 0 };
        metrics.step(1, &step_row(&reports, context), &reports, trace);
    }

    /// The value of the metric with this name and these labels, without the label `run`.
    fn value(metrics: &Metrics, name: &str) -> String {
        let text = metrics.encode().unwrap().replace("run=\"run-1\",", "").replace("run=\"run-1\"", "");
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
    }

    #[test]
    fn run_state_and_end_metrics_follow_the_outcome() {
        let states = |metrics: &Metrics| {
            let state = |name| value(metrics, &format!("dyad_run_state{{state=\"{name}\"}}"));
            ["running", "complete", "stopped", "failed"].map(state).join(" ")
        };
        let failure = |code: ErrorCode| Some(Failure { code: code.into(), ..Failure::default() });
        for (failure, after) in [
            (None, "0 1 0 0"),
            (failure(ErrorCode::Interrupted), "0 0 1 0"),
            (failure(ErrorCode::Unavailable), "0 0 0 1"),
        ] {
            let metrics = metrics();
            let shown =
                || ["done", "failed"].map(|name| value(&metrics, &format!("dyad_coordinator_{name}")));
            assert_eq!((states(&metrics), shown()), ("1 0 0 0".into(), ["0", "0"].map(str::to_owned)));
            assert!(!metrics.has_ended());
            metrics.happens(&EventBody::Ended(RunEnded { failure }));
            let failed = after.rsplit(' ').next().unwrap();
            assert_eq!((states(&metrics), shown()), (after.into(), ["1", failed].map(str::to_owned)));
            assert!(metrics.has_ended());
        }
    }

    /// Progress in loading, evaluating and saving counts as well.
    #[test]
    fn last_progress_changes_with_work_and_not_with_heartbeats() {
        use dyad_proto::wire::Progress;
        let metrics = metrics();
        let name = "dyad_last_progress_timestamp_seconds";
        assert!(!metrics.encode().unwrap().contains(&format!("{name}{{")));
        let beat = |marks, fed| {
            let progress = Some(Progress { marks, fed, ..Progress::default() });
            metrics.beat(0, &Heartbeat { progress, ..Heartbeat::default() });
            let shown: f64 = value(&metrics, &format!("{name}{{}}")).parse().unwrap();
            // Reset, so that the next change can be seen.
            metrics.life.last_progress.get_or_create(&Labels::new()).set(1.0);
            shown
        };
        assert!(beat(0, 0) > 1.0);
        assert_eq!(beat(0, 0), 1.0);
        assert!(beat(1, 0) > 1.0);
        assert!(beat(1, 1) > 1.0);
        assert_eq!(beat(1, 1), 1.0);
    }

    /// A model's path and a phase's name may contain any characters.
    #[test]
    fn labels_are_escaped() {
        let config = RunConfig { model: "m\"x\\n\n\u{1b}".to_owned(), ..RunConfig::default() };
        let metrics = Metrics::new("run-1", &config, 2);
        let report = StepReport {
            phase_seconds: HashMap::from([("a\"b\\".to_owned(), 0.1)]),
            ..StepReport::default()
        };
        metrics.rank(0, &report);
        let text = metrics.encode().unwrap();
        let model = r#"model="m\"x\\n\n\\u{1b}",host="#;
        assert!(
            text.lines().any(|line| line.starts_with("dyad_run_info{") && line.contains(model)),
            "{text}"
        );
        assert!(
            text.contains(r#"dyad_phase_duration_seconds_count{run="run-1",phase="a\"b\\"} 1"#),
            "{text}"
        );
        assert_eq!(label("m/Llama 漢 7B"), "m/Llama 漢 7B");
    }

    /// A NaN step is shown, and the next good step too.
    #[test]
    fn a_nan_loss_does_not_break_the_exporter() {
        let metrics = metrics();
        step(&metrics, f64::NAN, None);
        assert_eq!(value(&metrics, "dyad_loss{}"), "NaN");
        step(&metrics, 6.0, None);
        assert_eq!(value(&metrics, "dyad_loss{}"), "1.5");
        assert_eq!(value(&metrics, "dyad_step_duration_seconds_sum{}"), "1.0");
        assert!(metrics.encode().unwrap().ends_with("# EOF\n"));
    }

    #[test]
    fn counters_add_up_over_ranks_and_exemplars_name_the_trace() {
        let metrics = metrics();
        step(&metrics, 1.0, Some("0af7651916cd43dd8448eb211c80319c"));
        assert_eq!(value(&metrics, "dyad_tokens_total{}"), "200");
        assert_eq!(value(&metrics, "dyad_pairs_total{}"), "8");
        assert_eq!(value(&metrics, "dyad_collective_wait_seconds_total{rank=\"1\"}"), "0.1");
        assert_eq!(value(&metrics, "dyad_data_wait_seconds_total{rank=\"0\"}"), "0.25");
        assert_eq!(value(&metrics, "dyad_phase_duration_seconds_count{phase=\"fetch\"}"), "2");
        assert_eq!(value(&metrics, "dyad_failures_total{reason=\"failed\"}"), "0");
        let text = metrics.encode().unwrap();
        assert!(text.contains("# {trace_id=\"0af7651916cd43dd8448eb211c80319c\"} 0.5"), "{text}");
    }

    #[test]
    fn evaluations_and_steps_have_separate_metrics() {
        let metrics = metrics();
        step(&metrics, 1.0, None);
        let sums = PreferenceSums { pairs: 2, loss: 3.0, rewards_chosen: 1.0, ..PreferenceSums::default() };
        let report = EvaluationReport { sums: Some(sums), ..EvaluationReport::default() };
        metrics.evaluation(&evaluation_row(&[report], Objective::of_loss(LossType::Sigmoid)));
        assert_eq!(value(&metrics, "dyad_loss{}"), "0.25");
        assert_eq!(value(&metrics, "dyad_eval_loss{}"), "1.5");
        assert_eq!(value(&metrics, "dyad_eval_reward_chosen{}"), "0.5");
        assert_eq!(value(&metrics, "dyad_evaluations_total{}"), "1");
    }

    #[test]
    fn utilisation_is_shown_only_if_every_device_peak_is_known() {
        let metrics = metrics();
        let known = ModelReport { peak_flops: 4e9, ..ModelReport::default() };
        metrics.model(0, &known);
        step(&metrics, 1.0, None);
        assert!(!metrics.encode().unwrap().contains("dyad_model_flops_utilization_ratio{"));
        metrics.model(1, &known);
        step(&metrics, 1.0, None);
        // 2e9 operations in 0.5 s on 8e9 a second.
        assert_eq!(value(&metrics, "dyad_model_flops_utilization_ratio{}"), "0.5");
    }

    #[test]
    fn a_checkpoint_is_due_from_its_step_until_it_is_written() {
        let metrics = metrics();
        let due = || value(&metrics, "dyad_checkpoint_due_timestamp_seconds{}");
        metrics.checkpoint_follows(1);
        assert_eq!(due(), "0.0");
        step(&metrics, 1.0, None);
        assert_ne!(due(), "0.0");
        metrics.checkpoint(&CheckpointReport { step: 1, seconds: 2.0, ..CheckpointReport::default() });
        assert_eq!(due(), "0.0");
        step(&metrics, 1.0, None);
        assert_eq!(due(), "0.0", "the same checkpoint is not due twice");
    }
}
