//! Format of a process's log lines: text, or one JSON object a line.

use std::sync::OnceLock;

use clap::ValueEnum;
use dyad_proto::plain;
use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt;
use serde_json::{Map, Value};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// One JSON object a line, with trace_id and span_id where traces are on
    Json,
}

impl LogFormat {
    /// Name of the format on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

static PROCESS: OnceLock<(&'static str, LogFormat)> = OnceLock::new();

/// Stores this process's service name and format, for lines that are not written by `tracing`.
pub(crate) fn remember(service: &'static str, format: LogFormat) {
    let _ = PROCESS.set((service, format));
}

/// The service name and format of this process; `None` before [`remember`].
pub(crate) fn process() -> Option<(&'static str, LogFormat)> {
    PROCESS.get().copied()
}

/// The format of this process's log lines.
#[must_use]
pub fn format() -> LogFormat {
    process().map_or(LogFormat::Text, |(_, format)| format)
}

/// Makes a JSON log line with the current time, without the line end.
pub(crate) fn json_line(level: &str, target: &str, fields: Map<String, Value>) -> String {
    let mut time = String::new();
    // Writing into a string cannot fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    let mut line = Map::new();
    line.insert("timestamp".into(), time.into());
    line.insert("level".into(), level.into());
    line.insert("fields".into(), Value::Object(fields));
    line.insert("target".into(), target.into());
    let context = Context::current();
    let context = context.span().span_context().clone();
    if context.is_valid() {
        line.insert("trace_id".into(), context.trace_id().to_string().into());
        line.insert("span_id".into(), context.span_id().to_string().into());
    }
    plain::json(&Value::Object(line).to_string()).into_owned()
}
