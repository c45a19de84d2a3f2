//! Passing trace contexts between processes: W3C `traceparent` and `tracestate` in the environment, gRPC metadata and messages.

use std::collections::HashMap;

use dyad_proto::{ErrorCode, Fault};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanContext, Status, TraceContextExt};
use opentelemetry::{Context, ContextGuard};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Names of the two headers; in the environment they are upper-case.
const HEADERS: [&str; 2] = ["traceparent", "tracestate"];

fn remote(carrier: &HashMap<String, String>) -> Option<SpanContext> {
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), carrier);
    let context = context.span().span_context().clone();
    context.is_valid().then_some(context)
}

/// The context of the parent process, from `TRACEPARENT` and `TRACESTATE`.
#[must_use]
pub fn environment() -> Option<SpanContext> {
    let value = |name: &&str| Some(((*name).to_owned(), std::env::var(name.to_uppercase()).ok()?));
    remote(&HEADERS.iter().filter_map(value).collect())
}

/// Parses a `traceparent`; `None` if it is empty or malformed.
#[must_use]
pub fn parse(traceparent: &str) -> Option<SpanContext> {
    remote(&HashMap::from([(HEADERS[0].to_owned(), traceparent.to_owned())]))
}

/// A context as a `traceparent`.
#[must_use]
pub fn traceparent(context: &SpanContext) -> String {
    let (trace, span, flags) = (context.trace_id(), context.span_id(), context.trace_flags());
    format!("00-{trace}-{span}-{flags:02x}")
}

/// A context as headers: `traceparent`, and `tracestate` if there is one.
#[must_use]
pub fn headers(context: &SpanContext) -> Vec<(&'static str, String)> {
    let state = context.trace_state().header();
    let state = Some((HEADERS[1], state)).filter(|(_, state)| !state.is_empty());
    [(HEADERS[0], traceparent(context))].into_iter().chain(state).collect()
}

/// Puts a context into the metadata of a call.
pub fn inject(context: &SpanContext, metadata: &mut MetadataMap) {
    for (name, value) in headers(context) {
        if let Ok(value) = value.parse() {
            metadata.insert(MetadataKey::<Ascii>::from_static(name), value);
        }
    }
}

/// The context in the metadata of a call.
#[must_use]
pub fn extract(metadata: &MetadataMap) -> Option<SpanContext> {
    let value = |name: &&str| Some(((*name).to_owned(), metadata.get(*name)?.to_str().ok()?.to_owned()));
    remote(&HEADERS.iter().filter_map(value).collect())
}

/// Makes a span of `tracing` the child of another process's span. Call it before the span is entered. No effect if traces are off.
pub fn adopt(span: &tracing::Span, parent: &SpanContext) {
    // Fails only if the span is not exported.
    let _ = span.set_parent(Context::new().with_remote_span_context(parent.clone()));
}

/// The context of a span of `tracing`; `None` if traces are off.
#[must_use]
pub fn context_of(span: &tracing::Span) -> Option<SpanContext> {
    let context = span.context().span().span_context().clone();
    context.is_valid().then_some(context)
}

/// Records in a run's span how the run ended. A run that was stopped on request has not failed. No effect if traces are off.
pub fn conclude<T>(span: &tracing::Span, ended: &Result<T, Fault>) {
    let outcome = match ended {
        Ok(_) => "complete",
        Err(fault) if fault.code == ErrorCode::Interrupted => "stopped",
        Err(fault) => {
            span.set_status(Status::error(fault.message.clone()));
            span.set_attribute("error.type", format!("{:?}", fault.code));
            "failed"
        }
    };
    span.set_attribute("train.outcome", outcome);
}

/// Makes a context this thread's current one until the guard is dropped; log lines then carry its ids.
#[must_use]
pub fn current(context: &SpanContext) -> ContextGuard {
    Context::new().with_remote_span_context(context.clone()).attach()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_survives_metadata() {
        let context = parse(PARENT).unwrap();
        assert!(context.is_sampled() && context.is_remote());
        let mut metadata = MetadataMap::new();
        inject(&context, &mut metadata);
        assert_eq!(metadata.get("traceparent").unwrap(), PARENT);
        assert_eq!(extract(&metadata), Some(context));
        assert_eq!(extract(&MetadataMap::new()), None);
    }

    #[test]
    fn malformed_traceparents_are_ignored() {
        for text in
            ["", "00", "00-0-0-00", &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32))]
        {
            assert_eq!(parse(text), None, "{text}");
        }
        let unsampled = parse(&PARENT.replace("-01", "-00")).unwrap();
        assert!(!unsampled.is_sampled());
        assert!(traceparent(&unsampled).ends_with("-00"));
    }
}
