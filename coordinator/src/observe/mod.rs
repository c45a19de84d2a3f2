//! Metrics for Prometheus and traces of steps. The engine passes every event and every message to [`Observer`].
//!
//! The observer decides nothing about the run. It only fills in the trace context of outgoing messages ([`Observer::sends`]).
//!
//! - [`prometheus`]: updates the metrics; `families` and `gpus` define them.
//! - [`endpoint`]: `/metrics` and `/status` over HTTP.
//! - [`traces`]: one trace per traced step.

pub mod endpoint;
mod families;
mod gpus;
pub mod prometheus;
pub mod traces;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{ErrorCode, RunEnded};
use dyad_telemetry::SpanContext;

use crate::run::membership::TrainerId;
use crate::run::schedule::Work;
use crate::run::training::Done;
use crate::run::{Event, RunSpec};

use prometheus::Metrics;
use traces::{Sampling, StepTraces};

/// The run's span, as the parent for incoming calls.
static RUN: OnceLock<SpanContext> = OnceLock::new();

/// The run's span; `None` if traces are off.
#[must_use]
pub fn run_context() -> Option<SpanContext> {
    RUN.get().cloned()
}

/// Collects metrics and traces of a run.
#[derive(Debug)]
pub struct Observer {
    /// `None` without `--metrics-listen`.
    metrics: Option<Arc<Metrics>>,
    traces: Option<StepTraces>,
    began: SystemTime,
    /// Rank of each connection.
    ranks: HashMap<TrainerId, u32>,
    /// Set once all ranks were told after which work to leave.
    drained: bool,
}

impl Observer {
    /// The observer of a run, whose span must be the current span of `tracing`.
    #[must_use]
    pub fn new(spec: &RunSpec, sampling: Sampling, with_metrics: bool) -> Self {
        let run = dyad_telemetry::context_of(&tracing::Span::current());
        if let Some(run) = &run {
            let _ = RUN.set(run.clone());
        }
        let spans = dyad_telemetry::spans();
        let traces = spans.map(|spans| StepTraces::new(spans.clone(), run, &spec.run_id, sampling));
        let metrics =
            with_metrics.then(|| Arc::new(Metrics::new(&spec.run_id, &spec.config, spec.world_size)));
        Self { metrics, traces, began: SystemTime::now(), ranks: HashMap::new(), drained: false }
    }

    /// The metrics, for the endpoint.
    #[must_use]
    pub fn metrics(&self) -> Option<Arc<Metrics>> {
        self.metrics.clone()
    }

    /// Observes an event that the engine received.
    pub fn hears(&mut self, event: &Event) {
        let Some(metrics) = &self.metrics else { return };
        match event {
            Event::Message(id, message) => {
                let Some(&rank) = self.ranks.get(id) else { return };
                metrics.heard(rank, Instant::now());
                match message {
                    Up::ModelReport(report) => metrics.model(rank, report),
                    Up::Heartbeat(beat) => metrics.beat(rank, beat),
                    _ => {}
                }
            }
            Event::Closed(id) => {
                if let Some(rank) = self.ranks.remove(id) {
                    metrics.left(rank);
                }
            }
            Event::Unreadable(..)
            | Event::Fault(_)
            | Event::Drain(_)
            | Event::References(_)
            | Event::Tick => {}
        }
    }

    /// Observes a message to a trainer, and fills in its trace context.
    pub fn sends(&mut self, id: TrainerId, message: &mut Down) {
        match message {
            Down::Welcome(welcome) => {
                welcome.traceparent =
                    run_context().map_or_else(String::new, |run| dyad_telemetry::traceparent(&run));
            }
            Down::Assignment(place) => {
                self.ranks.insert(id, place.rank);
                if let Some(metrics) = &self.metrics {
                    metrics.placed(place.rank, place.generation, Instant::now());
                }
            }
            Down::Step(step) => {
                if let Some(metrics) = self.metrics.as_ref().filter(|_| step.checkpoint) {
                    metrics.checkpoint_follows(step.step);
                }
                if let Some(traces) = &mut self.traces {
                    step.traceparent = traces.assign(step.step, SystemTime::now());
                }
            }
            Down::Drain(_) => self.drained = true,
            _ => {}
        }
    }

    /// Observes an event for the watchers.
    pub fn happens(&mut self, happening: &EventBody) {
        if let Some(metrics) = &self.metrics {
            metrics.happens(happening);
        }
        let Some(traces) = &mut self.traces else { return };
        match happening {
            EventBody::Data(_) => traces.prepared(self.began, SystemTime::now()),
            // After an orderly early end, no rank had begun the steps that are assigned and not done.
            EventBody::Ended(RunEnded { failure: Some(failure) })
                if !(self.drained && failure.code() == ErrorCode::Interrupted) =>
            {
                traces.fail(&failure.message, SystemTime::now());
            }
            _ => {}
        }
    }

    /// Observes a work that all ranks have done and whose row was written since `began`. Returns a step whose trace the ranks must keep
    /// although it was not sampled.
    pub fn done(&mut self, done: &Done, began: SystemTime) -> Option<u64> {
        let row = done.row.as_ref()?;
        match done.work {
            Work::Step(step) => {
                let verdict = self.traces.as_mut().map(|traces| traces.done(step, row, &done.reports, began));
                let verdict = verdict.unwrap_or_default();
                if let Some(metrics) = &self.metrics {
                    metrics.step(step, row, &done.reports, verdict.trace_id.as_deref());
                }
                return verdict.keep.then_some(step);
            }
            Work::Evaluation(_) => {
                if let Some(metrics) = &self.metrics {
                    metrics.evaluation(row);
                }
            }
            Work::Reference(_) => {}
        }
        None
    }
}
