//! Single answers for supervised fine-tuning: `prompt` and `completion`, both texts or both lists of messages.
//!
//! ```json
//! {"prompt": "The sky is", "completion": " blue."}
//! {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
//! ```

use serde_json::{Map, Value};

use super::{Form, around, given, refuse_around_text};
use crate::pairs::fields::{self, kind};
use crate::pairs::{Content, Conversation, Example, Kind, PlainText, RecordError, broken, columns};
use crate::run_config::DatasetFormat;

pub(super) const COLUMNS: [&str; 5] = ["prompt", "completion", "tools", "chat_template_kwargs", "weight"];

pub(super) const FORM: Form = Form {
    format: DatasetFormat::PromptCompletion,
    name: "single answers",
    fields: "`prompt` and `completion`",
    kind: Kind::Answer,
    recognises: |record| record.contains_key("completion"),
    read: |record, passed_over| {
        columns::pass_over(record, &COLUMNS, passed_over)?;
        Ok(Example { weight: columns::weight(record)?, ..Example::new(content(record)?) })
    },
    quick: None,
};

/// Reads `prompt` and `completion`.
pub(super) fn content(record: &Map<String, Value>) -> Result<Content, RecordError> {
    match given(record, "prompt") {
        Some(Value::String(prompt)) => {
            refuse_around_text(record)?;
            let chosen = fields::text(record.get("completion"), "completion")?.to_owned();
            fields::output(&chosen, "completion")?;
            Ok(Content::Text(PlainText { prompt: Some(prompt.clone()), chosen, rejected: None }))
        }
        Some(prompt @ Value::Array(_)) => {
            let completion = fields::messages(record.get("completion"), "completion")?;
            Ok(Content::Conversation(Conversation {
                prompt: fields::prompt(fields::messages(Some(prompt), "prompt")?, "prompt")?,
                chosen: fields::answer(completion, "completion", 0)?,
                ..around(record)?
            }))
        }
        Some(other) => {
            broken("prompt", format!("expected a string or a list of messages, found {}", kind(other)))
        }
        None => broken("prompt", "missing"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairs::{Message, Role};

    #[test]
    fn prompt_and_completion_are_both_texts_or_both_messages() {
        let text = FORM.parse(r#"{"prompt": "a", "completion": " b"}"#).unwrap();
        let expected = PlainText { prompt: Some("a".into()), chosen: " b".into(), rejected: None };
        assert_eq!(text.content, Content::Text(expected));
        let line = r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}], "tools": "[{}]"}"#;
        let Content::Conversation(said) = FORM.parse(line).unwrap().content else {
            panic!("no conversation")
        };
        assert_eq!(
            (said.prompt, said.chosen),
            (vec![Message::new(Role::User, "a")], vec![Message::new(Role::Assistant, "b")])
        );
        let cases = [
            (r#"{"completion": "b"}"#, "prompt: missing"),
            (
                r#"{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}"#,
                "completion: expected a string, found a list",
            ),
            (r#"{"prompt": "a", "completion": ""}"#, "completion: empty; an output needs text to train on"),
            (
                r#"{"prompt": "a", "completion": "b", "tools": [{}]}"#,
                "tools: plain text has no chat template, which would read it; write messages",
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(FORM.parse(line).unwrap_err().to_string(), expected, "{line}");
        }
    }
}
