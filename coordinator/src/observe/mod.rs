//! Metrics for Prometheus and traces of steps. The engine tells it every event and every message.
//!
//! It decides nothing about the run. It writes one thing: the trace context of a message that goes out ([`Observer::sends`]).
//!
//! - [`prometheus`]: the numbers, by Prometheus's naming rules; `families` and `gpus`: what there is of them.
//! - [`endpoint`]: `/metrics` over HTTP.
//! - [`traces`]: one trace a step, for those that are worth keeping.

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

/// The run's span, for calls that arrive from elsewhere.
static RUN: OnceLock<SpanContext> = OnceLock::new();

/// The span that all of the run belongs to; none where traces are off.
#[must_use]
pub fn run_context() -> Option<SpanContext> {
    RUN.get().cloned()
}

/// Everything that is told to the outside.
#[derive(Debug)]
pub struct Observer {
    /// Absent where nobody asks for them.
    metrics: Option<Arc<Metrics>>,
    traces: Option<StepTraces>,
    began: SystemTime,
    /// Ranks of connections.
    ranks: HashMap<TrainerId, u32>,
    /// All ranks were told after which work to leave.
    drained: bool,
}

impl Observer {
    /// Of a run. The current span of `tracing` is the run's.
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

    /// The numbers, for the endpoint.
    #[must_use]
    pub fn metrics(&self) -> Option<Arc<Metrics>> {
        self.metrics.clone()
    }

    /// Something reached the engine.
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

    /// Something goes out to a trainer; trace contexts are put in on the way.
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

    /// Something was told to the watchers.
    pub fn happens(&mut self, happening: &EventBody) {
        if let Some(metrics) = &self.metrics {
            metrics.happens(happening);
        }
        let Some(traces) = &mut self.traces else { return };
        match happening {
            EventBody::Data(_) => traces.prepared(self.began, SystemTime::now()),
            // Of an end in order, what is assigned and not done was never begun.
            EventBody::Ended(RunEnded { failure: Some(failure) })
                if !(self.drained && failure.code() == ErrorCode::Interrupted) =>
            {
                traces.fail(&failure.message, SystemTime::now());
            }
            _ => {}
        }
    }

    /// A work is done by all ranks and its row written, which took since `began`. Says which step's trace the ranks are to
    /// keep after all.
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
