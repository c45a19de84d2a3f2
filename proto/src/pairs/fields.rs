//! Parsers for parts of a record that all forms use. Each error names its field.

use serde_json::{Map, Value};

use super::strict::Strict;
use super::{Message, RecordError, Role, broken};
use crate::plain;

/// Parses a line as a JSON object.
pub(super) fn record(line: &str) -> Result<Map<String, Value>, RecordError> {
    let Strict(value) = serde_json::from_str(line).map_err(|error| {
        let what = without_line_number(&error);
        // A data error comes from `Strict`: the JSON itself is valid.
        let problem = if error.is_data() { what } else { format!("not valid JSON ({what})") };
        RecordError { field: "record".into(), problem }
    })?;
    match value {
        Value::Object(record) => Ok(record),
        other => broken("record", format!("expected a JSON object, found {}", kind(&other))),
    }
}

fn without_line_number(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => format!("{} at column {}", &text[..at], error.column()),
        None => text,
    }
}

/// Checks the messages of a prompt: at least one, and the last is not the assistant's.
pub(super) fn prompt(messages: Vec<Message>, field: &str) -> Result<Vec<Message>, RecordError> {
    match messages.last() {
        None => broken(field, "empty; expected at least one message"),
        Some(last) if last.role == Role::Assistant => broken(
            format!("{field}[{}].role", messages.len() - 1),
            "the last message must not be the assistant's: the two outputs answer it",
        ),
        Some(_) => Ok(messages),
    }
}

/// Checks the messages of an output: exactly one, of the assistant. `first` is its index in the field, for errors.
pub(super) fn answer(messages: Vec<Message>, field: &str, first: usize) -> Result<Message, RecordError> {
    let count = messages.len();
    let Ok([message]) = <[Message; 1]>::try_from(messages) else {
        return broken(field, format!("expected exactly one assistant message, found {count}"));
    };
    let field = format!("{field}[{first}]");
    if message.role != Role::Assistant {
        let role = message.role.name();
        return broken(format!("{field}.role"), format!("expected \"assistant\", found \"{role}\""));
    }
    output(&message.content, &format!("{field}.content"))?;
    Ok(message)
}

/// Fails if an output is empty or only white space.
pub(super) fn output(text: &str, field: &str) -> Result<(), RecordError> {
    match text.trim().is_empty() {
        true => broken(field, "empty; an output needs text to train on"),
        false => Ok(()),
    }
}

/// Parses a list of messages.
pub(super) fn messages(value: Option<&Value>, field: &str) -> Result<Vec<Message>, RecordError> {
    let items = match value {
        Some(Value::Array(items)) => items,
        Some(other) => return broken(field, format!("expected a list of messages, found {}", kind(other))),
        None => return broken(field, "missing"),
    };
    items.iter().enumerate().map(|(i, value)| message(value, &format!("{field}[{i}]"))).collect()
}

fn message(value: &Value, field: &str) -> Result<Message, RecordError> {
    let Value::Object(object) = value else {
        return broken(field, format!("expected an object with `role` and `content`, found {}", kind(value)));
    };
    let expected = Role::NAMES.join(", ");
    let name = text(object.get("role"), &format!("{field}.role"))?;
    let Some(role) = Role::parse(name) else {
        return broken(
            format!("{field}.role"),
            format!("unknown role \"{}\" (expected one of {expected})", plain::quoted(name)),
        );
    };
    let content = text(object.get("content"), &format!("{field}.content"))?.to_owned();
    // Table libraries such as pandas write null for absent fields.
    let unknown = |(key, value): &(&String, &Value)| *key != "role" && *key != "content" && !value.is_null();
    if let Some((key, _)) = object.iter().find(unknown) {
        return broken(
            field,
            format!("unknown field `{}` (only `role` and `content` are supported)", plain::quoted(key)),
        );
    }
    Ok(Message { role, content })
}

/// Returns the value if it is a string.
pub(super) fn text<'v>(value: Option<&'v Value>, field: &str) -> Result<&'v str, RecordError> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(other) => broken(field, format!("expected a string, found {}", kind(other))),
        None => broken(field, "missing"),
    }
}

/// The kind of a value with its article, for errors.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
