//! Spans of gRPC calls, by OpenTelemetry's semantic conventions for RPC (1.45).
//!
//! What makes a call an error: for whoever made it every status but OK; for whoever answered it those that the conventions name, which
//! say that the server is at fault. A caller that leaves, or is refused, is no error of the server.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanContext, SpanKind};
use tonic::Code;
use tonic::metadata::MetadataMap;

use crate::record::{SpanRecord, Spans};
use crate::spans;

/// One call, from here until its last copy is dropped. Both ends of a stream may have a copy; the first word on how the call ended counts.
#[derive(Clone, Debug)]
pub struct RpcCall {
    /// Absent where the call is not traced.
    open: Option<Arc<OpenCall>>,
}

#[derive(Debug)]
struct OpenCall {
    /// Taken when the call is over.
    record: Option<SpanRecord>,
    /// Not set for a call that was given up.
    code: OnceLock<Code>,
}

impl RpcCall {
    /// A call that this process makes, e.g. of `dyad.v1.Coordinator/Train` at `http://host:port`.
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

    /// A call that this process answers; `run` is the span that all of a run belongs to, wherever the call came from.
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

    /// How the call ended, unless that was said before. A call of which it is never said was given up by the caller.
    pub fn ended(&self, code: Code) {
        if let Some(open) = &self.open {
            let _ = open.code.set(code);
        }
    }
}

fn begin(method: &'static str, kind: SpanKind, parent: Option<SpanContext>) -> Option<SpanRecord> {
    spans().and_then(|spans| record(spans, method, kind, parent))
}

/// The parent's word on sampling counts; without one, `OTEL_TRACES_SAMPLER`'s.
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
    let mut record = SpanRecord::new(method, context, parent, (now, now));
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

/// gRPC's own names.
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

    /// All codes, by their numbers; the conventions' table for gRPC.
    #[test]
    fn a_server_is_at_fault_by_the_codes_that_the_conventions_name_and_a_client_fails_by_all_but_ok() {
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
    fn an_error_has_a_type_and_the_first_word_on_the_end_counts() {
        let context = crate::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        let now = SystemTime::now();
        let record = |kind| SpanRecord { kind, ..SpanRecord::new("a/b", context.clone(), None, (now, now)) };
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
