//! The form of hosted fine-tuning APIs (OpenAI, Azure, Together): a conversation and an output of each kind.
//!
//! ```json
//! {"input": {"messages": [{"role": "user", "content": "Hi"}]},
//!  "preferred_output": [{"role": "assistant", "content": "Hello! How can I help?"}],
//!  "non_preferred_output": [{"role": "assistant", "content": "What."}]}
//! ```

mod quick;

use serde_json::{Map, Value};

use self::quick::QuickPair;
use super::{Form, PassedOver, Quick};
use crate::pairs::columns;
use crate::pairs::fields::{self, is_set, kind, misspelt};
use crate::pairs::{Content, Conversation, Example, Kind, Message, RecordError, Role, broken};
use crate::plain;
use crate::run_config::DatasetFormat;

const KEYS: [&str; 3] = ["input", "preferred_output", "non_preferred_output"];
const COLUMNS: [&str; 4] = ["input", "preferred_output", "non_preferred_output", "weight"];
const INPUT: [&str; 3] = ["messages", "tools", "parallel_tool_calls"];

pub(super) const FORM: Form = Form {
    format: DatasetFormat::PreferenceOpenai,
    name: "hosted API",
    fields: "`input`, `preferred_output` and `non_preferred_output`",
    kind: Kind::Pair,
    recognises: |record| KEYS.iter().any(|key| record.contains_key(*key)),
    read,
    quick: Some(Quick {
        read: |line| QuickPair::read(line).map(Into::into),
        takes: |line| QuickPair::read(line).is_some(),
    }),
};

fn read(record: &Map<String, Value>, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
    columns::pass_over(record, &COLUMNS, passed_over)?;
    let conversation =
        Conversation { chosen: Vec::new(), rejected: Vec::new(), ..input(record.get("input"))? };
    let content = Content::Conversation(Conversation {
        chosen: output(record, "preferred_output")?,
        rejected: output(record, "non_preferred_output")?,
        ..conversation
    });
    Ok(Example { weight: columns::weight(record)?, ..Example::new(content) })
}

/// An output: messages of the assistant, and of tools between them.
fn output(record: &Map<String, Value>, field: &str) -> Result<Vec<Message>, RecordError> {
    let messages = fields::answer(fields::messages(record.get(field), field)?, field, 0)?;
    match messages.iter().position(|message| message.role == Role::User) {
        Some(at) => broken(
            format!("{field}[{at}].role"),
            "an output holds messages of the assistant and of tools, found \"user\"",
        ),
        None => Ok(messages),
    }
}

fn input(value: Option<&Value>) -> Result<Conversation, RecordError> {
    let input = match value {
        Some(Value::Object(input)) => input,
        Some(other) => {
            return broken("input", format!("expected an object with `messages`, found {}", kind(other)));
        }
        None => return broken("input", "missing"),
    };
    let unknown = |(key, value): &(&String, &Value)| !INPUT.contains(&key.as_str()) && is_set(value);
    if let Some((key, _)) = input.iter().find(unknown) {
        let meant = misspelt(key, &INPUT).map_or_else(
            || format!("it has {}", INPUT.join(", ")),
            |nearest| format!("did you mean `{nearest}`?"),
        );
        return broken("input", format!("unknown field `{}`; {meant}", plain::quoted(key)));
    }
    columns::parallel_tool_calls(input.get("parallel_tool_calls"), "input.parallel_tool_calls")?;
    let field = "input.messages";
    Ok(Conversation {
        prompt: fields::prompt(fields::messages(input.get("messages"), field)?, field)?,
        tools: columns::tools(input.get("tools"), "input.tools")?,
        ..Conversation::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn error_of(line: &str) -> String {
        FORM.parse(line).unwrap_err().to_string()
    }

    fn conversation(line: &str) -> Conversation {
        let Content::Conversation(pair) = FORM.parse(line).unwrap().content else {
            panic!("no conversation")
        };
        pair
    }

    #[test]
    fn reads_a_good_line() {
        let pair = conversation(GOOD);
        assert_eq!(pair.prompt, [Message::new(Role::User, "Hi")]);
        assert_eq!(pair.chosen, [Message::new(Role::Assistant, "Hello")]);
        assert_eq!(pair.rejected, [Message::new(Role::Assistant, "No")]);
    }

    #[test]
    fn tools_weights_and_outputs_of_several_messages_are_read() {
        let call = r#"{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]}"#;
        let answered = format!(
            r#"[{call},{{"role":"tool","tool_call_id":"c","content":"7"}},{{"role":"assistant","content":"Seven"}}]"#
        );
        let line = GOOD.replace(r#"[{"role":"assistant","content":"Hello"}]"#, &answered).replace(
            "\"input\":{",
            r#""weight":0.5,"source":"x","input":{"parallel_tool_calls":true,"tools":[{"type":"function"}],"#,
        );
        let pair = conversation(&line);
        assert_eq!((pair.chosen.len(), pair.chosen[0].tool_calls.len()), (3, 1));
        assert_eq!(pair.tools.as_ref().map(crate::pairs::Json::text), Some(r#"[{"type":"function"}]"#));
        assert_eq!(FORM.parse(&line).unwrap().weight, 0.5);
        let mut passed_over = PassedOver::new();
        FORM.check(&line, &mut passed_over).unwrap();
        assert_eq!(passed_over.into_iter().collect::<Vec<_>>(), ["source"]);
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "one case for each rule")]
    fn every_broken_rule_names_its_field() {
        let two = |role: &str| {
            GOOD.replace(
                r#"[{"role":"assistant","content":"No"}]"#,
                &format!(r#"[{{"role":"assistant","content":"No"}},{{"role":"{role}","content":"Nope"}}]"#),
            )
        };
        let cases = [
            (r#"{"input""#.to_owned(), "record: not valid JSON (EOF while parsing an object at column 8)"),
            ("[1]".to_owned(), "record: expected a JSON object, found a list"),
            (
                GOOD.replace("\"input\":{", "\"inputs\":{"),
                "record: unknown field `inputs`; did you mean `input`?",
            ),
            (
                GOOD.replace("preferred_output", "prefered_output"),
                "record: unknown field `prefered_output`; did you mean `preferred_output`?",
            ),
            (
                GOOD.replace("\"messages\"", "\"mesages\""),
                "input: unknown field `mesages`; did you mean `messages`?",
            ),
            (
                GOOD.replace("\"input\":{", "\"input\":{\"parallel_tool_calls\":1,"),
                "input.parallel_tool_calls: expected true or false, found a number",
            ),
            (
                GOOD.replace("\"input\":{", "\"input\":{\"tools\":{\"f\":1},"),
                "input.tools: expected a list of tools, found an object",
            ),
            (
                GOOD.replace("\"user\"", "\"human\""),
                "input.messages[0].role: unknown role \"human\" (expected one of system, user, assistant, tool)",
            ),
            (
                GOOD.replace("\"user\"", "\"assistant\""),
                "input.messages[0].role: the last message must not be the assistant's: the outputs answer it",
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
                GOOD.replace(r#"[{"role":"assistant","content":"No"}]"#, "[]"),
                "non_preferred_output: empty; expected a message of the assistant",
            ),
            (
                GOOD.replace(
                    r#"[{"role":"assistant","content":"No"}]"#,
                    r#"[{"role":"user","content":"No"}]"#,
                ),
                "non_preferred_output[0].role: an output begins with a message of the assistant, found \"user\"",
            ),
            (
                two("user"),
                "non_preferred_output[1].role: an output holds messages of the assistant and of tools, found \"user\"",
            ),
            (two("system"), "non_preferred_output[1].role: an output holds no message of the system"),
            (
                GOOD.replace("\"content\":\"No\"", "\"content\":\"No\",\"weight\":0"),
                "non_preferred_output: every message of the assistant has weight 0: nothing is left to train on",
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
                GOOD.replace("\"role\":\"user\"", "\"nam\":\"Ada\",\"role\":\"user\""),
                "input.messages[0]: unknown field `nam`; did you mean `name`?",
            ),
            (
                GOOD.replace("\"Hi\"", "7"),
                "input.messages[0].content: expected a string or a list of text parts, found a number",
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(error_of(&line), expected, "{line}");
        }
    }

    #[test]
    fn long_keys_and_values_are_cut_in_errors() {
        let long = "k".repeat(1 << 20);
        for line in [
            format!("{{\"input\": {{}}, \"{long}\": 1, \"{long}\": 2}}"),
            format!("{{\"input\": {{\"{long}\": 1}}}}"),
            format!("{{\"input\": {{\"messages\": [{{\"role\": \"{long}\"}}]}}}}"),
            format!(
                "{{\"input\": {{\"messages\": [{{\"role\": \"user\", \"content\": \"\", \"{long}\": 1}}]}}}}"
            ),
        ] {
            let error = error_of(&line);
            assert!(error.len() < 300 && error.contains("kkk"), "{error}");
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
