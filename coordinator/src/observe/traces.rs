//! One trace per step, linked to the run's: the coordinator's spans, and the choice of the steps to export.
//!
//! Every step gets a trace context when it is assigned, so that all ranks record under the same ids. Whether it is exported is
//! decided twice: when it is assigned (the first steps, then one in `every`), and when it is done (slow steps). Ranks keep their
//! spans in memory until then, so no collector has to buffer whole traces to choose among them.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dyad_proto::names::metric;
use dyad_proto::wire::StepReport;
use dyad_telemetry::{KeyValue, SpanContext, SpanRecord, Spans, traceparent};

use crate::run::metrics_row::MetricsRow;

/// Steps that the running median is taken over.
const RECENT: usize = 64;
/// No step counts as slow before this many steps are done.
const ENOUGH: usize = 8;
/// A step is slow if it takes longer than this many times the median of the recent steps.
const SLOW: f64 = 1.5;

/// Which steps are traced.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Number of this process's first steps that are all traced.
    pub first: u64,
    /// After those, steps whose number is a multiple of this; 0 for none.
    pub every: u64,
}

impl Sampling {
    /// Why a step is traced, if that is known before it is done; `nth` counts the steps of this process from 0.
    fn reason(self, step: u64, nth: u64) -> Option<&'static str> {
        if nth < self.first {
            return Some("first");
        }
        (self.every > 0 && step.is_multiple_of(self.every)).then_some("periodic")
    }
}

/// Durations of the recent steps, in seconds.
#[derive(Debug, Default)]
struct Recent(VecDeque<f64>);

impl Recent {
    /// Whether a step is slow compared with those before it; then adds it to them.
    fn is_slow(&mut self, seconds: f64) -> bool {
        let slow = self.0.len() >= ENOUGH && seconds > SLOW * self.median();
        if self.0.len() >= RECENT {
            self.0.pop_front();
        }
        if seconds.is_finite() {
            self.0.push_back(seconds);
        }
        slow
    }

    fn median(&self) -> f64 {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::INFINITY)
    }
}

/// A step that is assigned and not done.
#[derive(Debug)]
struct OpenSpans {
    step: u64,
    context: SpanContext,
    /// The context as sent to the ranks; empty if the sampler of the environment wants no trace.
    traceparent: String,
    /// Why it is traced; `None` if that is not decided yet.
    reason: Option<&'static str>,
    /// Earliest possible start: when the step was assigned and the one before it was done.
    begun: SystemTime,
}

/// The decision on a finished step's trace.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TraceOutcome {
    /// The trace id, if the trace is exported.
    pub trace_id: Option<String>,
    /// Whether the ranks must be told to export their spans.
    pub keep: bool,
}

/// Traces of the steps of a run.
#[derive(Debug)]
pub struct StepTraces {
    spans: Spans,
    run: Option<SpanContext>,
    run_id: String,
    sampling: Sampling,
    assigned: u64,
    open: BTreeMap<u64, OpenSpans>,
    recent: Recent,
    last_done: SystemTime,
}

impl StepTraces {
    /// No step is traced yet.
    #[must_use]
    pub fn new(spans: Spans, run: Option<SpanContext>, run_id: &str, sampling: Sampling) -> Self {
        Self {
            spans,
            run,
            run_id: run_id.to_owned(),
            sampling,
            assigned: 0,
            open: BTreeMap::new(),
            recent: Recent::default(),
            last_done: UNIX_EPOCH,
        }
    }

    /// The trace context that goes out with a step: created for the first rank, and the same for all ranks.
    pub fn assign(&mut self, step: u64, now: SystemTime) -> String {
        let Self { spans, sampling, assigned, open, .. } = self;
        let open = open.entry(step).or_insert_with(|| {
            let reason = sampling.reason(step, *assigned);
            *assigned += 1;
            let context = spans.root(reason.is_some());
            let wanted = spans.allows(&context, "step");
            let traceparent = if wanted { traceparent(&context) } else { String::new() };
            OpenSpans { step, context, traceparent, reason, begun: now }
        });
        open.traceparent.clone()
    }

    /// Emits the span `prepare`: from the start until all ranks have joined and every pair is measured.
    pub fn prepared(&self, began: SystemTime, now: SystemTime) {
        let Some(run) = self.run.as_ref().filter(|run| run.is_sampled()) else { return };
        self.spans.emit(SpanRecord::new("prepare", self.spans.child(run), Some(run.clone()), began..now));
    }

    /// Ends a step that all ranks have done and whose row was written since `recording`.
    pub fn done(
        &mut self,
        step: u64,
        row: &MetricsRow,
        reports: &[StepReport],
        recording: SystemTime,
    ) -> TraceOutcome {
        let slow = self.recent.is_slow(row.get(metric::STEP_SECONDS).unwrap_or_default());
        let before = std::mem::replace(&mut self.last_done, recording);
        let Some(mut open) = self.open.remove(&step) else { return TraceOutcome::default() };
        open.begun = open.begun.max(before);
        let late = open.reason.is_none() && slow;
        let Some(reason) = open.reason.or(slow.then_some("slow")) else { return TraceOutcome::default() };
        if open.traceparent.is_empty() {
            return TraceOutcome::default();
        }
        let now = SystemTime::now();
        let context = open.context.clone();
        let writing = self.spans.child(&context);
        self.spans.emit(SpanRecord::new("aggregate", writing, Some(context.clone()), recording..now));
        let mut record = self.root(open, reason, reports, now);
        record.attributes.extend(numbers(row));
        self.spans.emit(record);
        TraceOutcome { trace_id: Some(context.trace_id().to_string()), keep: late }
    }

    /// Exports the step in progress as failed, because the run ends here.
    pub fn fail(&mut self, reason: &str, now: SystemTime) {
        let Some((_, mut open)) = self.open.pop_first() else { return };
        open.begun = open.begun.max(self.last_done);
        if !open.traceparent.is_empty() {
            let mut record = self.root(open, "failed", &[], now);
            record.error = Some(reason.to_owned());
            self.spans.emit(record);
        }
    }

    /// The root span of a step. It begins at `open.begun`, or when the first rank began the step if that is earlier.
    fn root(
        &self,
        open: OpenSpans,
        reason: &'static str,
        reports: &[StepReport],
        end: SystemTime,
    ) -> SpanRecord {
        let ranks = reports.iter().map(|report| report.started_unix_nanos).filter(|nanos| *nanos > 0).min();
        let start =
            ranks.map_or(open.begun, |nanos| open.begun.min(UNIX_EPOCH + Duration::from_nanos(nanos)));
        let step = open.step;
        let mut record = SpanRecord::new("step", open.context, None, start..end);
        record.links.extend(self.run.clone());
        record.attributes = vec![
            KeyValue::new("train.run.id", self.run_id.clone()),
            KeyValue::new("train.step", step as i64),
            KeyValue::new("train.sampled_by", reason),
        ];
        record
    }
}

/// The span's attributes from the step's row.
fn numbers(row: &MetricsRow) -> impl Iterator<Item = KeyValue> {
    const SHOWN: [(&str, &str); 8] = [
        (metric::EPOCH, "train.epoch"),
        (metric::LOSS, "train.loss"),
        (metric::GRAD_NORM, "train.grad_norm"),
        (metric::LEARNING_RATE, "train.learning_rate"),
        (metric::STEP_SECONDS, "train.step.duration"),
        (metric::REWARDS_ACCURACIES, "dpo.reward.accuracy"),
        (metric::REWARDS_MARGINS, "dpo.reward.margin"),
        (metric::KL, "dpo.kl"),
    ];
    SHOWN.into_iter().filter_map(|(key, name)| Some(KeyValue::new(name, row.get(key)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_steps_and_every_nth_step_are_traced() {
        let sampling = Sampling { first: 2, every: 10 };
        let reasons: Vec<_> = [1, 2, 3, 10, 11, 20].map(|step| sampling.reason(step, step - 1)).to_vec();
        assert_eq!(reasons, [Some("first"), Some("first"), None, Some("periodic"), None, Some("periodic")]);
        // A resumed run traces its own first steps.
        assert_eq!(sampling.reason(501, 0), Some("first"));
        assert_eq!(Sampling { first: 0, every: 0 }.reason(10, 9), None);
    }

    #[test]
    fn a_step_is_slow_compared_with_the_median_of_earlier_steps() {
        let mut recent = Recent::default();
        assert!(!(0..ENOUGH).any(|index| recent.is_slow(if index == 0 { 9.0 } else { 1.0 })));
        assert!(!recent.is_slow(1.4));
        assert!(recent.is_slow(1.6));
        // A NaN duration must not affect later steps.
        assert!(!recent.is_slow(f64::NAN));
        assert!(!recent.is_slow(1.0) && recent.is_slow(2.0));
        // If all recent steps are slow, none counts as slow.
        for _ in 0..RECENT {
            recent.is_slow(2.0);
        }
        assert!(!recent.is_slow(2.0));
    }
}
