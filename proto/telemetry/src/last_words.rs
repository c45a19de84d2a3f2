//! What a process says last when it fails or was asked to stop: `error: …` or `stopped  …`, and `hint: …`, for people; one JSON object
//! where log lines are such.

use dyad_proto::{ErrorCode, Fault, called, plain};
use serde_json::{Map, Value};

use crate::log_format::{LogFormat, json_line, process};
use crate::voice;

/// Only last words have it: by this the launcher tells them from other lines.
const MARK: &str = "exit_status";

/// Writes on standard error why this process ends without success, in the format of its log lines.
pub fn last_words(fault: &Fault) {
    let text = match process() {
        Some((service, LogFormat::Json)) => json(service, fault),
        Some((_, LogFormat::Text)) | None => called::commands(&fault.report()).into_owned(),
    };
    voice::stderr().line(&text);
    // Nothing is left to do when nobody reads standard error.
    voice::stderr().flush(voice::PATIENCE);
}

fn json(service: &str, fault: &Fault) -> String {
    let mut fields = Map::new();
    // Cut and escaped as for people: whoever started this process reads no line without end.
    fields.insert("message".into(), called::commands(&fault.to_string()).into());
    if !fault.hint.is_empty() {
        fields.insert("hint".into(), called::commands(&plain::line(&fault.hint)).into());
    }
    fields.insert(MARK.into(), fault.code.exit_status().into());
    // Nothing is wrong where a stop was asked for.
    let level = if fault.code == ErrorCode::Interrupted { "INFO" } else { "ERROR" };
    json_line(level, service, fields)
}

/// Error and hint of a JSON line, if those are the last words of a process.
#[must_use]
pub fn read_last_words(line: &str) -> Option<(String, String)> {
    // Every line of every process comes by here.
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
    fn a_stop_that_was_asked_for_is_no_error_in_json_either() {
        let line = json("launcher", &Fault::new(ErrorCode::Interrupted, "stopped by SIGINT"));
        let read: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&read["level"], &read["fields"]["exit_status"]), (&"INFO".into(), &130.into()));
        assert_eq!(read_last_words(&line), Some(("stopped by SIGINT".into(), String::new())));
    }

    #[test]
    fn other_lines_are_no_last_words() {
        let mut fields = Map::new();
        fields.insert("message".into(), "a child ended, exit_status 1".into());
        for line in
            ["", "error: x", "exit_status", "{\"exit_status\"", &json_line("ERROR", "launcher", fields)]
        {
            assert_eq!(read_last_words(line), None, "{line}");
        }
    }
}
