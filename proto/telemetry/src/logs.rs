//! Log lines on standard error: text for people, or one JSON object a line, with the ids of the current trace.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, IsTerminal, Write};

use dyad_proto::plain;
use opentelemetry_sdk::trace::SdkTracer;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::TARGET;
use crate::log_format::{LogFormat, json_line};
use crate::voice::Lines;

/// Settings of the log.
#[derive(Clone, Copy, Debug)]
pub struct Logs {
    /// Format of the lines.
    pub format: LogFormat,
    /// The environment variable that holds the filter.
    pub variable: &'static str,
    /// The filter if the variable is not set.
    pub default: &'static str,
}

/// Prefixes of targets whose events are added to spans.
const OURS: [&str; 4] = ["coordinator", "dyad", "launcher", "trainer"];

fn is_exported(metadata: &Metadata<'_>) -> bool {
    match metadata.is_span() {
        true => metadata.target() == TARGET,
        false => {
            *metadata.level() <= Level::INFO && OURS.iter().any(|ours| metadata.target().starts_with(ours))
        }
    }
}

/// Installs the process's subscriber; a second call in one process does nothing.
pub(crate) fn subscribe(logs: Logs, tracer: Option<SdkTracer>) {
    let (filter, trouble) = filter(logs, std::env::var(logs.variable).ok());
    // Log lines do not show exported spans.
    let filter = match format!("{TARGET}=off").parse() {
        Ok(directive) => filter.add_directive(directive),
        Err(_) => filter,
    };
    let lines = tracing_subscriber::fmt::layer();
    let lines = match logs.format {
        LogFormat::Text => {
            let no_color = std::env::var_os("NO_COLOR");
            let ansi = has_colours(std::io::stderr().is_terminal(), no_color.as_deref());
            let lines = lines.with_writer(|| PlainLines(Lines));
            lines.with_ansi(ansi).with_target(false).with_filter(filter).boxed()
        }
        LogFormat::Json => {
            lines.with_writer(|| Lines).with_ansi(false).event_format(Json).with_filter(filter).boxed()
        }
    };
    let traces = tracer.map(|tracer| {
        let layer =
            tracing_opentelemetry::layer().with_tracer(tracer).with_location(false).with_threads(false);
        let layer = layer.with_target(false).with_tracked_inactivity(false);
        layer.with_filter(tracing_subscriber::filter::filter_fn(is_exported))
    });
    let _ = tracing_subscriber::registry().with(lines).with(traces).try_init();
    if let Some(trouble) = trouble {
        tracing::warn!("{trouble}");
    }
}

/// Whether a stream gets colours: on a terminal, unless `NO_COLOR` is set and not empty (no-color.org).
#[must_use]
pub fn has_colours(is_terminal: bool, no_color: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Makes the filter from the variable's value. If that is invalid, returns the default filter and a warning.
fn filter(logs: Logs, value: Option<String>) -> (EnvFilter, Option<String>) {
    let Logs { variable, default, .. } = logs;
    match value.map(|value| EnvFilter::try_new(&value).map_err(|error| (value, error))) {
        None => (EnvFilter::new(default), None),
        Some(Ok(filter)) => (filter, None),
        Some(Err((value, error))) => {
            let trouble = format!("{variable} {value:?} is ignored, as if it were {default:?}: {error}");
            (EnvFilter::new(default), Some(trouble))
        }
    }
}

/// Escapes control characters in log lines: quoted texts come from data, files and peers.
struct PlainLines<W>(W);

impl<W: Write> Write for PlainLines<W> {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        // Each write is one event. Line ends within it would look like further events.
        let text = String::from_utf8_lossy(lines);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let shown = plain::coloured(text).replace('\n', "\\n");
        self.0.write_all((shown + "\n").as_bytes())?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// One JSON object a line.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = LogFields(Map::new());
        event.record(&mut fields);
        let metadata = event.metadata();
        writeln!(writer, "{}", json_line(metadata.level().as_str(), metadata.target(), fields.0))
    }
}

/// Fields of an event as JSON.
struct LogFields(Map<String, Value>);

impl LogFields {
    fn put(&mut self, field: &Field, value: Value) {
        self.0.insert(field.name().to_owned(), value);
    }
}

impl Visit for LogFields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN or infinity: write them as strings.
        self.put(field, if value.is_finite() { value.into() } else { value.to_string().into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_and_keeps_only_colours() {
        let mut lines = PlainLines(Vec::new());
        lines.write_all(b"\x1b[33m WARN\x1b[0m cannot read a\n2026 ERROR made up \x1b[2J\r\n").unwrap();
        let expected = "\u{1b}[33m WARN\u{1b}[0m cannot read a\\n2026 ERROR made up \\u{1b}[2J\\r\n";
        assert_eq!(String::from_utf8(lines.0).unwrap(), expected);
    }

    #[test]
    fn no_color_turns_colours_off() {
        for (is_terminal, no_color, expected) in
            [(true, None, true), (true, Some(""), true), (true, Some("1"), false), (false, None, false)]
        {
            assert_eq!(has_colours(is_terminal, no_color.map(OsStr::new)), expected, "{no_color:?}");
        }
    }

    #[test]
    fn an_invalid_filter_is_reported_and_the_default_used() {
        let logs = Logs { format: LogFormat::Text, variable: "DYAD_LOG", default: "info" };
        let chosen = |value: Option<&str>| {
            let (filter, trouble) = filter(logs, value.map(str::to_owned));
            (filter.to_string(), trouble)
        };
        assert_eq!(chosen(None), ("info".into(), None));
        assert_eq!(chosen(Some("debug")), ("debug".into(), None));
        let (filter, trouble) = chosen(Some("dyad=loud"));
        let trouble = trouble.unwrap();
        assert!(filter == "info" && trouble.starts_with("DYAD_LOG \"dyad=loud\" is ignored"), "{trouble}");
    }
}
