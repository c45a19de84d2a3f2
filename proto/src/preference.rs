//! One preference pair, as a line of a JSON Lines file, and every rule that line must keep.
//!
//! ```json
//! {"input": {"messages": [{"role": "user", "content": "Hi"}]},
//!  "preferred_output": [{"role": "assistant", "content": "Hello! How can I help?"}],
//!  "non_preferred_output": [{"role": "assistant", "content": "What."}]}
//! ```

mod quick;
mod strict;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::plain;
use quick::QuickPair;
use strict::Strict;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    const NAMES: [&'static str; 4] = ["system", "user", "assistant", "tool"];

    fn parse(name: &str) -> Option<Self> {
        match name {
            "system" => Some(Self::System),
            "user" => Some(Self::User),
            "assistant" => Some(Self::Assistant),
            "tool" => Some(Self::Tool),
            _ => None,
        }
    }
}

/// One turn of a conversation, as chat templates take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// A conversation and two answers to it, one of them preferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreferencePair {
    /// The conversation up to the answer; never empty, never ends with the assistant.
    pub messages: Vec<Message>,
    /// The answer to move towards.
    pub preferred: Message,
    /// The answer to move away from.
    pub non_preferred: Message,
}

/// A rule that a line breaks: where in the line, and what was expected instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct RecordError {
    /// Path of the field, e.g. `input.messages[2].role`; `record` for the line as a whole.
    pub field: String,
    /// What is wrong and what was expected.
    pub problem: String,
}

fn broken<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, RecordError> {
    Err(RecordError { field: field.into(), problem: problem.into() })
}

impl PreferencePair {
    /// Reads one line and checks every rule.
    pub fn parse(line: &str) -> Result<Self, RecordError> {
        QuickPair::read(line).map_or_else(|| Self::parse_by_the_rules(line), |pair| Ok(pair.into()))
    }

    /// Checks every rule, and keeps nothing.
    pub fn check(line: &str) -> Result<(), RecordError> {
        QuickPair::read(line).map_or_else(|| Self::parse_by_the_rules(line).map(drop), |_| Ok(()))
    }

    fn parse_by_the_rules(line: &str) -> Result<Self, RecordError> {
        let Strict(value) = serde_json::from_str(line).map_err(|error| {
            let what = without_line_number(&error);
            // What a rule of ours refuses is valid JSON.
            let problem = if error.is_data() { what } else { format!("not valid JSON ({what})") };
            RecordError { field: "record".into(), problem }
        })?;
        let Value::Object(record) = value else {
            return broken("record", format!("expected a JSON object, found {}", kind(&value)));
        };
        for (key, value) in &record {
            let known = ["input", "preferred_output", "non_preferred_output"].contains(&key.as_str());
            if !known && !value.is_null() {
                return broken("record", format!("unknown field `{}`", plain::quoted(key)));
            }
        }
        let messages = conversation(&record)?;
        Ok(Self {
            messages,
            preferred: output(&record, "preferred_output")?,
            non_preferred: output(&record, "non_preferred_output")?,
        })
    }
}

fn without_line_number(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => format!("{} at column {}", &text[..at], error.column()),
        None => text,
    }
}

fn conversation(record: &Map<String, Value>) -> Result<Vec<Message>, RecordError> {
    let input = match record.get("input") {
        Some(Value::Object(input)) => input,
        Some(other) => {
            return broken("input", format!("expected an object with `messages`, found {}", kind(other)));
        }
        None => return broken("input", "missing"),
    };
    if let Some((key, _)) = input.iter().find(|(key, value)| *key != "messages" && !value.is_null()) {
        return broken(
            "input",
            format!("unknown field `{}` (only `messages` is supported)", plain::quoted(key)),
        );
    }
    let messages = list(input.get("messages"), "input.messages")?;
    let messages: Vec<Message> = messages
        .iter()
        .enumerate()
        .map(|(i, value)| message(value, &format!("input.messages[{i}]")))
        .collect::<Result<_, _>>()?;
    match messages.last() {
        None => broken("input.messages", "empty; expected at least one message"),
        Some(last) if last.role == Role::Assistant => broken(
            format!("input.messages[{}].role", messages.len() - 1),
            "the last message must not be the assistant's: the two outputs answer it",
        ),
        Some(_) => Ok(messages),
    }
}

fn output(record: &Map<String, Value>, name: &str) -> Result<Message, RecordError> {
    let outputs = list(record.get(name), name)?;
    let [only] = outputs.as_slice() else {
        return broken(name, format!("expected exactly one assistant message, found {}", outputs.len()));
    };
    let field = format!("{name}[0]");
    let message = message(only, &field)?;
    if message.role != Role::Assistant {
        let role = Role::NAMES[message.role as usize];
        return broken(format!("{field}.role"), format!("expected \"assistant\", found \"{role}\""));
    }
    if message.content.trim().is_empty() {
        return broken(format!("{field}.content"), "empty; an output needs text to train on");
    }
    Ok(message)
}

fn list<'a>(value: Option<&'a Value>, field: &str) -> Result<&'a Vec<Value>, RecordError> {
    match value {
        Some(Value::Array(items)) => Ok(items),
        Some(other) => broken(field, format!("expected a list of messages, found {}", kind(other))),
        None => broken(field, "missing"),
    }
}

fn message(value: &Value, field: &str) -> Result<Message, RecordError> {
    let Value::Object(object) = value else {
        return broken(field, format!("expected an object with `role` and `content`, found {}", kind(value)));
    };
    let expected = Role::NAMES.join(", ");
    let role = match object.get("role") {
        Some(Value::String(name)) => match Role::parse(name) {
            Some(role) => role,
            None => {
                return broken(
                    format!("{field}.role"),
                    format!("unknown role \"{}\" (expected one of {expected})", plain::quoted(name)),
                );
            }
        },
        Some(other) => {
            return broken(format!("{field}.role"), format!("expected a string, found {}", kind(other)));
        }
        None => return broken(format!("{field}.role"), "missing"),
    };
    let content = match object.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(other) => {
            return broken(format!("{field}.content"), format!("expected a string, found {}", kind(other)));
        }
        None => return broken(format!("{field}.content"), "missing"),
    };
    // Libraries of tables write null where a message has no such field.
    let unknown = |(key, value): &(&String, &Value)| *key != "role" && *key != "content" && !value.is_null();
    if let Some((key, _)) = object.iter().find(unknown) {
        return broken(
            field,
            format!("unknown field `{}` (only `role` and `content` are supported)", plain::quoted(key)),
        );
    }
    Ok(Message { role, content })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn error_of(line: &str) -> String {
        PreferencePair::parse(line).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_good_line() {
        let pair = PreferencePair::parse(GOOD).unwrap();
        assert_eq!(pair.messages, [Message { role: Role::User, content: "Hi".into() }]);
        assert_eq!(pair.preferred.content, "Hello");
        assert_eq!(pair.non_preferred.content, "No");
    }

    #[test]
    fn every_broken_rule_names_its_field() {
        let cases = [
            (r#"{"input""#.to_owned(), "record: not valid JSON (EOF while parsing an object at column 8)"),
            ("[1]".to_owned(), "record: expected a JSON object, found a list"),
            (GOOD.replace("\"input\":{", "\"inputs\":{"), "record: unknown field `inputs`"),
            (
                GOOD.replace("\"user\"", "\"human\""),
                "input.messages[0].role: unknown role \"human\" (expected one of system, user, assistant, tool)",
            ),
            (
                GOOD.replace("\"user\"", "\"assistant\""),
                "input.messages[0].role: the last message must not be the assistant's: the two outputs answer it",
            ),
            (
                GOOD.replace(r#"[{"role":"user","content":"Hi"}]"#, "[]"),
                "input.messages: empty; expected at least one message",
            ),
            (
                GOOD.replace("Hello", "  "),
                "preferred_output[0].content: empty; an output needs text to train on",
            ),
            (
                GOOD.replace(
                    r#"[{"role":"assistant","content":"No"}]"#,
                    r#"[{"role":"assistant","content":"No"},{"role":"assistant","content":"Nope"}]"#,
                ),
                "non_preferred_output: expected exactly one assistant message, found 2",
            ),
            (
                GOOD.replace(
                    r#"[{"role":"assistant","content":"No"}]"#,
                    r#"[{"role":"user","content":"No"}]"#,
                ),
                "non_preferred_output[0].role: expected \"assistant\", found \"user\"",
            ),
            (
                GOOD.replace("\"content\":\"Hi\"", "\"content\":\"Hi\",\"content\":\"Ho\""),
                "record: field `content` is there twice at column 61",
            ),
            (
                GOOD.replace("\"preferred_output\"", "\"input\":{},\"preferred_output\""),
                "record: field `input` is there twice at column 62",
            ),
            (
                GOOD.replace("\"role\":\"user\"", "\"name\":\"Ada\",\"role\":\"user\""),
                "input.messages[0]: unknown field `name` (only `role` and `content` are supported)",
            ),
            (GOOD.replace("\"Hi\"", "7"), "input.messages[0].content: expected a string, found a number"),
        ];
        for (line, expected) in cases {
            assert_eq!(error_of(&line), expected, "{line}");
        }
    }
    #[test]
    fn of_a_long_key_or_word_little_is_quoted() {
        let long = "k".repeat(1 << 20);
        for line in [
            format!("{{\"{long}\": 1}}"),
            format!("{{\"{long}\": 1, \"{long}\": 2}}"),
            format!("{{\"input\": {{\"{long}\": 1}}}}"),
            format!("{{\"input\": {{\"messages\": [{{\"role\": \"{long}\"}}]}}}}"),
            format!(
                "{{\"input\": {{\"messages\": [{{\"role\": \"user\", \"content\": \"\", \"{long}\": 1}}]}}}}"
            ),
        ] {
            let error = error_of(&line);
            assert!(error.len() < 250 && error.contains("kkk"), "{error}");
        }
    }

    #[test]
    fn text_that_is_no_unicode_and_nesting_without_end_are_no_json() {
        let deep = format!("{}7{}", "[".repeat(100_000), "]".repeat(100_000));
        for line in [
            GOOD.replace("Hi", "\\ud800"),
            GOOD.replace("Hi", "\\udc00x"),
            GOOD.replace("\"Hi\"", &deep),
            deep,
        ] {
            assert!(error_of(&line).starts_with("record: not valid JSON ("), "{}", error_of(&line));
        }
    }
}
