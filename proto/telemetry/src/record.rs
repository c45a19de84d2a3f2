//! Spans that are made when they are over, from times that were noted on the way.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, IdGenerator, RandomIdGenerator, SamplingDecision, ShouldSample, SpanData, SpanLinks,
    SpanProcessor,
};

/// A finished span.
#[derive(Clone, Debug)]
pub struct SpanRecord {
    /// What it is called.
    pub name: Cow<'static, str>,
    /// Its own ids, by [`Spans::root`] or [`Spans::child`].
    pub context: SpanContext,
    /// Who caused it.
    pub parent: Option<SpanContext>,
    /// Client, server or neither.
    pub kind: SpanKind,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// What else is known.
    pub attributes: Vec<KeyValue>,
    /// Spans of other traces that belong to it.
    pub links: Vec<SpanContext>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

impl SpanRecord {
    /// An internal span without attributes.
    #[must_use]
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        context: SpanContext,
        parent: Option<SpanContext>,
        (start, end): (SystemTime, SystemTime),
    ) -> Self {
        let (attributes, links) = (Vec::new(), Vec::new());
        let kind = SpanKind::Internal;
        Self { name: name.into(), context, parent, kind, start, end, attributes, links, error: None }
    }
}

/// Takes finished spans; cheap to clone.
#[derive(Clone, Debug)]
pub struct Spans {
    pub(crate) processor: Arc<BatchSpanProcessor>,
    pub(crate) sampler: Box<dyn ShouldSample>,
    pub(crate) scope: InstrumentationScope,
}

impl Spans {
    /// Ids of the first span of a new trace.
    #[must_use]
    pub fn root(&self, sampled: bool) -> SpanContext {
        let ids = RandomIdGenerator::default();
        let flags = if sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        SpanContext::new(ids.new_trace_id(), ids.new_span_id(), flags, false, TraceState::default())
    }

    /// Ids of a span below another.
    #[must_use]
    pub fn child(&self, parent: &SpanContext) -> SpanContext {
        let span = RandomIdGenerator::default().new_span_id();
        SpanContext::new(parent.trace_id(), span, parent.trace_flags(), false, parent.trace_state().clone())
    }

    /// Whether `OTEL_TRACES_SAMPLER` lets a trace of this root be kept at all.
    #[must_use]
    pub fn allows(&self, root: &SpanContext, name: &str) -> bool {
        let decision =
            self.sampler.should_sample(None, root.trace_id(), name, &SpanKind::Internal, &[], &[]).decision;
        decision == SamplingDecision::RecordAndSample
    }

    /// Queues a span, whatever the sampled flag of its context says: who calls this has decided. Never waits.
    pub fn emit(&self, record: SpanRecord) {
        let SpanRecord { name, context, parent, kind, start, end, attributes, links, error } = record;
        let (trace, span, state) = (context.trace_id(), context.span_id(), context.trace_state().clone());
        let mut span_links = SpanLinks::default();
        span_links.links = links.into_iter().map(Link::with_context).collect();
        self.processor.on_end(SpanData {
            span_context: SpanContext::new(trace, span, TraceFlags::SAMPLED, false, state),
            parent_span_id: parent.as_ref().map_or(SpanId::INVALID, SpanContext::span_id),
            parent_span_is_remote: parent.as_ref().is_some_and(SpanContext::is_remote),
            span_kind: kind,
            name,
            start_time: start,
            // A clock that was set back must not make a span end before it began.
            end_time: end.max(start),
            attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: span_links,
            status: error.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        });
    }

    /// Delivers what is queued, within `limit`: for a process that is about to end in a hurry.
    pub fn flush(&self, limit: Duration) {
        let processor = Arc::clone(&self.processor);
        crate::deadline::within(limit, move || {
            let _ = processor.force_flush();
        });
    }
}
