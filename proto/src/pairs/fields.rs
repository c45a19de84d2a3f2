//! Parsers for parts of a record that all forms use. Each error names its field.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::json::Json;
use super::strict::Strict;
use super::{Message, MessageContent, RecordError, Role, broken};
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

/// Parses JSON inside a string; `what` is its expected content.
pub(super) fn json(text: &str, field: &str, what: &str) -> Result<Value, RecordError> {
    super::json::refuse_numbers(text, field)?;
    let Strict(value) = serde_json::from_str(text).map_err(|error| RecordError {
        field: field.into(),
        problem: format!("expected JSON of {what} ({})", without_line_number(&error)),
    })?;
    Ok(value)
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
            "the last message must not be the assistant's: the outputs answer it",
        ),
        Some(_) => Ok(messages),
    }
}

/// Checks the messages of an output: the first is the assistant's, and some message is trained. `first` is the index of its first
/// message in the field, for errors.
pub(super) fn answer(messages: Vec<Message>, field: &str, first: usize) -> Result<Vec<Message>, RecordError> {
    let place = |at: usize| format!("{field}[{}]", first + at);
    match messages.first() {
        None => return broken(field, "empty; expected a message of the assistant"),
        Some(message) if message.role != Role::Assistant => {
            let role = message.role.name();
            return broken(
                format!("{}.role", place(0)),
                format!("an output begins with a message of the assistant, found \"{role}\""),
            );
        }
        Some(_) => {}
    }
    for (at, message) in messages.iter().enumerate() {
        if message.role == Role::System {
            return broken(format!("{}.role", place(at)), "an output holds no message of the system");
        }
    }
    trained(&messages, field, first)?;
    Ok(messages)
}

/// Checks what is trained of some messages: something, and no empty message.
pub(super) fn trained(messages: &[Message], field: &str, first: usize) -> Result<(), RecordError> {
    let mut any = false;
    for (at, message) in messages.iter().enumerate().filter(|(_, message)| message.is_trained()) {
        any = true;
        let blank = message.content.as_ref().is_none_or(MessageContent::is_blank);
        if blank && message.tool_calls.is_empty() {
            return broken(
                format!("{field}[{}].content", first + at),
                "empty; an output needs text to train on",
            );
        }
    }
    if any {
        return Ok(());
    }
    match messages.iter().any(|message| message.role == Role::Assistant) {
        true => broken(field, "every message of the assistant has weight 0: nothing is left to train on"),
        false => broken(field, "no message of the assistant: nothing is left to train on"),
    }
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

/// Fields of a message.
const MESSAGE: [&str; 9] = [
    "role",
    "content",
    "reasoning",
    "reasoning_content",
    "thinking",
    "tool_calls",
    "tool_call_id",
    "name",
    "weight",
];

/// Parses one message.
pub(super) fn message(value: &Value, field: &str) -> Result<Message, RecordError> {
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
    if let Some((key, _)) =
        object.iter().find(|(key, value)| !MESSAGE.contains(&key.as_str()) && is_set(value))
    {
        let meant = misspelt(key, &MESSAGE).map_or_else(
            || format!("a message has {}", MESSAGE.join(", ")),
            |nearest| format!("did you mean `{nearest}`?"),
        );
        return broken(field, format!("unknown field `{}`; {meant}", plain::quoted(key)));
    }
    of_the_right_role(object, role, field)?;
    let optional = |key: &str| optional_text(object.get(key), &format!("{field}.{key}"));
    let message = Message {
        role,
        content: content(object.get("content"), &format!("{field}.content"))?,
        reasoning: reasoning(object, field)?,
        tool_calls: tool_calls(object.get("tool_calls"), &format!("{field}.tool_calls"))?,
        tool_call_id: optional("tool_call_id")?,
        name: optional("name")?,
        weight: weight(object.get("weight"), role, &format!("{field}.weight"))?,
    };
    let instead = !message.tool_calls.is_empty() || message.reasoning.is_some();
    match (&message.content, object.contains_key("content")) {
        (None, false) if !instead => broken(format!("{field}.content"), "missing"),
        (None, true) if !instead => broken(format!("{field}.content"), "expected a string, found null"),
        _ => Ok(message),
    }
}

/// Fails if a message has a field that only another role's messages have.
fn of_the_right_role(object: &Map<String, Value>, role: Role, field: &str) -> Result<(), RecordError> {
    const ASSISTANT: [&str; 4] = ["reasoning", "reasoning_content", "thinking", "tool_calls"];
    let owners =
        ASSISTANT.map(|key| (key, Role::Assistant)).into_iter().chain([("tool_call_id", Role::Tool)]);
    for (key, owner) in owners {
        if role != owner && object.get(key).is_some_and(is_set) {
            return broken(
                format!("{field}.{key}"),
                format!("only messages of role \"{}\" have it, found \"{}\"", owner.name(), role.name()),
            );
        }
    }
    Ok(())
}

fn content(value: Option<&Value>, field: &str) -> Result<Option<MessageContent>, RecordError> {
    Ok(Some(match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => MessageContent::Text(text.clone()),
        Some(Value::Array(items)) => {
            let parts = items.iter().enumerate();
            let parts = parts.map(|(at, item)| part(item, &format!("{field}[{at}]")));
            MessageContent::Parts(parts.collect::<Result<_, _>>()?)
        }
        Some(other) => {
            return broken(
                field,
                format!("expected a string or a list of text parts, found {}", kind(other)),
            );
        }
    }))
}

/// A part of a content: `{"type": "text", "text": …}`.
fn part(item: &Value, field: &str) -> Result<String, RecordError> {
    let Value::Object(object) = item else {
        return broken(field, format!("expected an object with `type` and `text`, found {}", kind(item)));
    };
    let what = text(object.get("type"), &format!("{field}.type"))?;
    if what == "text" {
        return Ok(text(object.get("text"), &format!("{field}.text"))?.to_owned());
    }
    let media = ["image", "audio", "video", "file"].iter().any(|name| what.contains(name));
    let problem = match media {
        true => "images, audio, video and files are not supported: Dyad trains on text alone".to_owned(),
        false => format!("expected \"text\", found \"{}\"", plain::quoted(what)),
    };
    broken(format!("{field}.type"), problem)
}

fn reasoning(object: &Map<String, Value>, field: &str) -> Result<Option<String>, RecordError> {
    let mut found: Option<(&str, String)> = None;
    for key in ["reasoning_content", "reasoning", "thinking"] {
        let Some(said) = optional_text(object.get(key), &format!("{field}.{key}"))? else { continue };
        match &found {
            Some((first, other)) if *other != said => {
                return broken(
                    format!("{field}.{key}"),
                    format!("`{first}` is there too, with another text; keep one of them"),
                );
            }
            _ => found = Some((key, said)),
        }
    }
    Ok(found.map(|(_, said)| said))
}

fn tool_calls(value: Option<&Value>, field: &str) -> Result<Vec<Json>, RecordError> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => {
            items.iter().enumerate().map(|(at, item)| tool_call(item, &format!("{field}[{at}]"))).collect()
        }
        Some(other) => broken(field, format!("expected a list of tool calls, found {}", kind(other))),
    }
}

/// A call as in the file, with its keys in their order. Arguments are an object or JSON text of one.
fn tool_call(item: &Value, field: &str) -> Result<Json, RecordError> {
    let Value::Object(object) = item else {
        return broken(field, format!("expected an object with `function`, found {}", kind(item)));
    };
    if let Some(what) = object.get("type").filter(|what| !what.is_null() && *what != "function") {
        return broken(
            format!("{field}.type"),
            format!("expected \"function\", found {}", plain::quoted(&what.to_string())),
        );
    }
    match object.get("function") {
        Some(Value::Object(function)) => check_call(function, &format!("{field}.function"))?,
        Some(other) => {
            let found = kind(other);
            return broken(format!("{field}.function"), format!("expected an object, found {found}"));
        }
        // transformers' templates also take a call that is not wrapped.
        None if object.contains_key("name") => check_call(object, field)?,
        None => return broken(format!("{field}.function"), "missing"),
    }
    Ok(Json::of(item))
}

fn check_call(function: &Map<String, Value>, field: &str) -> Result<(), RecordError> {
    output(text(function.get("name"), &format!("{field}.name"))?, &format!("{field}.name"))
        .map_err(|error| RecordError { problem: "empty; expected the name of a tool".into(), ..error })?;
    let field = format!("{field}.arguments");
    let parsed;
    let arguments = match function.get("arguments") {
        Some(Value::String(said)) => {
            parsed = json(said, &field, "an object")?;
            &parsed
        }
        Some(given) => given,
        None => return broken(field, "missing"),
    };
    match arguments {
        Value::Object(_) => Ok(()),
        other => broken(field, format!("expected a JSON object, found {}", kind(other))),
    }
}

/// `weight` of a message: 0 or 1.
fn weight(value: Option<&Value>, role: Role, field: &str) -> Result<Option<bool>, RecordError> {
    let weight = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => match value.as_f64() {
            Some(0.0) => false,
            Some(1.0) => true,
            _ => return broken(field, "expected 0 or 1: whether the message is trained"),
        },
    };
    match weight && role != Role::Assistant {
        true => broken(
            field,
            format!("only the assistant's messages are trained, not those of \"{}\"", role.name()),
        ),
        false => Ok(Some(weight)),
    }
}

fn optional_text(value: Option<&Value>, field: &str) -> Result<Option<String>, RecordError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        value => text(value, field).map(|text| Some(text.to_owned())),
    }
}

/// Returns the value if it is a string.
pub(super) fn text<'v>(value: Option<&'v Value>, field: &str) -> Result<&'v str, RecordError> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(other) => broken(field, format!("expected a string, found {}", kind(other))),
        None => broken(field, "missing"),
    }
}

/// Whether a value counts as given: table libraries write null and empty lists for absent fields.
pub(super) fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        _ => true,
    }
}

/// The known name that a word is probably meant to be.
pub(super) fn misspelt<'n>(word: &str, known: &[&'n str]) -> Option<&'n str> {
    let word = word.get(..64).unwrap_or(word);
    let distance = |name: &str| strsim::osa_distance(&word.to_lowercase(), name);
    let near = |name: &&&str| distance(name) <= if name.len() < 8 { 1 } else { 2 };
    known.iter().filter(near).min_by_key(|name| distance(name)).copied()
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

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        message(&value, "message").map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(value: Value) -> Result<Message, String> {
        message(&value, "m").map_err(|error| error.to_string())
    }

    #[test]
    fn tool_calls_keep_the_order_of_keys_and_the_text_of_arguments() {
        let call = json!({"id": "c1", "type": "function", "index": 0, "function": {"arguments": "{\"b\": 1, \"a\": [2.50]}", "name": "f"}});
        let found = parsed(json!({"role": "assistant", "content": null, "tool_calls": [call]})).unwrap();
        assert_eq!(found.content, None);
        assert_eq!(
            found.tool_calls[0].text(),
            r#"{"id":"c1","type":"function","index":0,"function":{"arguments":"{\"b\": 1, \"a\": [2.50]}","name":"f"}}"#
        );
        let bare =
            parsed(json!({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]})).unwrap();
        assert_eq!(bare.tool_calls[0].text(), r#"{"name":"f","arguments":{}}"#);
    }

    #[test]
    fn reasoning_has_one_meaning_under_its_three_names() {
        for key in ["reasoning", "reasoning_content", "thinking"] {
            let found = parsed(json!({"role": "assistant", "content": "a", key: "hm"})).unwrap();
            assert_eq!(found.reasoning.as_deref(), Some("hm"), "{key}");
        }
        let two = json!({"role": "assistant", "content": "a", "reasoning": "x", "reasoning_content": "y"});
        assert!(parsed(two).unwrap_err().starts_with("m.reasoning: `reasoning_content` is there too"));
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "one case for each rule")]
    fn every_broken_rule_of_a_message_names_its_field() {
        let said = |extra: Value| {
            let mut object = json!({"role": "assistant", "content": "a"});
            object.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            object
        };
        let call = |function: Value| said(json!({"tool_calls": [{"function": function}]}));
        let cases = [
            (
                said(json!({"reasoning_contnet": "x"})),
                "m: unknown field `reasoning_contnet`; did you mean `reasoning_content`?",
            ),
            (
                said(json!({"tool_call_id": "x"})),
                "m.tool_call_id: only messages of role \"tool\" have it, found \"assistant\"",
            ),
            (
                json!({"role": "user", "content": "a", "tool_calls": [1]}),
                "m.tool_calls: only messages of role \"assistant\" have it, found \"user\"",
            ),
            (
                json!({"role": "user", "content": "a", "weight": 1}),
                "m.weight: only the assistant's messages are trained, not those of \"user\"",
            ),
            (said(json!({"weight": 0.5})), "m.weight: expected 0 or 1: whether the message is trained"),
            (json!({"role": "assistant"}), "m.content: missing"),
            (json!({"role": "user", "content": null}), "m.content: expected a string, found null"),
            (
                said(json!({"content": 7})),
                "m.content: expected a string or a list of text parts, found a number",
            ),
            (
                said(json!({"content": ["x"]})),
                "m.content[0]: expected an object with `type` and `text`, found a string",
            ),
            (
                said(json!({"content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
                "m.content[0].type: images, audio, video and files are not supported: Dyad trains on text alone",
            ),
            (
                said(json!({"content": [{"type": "refusal"}]})),
                "m.content[0].type: expected \"text\", found \"refusal\"",
            ),
            (said(json!({"tool_calls": {}})), "m.tool_calls: expected a list of tool calls, found an object"),
            (
                said(json!({"tool_calls": ["f"]})),
                "m.tool_calls[0]: expected an object with `function`, found a string",
            ),
            (said(json!({"tool_calls": [{"id": "x"}]})), "m.tool_calls[0].function: missing"),
            (
                said(json!({"tool_calls": [{"type": "custom"}]})),
                "m.tool_calls[0].type: expected \"function\", found \"custom\"",
            ),
            (call(json!({"arguments": "{}"})), "m.tool_calls[0].function.name: missing"),
            (
                call(json!({"name": " ", "arguments": "{}"})),
                "m.tool_calls[0].function.name: empty; expected the name of a tool",
            ),
            (call(json!({"name": "f"})), "m.tool_calls[0].function.arguments: missing"),
            (
                call(json!({"name": "f", "arguments": "{x}"})),
                "m.tool_calls[0].function.arguments: expected JSON of an object (key must be a string at column 2)",
            ),
            (
                call(json!({"name": "f", "arguments": "[]"})),
                "m.tool_calls[0].function.arguments: expected a JSON object, found a list",
            ),
            (
                call(json!({"name": "f", "arguments": "{\"a\": 1, \"a\": 2}"})),
                "m.tool_calls[0].function.arguments: expected JSON of an object (field `a` is there twice at column 12)",
            ),
        ];
        for (value, expected) in cases {
            assert_eq!(parsed(value.clone()).unwrap_err(), expected, "{value}");
        }
    }
}
