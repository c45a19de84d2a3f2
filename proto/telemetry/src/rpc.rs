//! Spans of gRPC calls, by OpenTelemetry's semantic conventions for RPC (1.45).

use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{SpanContext, SpanKind};
use tonic::Code;
use tonic::metadata::MetadataMap;

use crate::record::{Record, Spans};
use crate::spans;

/// One call, from here until it is dropped.
#[derive(Debug)]
pub struct RpcCall {
    record: Option<Record>,
    code: Code,
}

impl RpcCall {
    /// A call that this process makes, e.g. of `dyad.v1.Coordinator/Train` at `http://host:port`.
    #[must_use]
    pub fn client(method: &'static str, address: &str, parent: Option<SpanContext>) -> Self {
        let mut call = Self::begin(method, SpanKind::Client, parent);
        if let (Some(record), Ok(uri)) = (&mut call.record, address.parse::<tonic::codegen::http::Uri>()) {
            let host = uri.host().map(|host| KeyValue::new("server.address", host.to_owned()));
            let port = uri.port_u16().map(|port| KeyValue::new("server.port", i64::from(port)));
            record.attributes.extend(host.into_iter().chain(port));
        }
        call
    }

    /// A call that this process answers; `run` is the span that all of a run belongs to, wherever the call came from.
    #[must_use]
    pub fn server(method: &'static str, metadata: &MetadataMap, run: Option<SpanContext>) -> Self {
        let parent = crate::extract(metadata);
        let elsewhere =
            |run: &SpanContext| parent.as_ref().is_none_or(|parent| parent.trace_id() != run.trace_id());
        let link = run.filter(elsewhere);
        let mut call = Self::begin(method, SpanKind::Server, parent);
        if let Some(record) = &mut call.record {
            record.links.extend(link);
        }
        call
    }

    fn begin(method: &'static str, kind: SpanKind, parent: Option<SpanContext>) -> Self {
        Self { record: spans().and_then(|spans| record(spans, method, kind, parent)), code: Code::Ok }
    }

    /// Puts the call's context into its metadata.
    pub fn inject(&self, metadata: &mut MetadataMap) {
        if let Some(record) = &self.record {
            crate::inject(&record.context, metadata);
        }
    }

    /// How the call ended; without this, well.
    pub fn ended(&mut self, code: Code) {
        self.code = code;
    }
}

/// The parent's word on sampling counts; without one, `OTEL_TRACES_SAMPLER`'s.
fn record(
    spans: &Spans,
    method: &'static str,
    kind: SpanKind,
    parent: Option<SpanContext>,
) -> Option<Record> {
    let context = parent.as_ref().map_or_else(|| spans.root(true), |parent| spans.child(parent));
    let wanted = match &parent {
        Some(parent) => parent.is_sampled(),
        None => spans.allows(&context, method),
    };
    let now = SystemTime::now();
    let mut record = Record::new(method, context, parent, (now, now));
    record.kind = kind;
    record.attributes = vec![KeyValue::new("rpc.system.name", "grpc"), KeyValue::new("rpc.method", method)];
    wanted.then_some(record)
}

impl Drop for RpcCall {
    fn drop(&mut self) {
        let (Some(mut record), Some(spans)) = (self.record.take(), spans()) else { return };
        let code = name(self.code);
        record.end = SystemTime::now();
        record.attributes.push(KeyValue::new("rpc.response.status_code", code));
        if self.code != Code::Ok {
            record.attributes.push(KeyValue::new("error.type", code));
            record.error = Some(code.to_owned());
        }
        spans.emit(record);
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
