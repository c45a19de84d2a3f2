//! Spans of gRPC calls, by OpenTelemetry's semantic conventions for RPC (1.45).
//!
//! A client span is an error for every status except OK. A server span is an error only for statuses that the conventions list as the
//! server's fault; a client that leaves or is refused is not an error of the server.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanContext, SpanKind};
use tonic::Code;
use tonic::metadata::MetadataMap;

use crate::record::{SpanRecord, Spans};
use crate::spans;

/// One call, from its creation until the last clone is dropped. Both directions of a stream may hold a clone; the first reported status
/// counts.
#[derive(Clone, Debug)]
pub struct RpcCall {
    /// `None` if the call is not traced.
    open: Option<Arc<OpenCall>>,
}

#[derive(Debug)]
struct OpenCall {
    /// Taken when the call ends.
    record: Option<SpanRecord>,
    /// Not set if the call was abandoned.
    code: OnceLock<Code>,
}

impl RpcCall {
    /// Starts the span of an outgoing call, e.g. of `dyad.v1.Coordinator/Train` at `http://host:port`.
    #[must_use]
    pub fn client(method: &'static str, address: &str, parent: Option<SpanContext>) -> Self {
        let mut record = begin(method, SpanKind::Client, parent);
        if let (Some(record), Ok(uri)) = (&mut record, address.parse::<tonic::codegen::http::Uri>()) {
            let host = uri.host().map(|host| KeyValue::new("server.address", host.to_owned()));
            let port = uri.port_u16().map(|port| KeyValue::new("server.port", i64::from(port)));
            record.attributes.extend(host.into_iter().chain(port));
        }
        Self::of(record)
    }

    /// Starts the span of an incoming call. `run` is the run's span; if the call belongs to another trace, the span links to it.
    #[must_use]
    pub fn server(method: &'static str, metadata: &MetadataMap, run: Option<SpanContext>) -> Self {
        let parent = crate::extract(metadata);
        let elsewhere =
            |run: &SpanContext| parent.as_ref().is_none_or(|parent| parent.trace_id() != run.trace_id());
        let link = run.filter(elsewhere);
        let mut record = begin(method, SpanKind::Server, parent);
        if let Some(record) = &mut record {
            record.links.extend(link);
        }
        Self::of(record)
    }

    fn of(record: Option<SpanRecord>) -> Self {
        let open = |record| Arc::new(OpenCall { record: Some(record), code: OnceLock::new() });
        Self { open: record.map(open) }
    }

    /// Puts the call's context into its metadata.
    pub fn inject(&self, metadata: &mut MetadataMap) {
        if let Some(record) = self.open.as_ref().and_then(|open| open.record.as_ref()) {
            crate::inject(&record.context, metadata);
        }
    }

    /// Reports the status of the call; later reports are ignored. A call without a report counts as cancelled by the caller.
    pub fn ended(&self, code: Code) {
        if let Some(open) = &self.open {
            let _ = open.code.set(code);
        }
    }
}

fn begin(method: &'static str, kind: SpanKind, parent: Option<SpanContext>) -> Option<SpanRecord> {
    spans().and_then(|spans| record(spans, method, kind, parent))
}

/// Starts the record of a call. The parent's sampled flag decides whether it is kept; without a parent, `OTEL_TRACES_SAMPLER` does.
fn record(
    spans: &Spans,
    method: &'static str,
    kind: SpanKind,
    parent: Option<SpanContext>,
) -> Option<SpanRecord> {
    let context = parent.as_ref().map_or_else(|| spans.root(true), |parent| spans.child(parent));
    let wanted = match &parent {
        Some(parent) => parent.is_sampled(),
        None => spans.allows(&context, method),
    };
    let now = SystemTime::now();
    let mut record = SpanRecord::new(method, context, parent, now..now);
    record.kind = kind;
    record.attributes = vec![KeyValue::new("rpc.system.name", "grpc"), KeyValue::new("rpc.method", method)];
    wanted.then_some(record)
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let (Some(mut record), Some(spans)) = (self.record.take(), spans()) else { return };
        record.end = SystemTime::now();
        conclude(&mut record, self.code.get().copied().unwrap_or(Code::Cancelled));
        spans.emit(record);
    }
}

fn conclude(record: &mut SpanRecord, code: Code) {
    let name = name(code);
    record.attributes.push(KeyValue::new("rpc.response.status_code", name));
    if is_error(&record.kind, code) {
        record.attributes.push(KeyValue::new("error.type", name));
        record.error = Some(name.to_owned());
    }
}

fn is_error(kind: &SpanKind, code: Code) -> bool {
    match kind {
        SpanKind::Server => matches!(
            code,
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unimplemented
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss
        ),
        _ => code != Code::Ok,
    }
}

/// gRPC's name of a status.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares all codes with the conventions' table for gRPC.
    #[test]
    fn error_codes_follow_the_rpc_conventions() {
        let codes = (0..=16).map(Code::from_i32);
        let errors = |kind| codes.clone().filter(|code| is_error(&kind, *code)).map(name).collect::<Vec<_>>();
        assert_eq!(
            errors(SpanKind::Server),
            ["UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"]
        );
        assert_eq!(errors(SpanKind::Client).len(), 16);
        assert!(!errors(SpanKind::Client).contains(&"OK"));
    }

    #[test]
    fn errors_have_a_type_and_the_first_status_counts() {
        let context = crate::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        let now = SystemTime::now();
        let record = |kind| SpanRecord { kind, ..SpanRecord::new("a/b", context.clone(), None, now..now) };
        let concluded = |kind, code| {
            let mut record = record(kind);
            conclude(&mut record, code);
            let keys = record.attributes.iter().map(|pair| pair.key.to_string()).collect::<Vec<_>>();
            (keys, record.error)
        };
        let status = "rpc.response.status_code".to_owned();
        assert_eq!(concluded(SpanKind::Server, Code::Cancelled), (vec![status.clone()], None));
        let error = (vec![status, "error.type".to_owned()], Some("CANCELLED".to_owned()));
        assert_eq!(concluded(SpanKind::Client, Code::Cancelled), error);
        let call = RpcCall::of(Some(record(SpanKind::Server)));
        let other = call.clone();
        other.ended(Code::Ok);
        call.ended(Code::Unknown);
        assert_eq!(call.open.unwrap().code.get(), Some(&Code::Ok));
    }
}
