//! The form of hosted fine-tuning APIs (OpenAI, Azure, Together): a conversation and one answer of each kind.
//!
//! ```json
//! {"input": {"messages": [{"role": "user", "content": "Hi"}]},
//!  "preferred_output": [{"role": "assistant", "content": "Hello! How can I help?"}],
//!  "non_preferred_output": [{"role": "assistant", "content": "What."}]}
//! ```

mod quick;

use serde_json::{Map, Value};

use self::quick::QuickPair;
use super::{Form, PassedOver};
use crate::pairs::fields::{self, kind};
use crate::pairs::{Conversation, PreferencePair, RecordError, broken};
use crate::plain;

const KEYS: [&str; 3] = ["input", "preferred_output", "non_preferred_output"];

/// Unknown fields are errors, so that a misspelt name does not go unnoticed.
pub(super) const FORM: Form = Form {
    name: "hosted API",
    fields: "`input`, `preferred_output` and `non_preferred_output`",
    recognises: |record| KEYS.iter().any(|key| record.contains_key(*key)),
    parse: |line, _| parse(line),
    check: |line, _: &mut PassedOver| check(line),
};

/// Reads one line and checks all rules.
fn parse(line: &str) -> Result<PreferencePair, RecordError> {
    QuickPair::read(line).map_or_else(|| by_the_rules(line), |pair| Ok(pair.into()))
}

/// Checks all rules of one line.
fn check(line: &str) -> Result<(), RecordError> {
    QuickPair::read(line).map_or_else(|| by_the_rules(line).map(drop), |_| Ok(()))
}

fn by_the_rules(line: &str) -> Result<PreferencePair, RecordError> {
    let record = fields::record(line)?;
    for (key, value) in &record {
        if !KEYS.contains(&key.as_str()) && !value.is_null() {
            return broken("record", format!("unknown field `{}`", plain::quoted(key)));
        }
    }
    let output = |name: &str| fields::answer(fields::messages(record.get(name), name)?, name, 0);
    Ok(PreferencePair::Conversation(Conversation {
        messages: conversation(&record)?,
        preferred: output("preferred_output")?,
        non_preferred: output("non_preferred_output")?,
    }))
}

fn conversation(record: &Map<String, Value>) -> Result<Vec<crate::pairs::Message>, RecordError> {
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
    let field = "input.messages";
    fields::prompt(fields::messages(input.get("messages"), field)?, field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairs::{Message, Role};

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn error_of(line: &str) -> String {
        parse(line).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_good_line() {
        let PreferencePair::Conversation(pair) = parse(GOOD).unwrap() else { panic!("no conversation") };
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
    fn long_keys_and_values_are_cut_in_errors() {
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
    fn lone_surrogates_and_deep_nesting_are_invalid_json() {
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
