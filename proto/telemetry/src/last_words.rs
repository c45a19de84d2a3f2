//! Final report of a process that fails or stops on request: `error: …` or `stopped  …`, and `hint: …`; one JSON object if log lines are
//! JSON.

use dyad_proto::{ErrorCode, Fault, called, plain};
use serde_json::{Map, Value};

use crate::log_format::{LogFormat, json_line, process};
use crate::voice;

/// Field that only final reports have; the launcher recognises them by it.
const MARK: &str = "exit_status";

/// Writes to standard error why this process ends without success, in the format of its log lines, and flushes.
pub fn last_words(fault: &Fault) {
    let text = match process() {
        Some((service, LogFormat::Json)) => json(service, fault),
        Some((_, LogFormat::Text)) | None => called::commands(&fault.report()).into_owned(),
    };
    voice::stderr().line(&text);
    // Ignore a failed flush: there is no other place to report to.
    voice::stderr().flush(voice::PATIENCE);
}

fn json(service: &str, fault: &Fault) -> String {
    let mut fields = Map::new();
    // `to_string` cuts and escapes: the parent process does not read lines of unlimited length.
    fields.insert("message".into(), called::commands(&fault.to_string()).into());
    if !fault.hint.is_empty() {
        fields.insert("hint".into(), called::commands(&plain::line(&fault.hint)).into());
    }
    fields.insert(MARK.into(), fault.code.exit_status().into());
    // A stop on request is not an error.
    let level = if fault.code == ErrorCode::Interrupted { "INFO" } else { "ERROR" };
    json_line(level, service, fields)
}

/// Parses a JSON log line: returns error and hint if it is a final report.
#[must_use]
pub fn read_last_words(line: &str) -> Option<(String, String)> {
    // Avoid parsing: this is called for every line of every process.
    if !line.starts_with('{') || !line.contains(MARK) {
        return None;
    }
    let line: Value = serde_json::from_str(line).ok()?;
    let fields = line["fields"].as_object().filter(|fields| fields.contains_key(MARK))?;
    let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
    Some((text("message")?, text("hint").unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_message_origin_hint_and_status() {
        let fault = Fault::input("line 7: no\n\"field\"").hint("look").from_origin("coordinator");
        let line = json("launcher", &fault);
        assert!(!line.contains('\n'));
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&read["level"], &read["target"]), (&"ERROR".into(), &"launcher".into()));
        assert_eq!(read["fields"]["exit_status"], 2);
        let said = ("coordinator: line 7: no\\n\"field\"".to_owned(), "look".to_owned());
        assert_eq!(read_last_words(&line), Some(said));
        let bare = json("launcher", &Fault::failed("gone"));
        assert!(!bare.contains("hint"), "{bare}");
        assert_eq!(read_last_words(&bare), Some(("gone".into(), String::new())));
    }

    #[test]
    fn a_stop_on_request_is_not_an_error_in_json() {
        let line = json("launcher", &Fault::new(ErrorCode::Interrupted, "stopped by SIGINT"));
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&read["level"], &read["fields"]["exit_status"]), (&"INFO".into(), &130.into()));
        assert_eq!(read_last_words(&line), Some(("stopped by SIGINT".into(), String::new())));
    }

    #[test]
    fn other_lines_are_not_final_reports() {
        let mut fields = Map::new();
        fields.insert("message".into(), "a child ended, exit_status 1".into());
        for line in
            ["", "error: x", "exit_status", "{\"exit_status\"", &json_line("ERROR", "launcher", fields)]
        {
            assert_eq!(read_last_words(line), None, "{line}");
        }
    }
}
