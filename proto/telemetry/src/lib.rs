//! Log lines and OTLP traces of Dyad's processes.
//!
//! Traces are off unless the standard `OTEL_*` environment names an endpoint. Two kinds of spans leave a process:
//!
//! - spans of `tracing` with the target [`TARGET`], for rare events of a run (join, load, checkpoint);
//! - finished [`SpanRecord`]s, made from recorded times when it is known that the span is wanted (the phases of a step). [`spans`] takes
//!   them from any thread, without waiting.
//!
//! [`voice`] writes log lines without blocking. Invariants:
//!
//! - TEL-O1: training never waits for a collector. A full queue drops spans; at its end, a process waits at most [`PATIENCE`].
//! - TEL-O2: if traces are off, nothing is recorded.
// Tests may use `std::fs` directly; other code reads through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod command_line;
mod context;
mod deadline;
mod exporter;
mod last_words;
mod log_format;
mod logs;
mod record;
mod rpc;
mod settings;
pub mod voice;

use std::sync::OnceLock;
use std::time::Duration;

pub use command_line::command_line;
pub use context::{
    adopt, conclude, context_of, current, environment, extract, headers, inject, parse, traceparent,
};
pub use last_words::{last_words, read_last_words};
pub use log_format::{LogFormat, format};
pub use logs::{Logs, has_colours};
pub use opentelemetry::trace::{SpanContext, SpanKind};
pub use opentelemetry::{ContextGuard, KeyValue};
pub use record::{SpanRecord, Spans};
pub use rpc::RpcCall;

use exporter::Pipeline;
use settings::Tracing;

/// Target of the spans that are exported; log lines do not show them.
pub const TARGET: &str = "dyad_trace";

/// Maximum time that a process waits at its end for the export of its last spans.
pub const PATIENCE: Duration = Duration::from_secs(2);

static SPANS: OnceLock<Spans> = OnceLock::new();

/// Takes finished records; `None` if traces are off.
#[must_use]
pub fn spans() -> Option<&'static Spans> {
    SPANS.get()
}

/// Guard for logs and traces of a process. Dropping it exports the remaining spans and flushes log lines.
#[derive(Debug)]
pub struct Telemetry {
    pipeline: Option<Pipeline>,
}

impl Telemetry {
    /// Starts logs and, if the environment asks for them, traces. Call it once per process.
    #[must_use]
    pub fn start(service: &'static str, logs: Logs) -> Self {
        let (pipeline, trouble) = match settings::decide(&|name| std::env::var(name).ok()) {
            Tracing::Off => (None, None),
            Tracing::Refused(reason) => (None, Some(reason)),
            Tracing::On { endpoint } => match Pipeline::start(service, endpoint) {
                Ok(pipeline) => (Some(pipeline), None),
                Err(reason) => (None, Some(reason)),
            },
        };
        log_format::remember(service, logs.format);
        logs::subscribe(logs, pipeline.as_ref().map(Pipeline::tracer));
        if let Some(reason) = trouble {
            tracing::warn!("no traces are sent: {reason}");
        }
        if let Some(pipeline) = &pipeline {
            let _ = SPANS.set(pipeline.spans());
        }
        Self { pipeline }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.finish(PATIENCE);
        }
        voice::stderr().flush(voice::PATIENCE);
    }
}
