//! A small OTLP collector: receives spans over gRPC and keeps them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1 as otlp;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A span as it arrived.
#[derive(Clone, Debug)]
pub struct Span {
    /// `service.name` of the process.
    pub service: String,
    /// `service.instance.id` of the process.
    pub instance: String,
    /// Name.
    pub name: String,
    /// Trace, hex.
    pub trace: String,
    /// Span, hex.
    pub id: String,
    /// Parent, hex; empty for a root.
    pub parent: String,
    /// Linked spans: trace and span.
    pub links: Vec<(String, String)>,
    /// Client, server or internal, in OTLP's numbers.
    pub kind: i32,
    /// Attributes as text.
    pub attributes: HashMap<String, String>,
    /// Error message, if the span failed.
    pub error: Option<String>,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
}

impl Span {
    /// An attribute as text.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or_else(|| panic!("no {name} in {self:?}"), String::as_str)
    }
}

type Kept = Arc<Mutex<Vec<Span>>>;

/// A collector that listens on the loopback interface until dropped.
#[derive(Debug)]
pub struct Collector {
    spans: Kept,
    endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

impl Collector {
    /// Starts to listen.
    pub fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let spans = Kept::default();
        let incoming = {
            let _inside = runtime.enter();
            TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap()
        };
        let endpoint = format!("http://{}", incoming.local_addr().unwrap());
        let service = TraceServiceServer::new(Service(spans.clone()));
        runtime.spawn(tonic::transport::Server::builder().serve_with_incoming(service, incoming));
        Self { spans, endpoint, _runtime: runtime }
    }

    /// For `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Returns all spans received so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct Service(Kept);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for resource in request.into_inner().resource_spans {
            let process = texts(&resource.resource.unwrap_or_default().attributes);
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.extend(spans.map(|span| taken(&process, span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn taken(process: &HashMap<String, String>, span: otlp::Span) -> Span {
    let of = |name: &str| process.get(name).cloned().unwrap_or_default();
    let error = span.status.filter(|status| status.code == otlp::status::StatusCode::Error as i32);
    Span {
        service: of("service.name"),
        instance: of("service.instance.id"),
        name: span.name,
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        links: span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
        kind: span.kind,
        attributes: texts(&span.attributes),
        error: error.map(|status| status.message),
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: &[KeyValue]) -> HashMap<String, String> {
    attributes.iter().map(|pair| (pair.key.clone(), text(pair.value.as_ref()))).collect()
}

fn text(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        Some(Value::BoolValue(value)) => value.to_string(),
        other => format!("{other:?}"),
    }
}
