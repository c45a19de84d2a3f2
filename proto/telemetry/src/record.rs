//! Spans that are created after they have ended, from recorded times.

use std::borrow::Cow;
use std::ops::Range;
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
    /// Name of the span.
    pub name: Cow<'static, str>,
    /// Ids of the span, from [`Spans::root`] or [`Spans::child`].
    pub context: SpanContext,
    /// The parent span.
    pub parent: Option<SpanContext>,
    /// Client, server or internal.
    pub kind: SpanKind,
    /// Start of the span.
    pub start: SystemTime,
    /// End of the span.
    pub end: SystemTime,
    /// Attributes.
    pub attributes: Vec<KeyValue>,
    /// Related spans of other traces.
    pub links: Vec<SpanContext>,
    /// Error message, if the span failed.
    pub error: Option<String>,
}

impl SpanRecord {
    /// An internal span without attributes.
    #[must_use]
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        context: SpanContext,
        parent: Option<SpanContext>,
        Range { start, end }: Range<SystemTime>,
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
    /// Makes ids for the root span of a new trace.
    #[must_use]
    pub fn root(&self, sampled: bool) -> SpanContext {
        let ids = RandomIdGenerator::default();
        let flags = if sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        SpanContext::new(ids.new_trace_id(), ids.new_span_id(), flags, false, TraceState::default())
    }

    /// Makes ids for a child span.
    #[must_use]
    pub fn child(&self, parent: &SpanContext) -> SpanContext {
        let span = RandomIdGenerator::default().new_span_id();
        SpanContext::new(parent.trace_id(), span, parent.trace_flags(), false, parent.trace_state().clone())
    }

    /// Whether `OTEL_TRACES_SAMPLER` samples a trace with this root.
    #[must_use]
    pub fn allows(&self, root: &SpanContext, name: &str) -> bool {
        let decision =
            self.sampler.should_sample(None, root.trace_id(), name, &SpanKind::Internal, &[], &[]).decision;
        decision == SamplingDecision::RecordAndSample
    }

    /// Queues a span, independent of the sampled flag of its context: the caller decides. Never waits.
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
            // If the clock was set back, the span must not end before it starts.
            end_time: end.max(start),
            attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: span_links,
            status: error.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        });
    }

    /// Exports queued spans, within `limit`; for a process that is about to exit quickly.
    pub fn flush(&self, limit: Duration) {
        let processor = Arc::clone(&self.processor);
        crate::deadline::within(limit, move || {
            let _ = processor.force_flush();
        });
    }
}
