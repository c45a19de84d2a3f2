//! The form of TRL's `DPOTrainer`: `prompt`, `chosen` and `rejected`, all three texts or all three lists of messages.
//!
//! ```json
//! {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
//! {"prompt": [{"role": "user", "content": "Hi"}],
//!  "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": [{"role": "assistant", "content": "No"}]}
//! ```
//!
//! Without `prompt`, the common beginning of `chosen` and `rejected` is the prompt, by the rule of TRL's `extract_prompt`. The same
//! holds if `prompt` is a text beside two lists of messages, as in UltraFeedback: the lists hold the prompt.

use serde_json::{Map, Value};

use super::{Form, PassedOver, around, given, refuse_around_text};
use crate::pairs::fields::{self, kind};
use crate::pairs::{Content, Conversation, Example, Kind, Message, PlainText, RecordError, broken, columns};
use crate::run_config::DatasetFormat;

const COLUMNS: [&str; 6] = ["prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "weight"];

pub(super) const FORM: Form = Form {
    format: DatasetFormat::Preference,
    name: "TRL",
    fields: "`prompt`, `chosen` and `rejected`",
    kind: Kind::Pair,
    recognises: |record| record.contains_key("chosen") || record.contains_key("rejected"),
    read,
    quick: None,
};

fn read(record: &Map<String, Value>, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
    columns::pass_over(record, &COLUMNS, passed_over)?;
    let content = match (given(record, "prompt"), record.get("chosen"), record.get("rejected")) {
        (Some(Value::String(prompt)), Some(Value::Array(_)), Some(Value::Array(_))) => {
            beside_a_text(record, prompt)?
        }
        (Some(Value::String(prompt)), chosen, rejected) => {
            refuse_around_text(record)?;
            text(prompt.clone(), fields::text(chosen, "chosen")?, fields::text(rejected, "rejected")?)?
        }
        (Some(prompt @ Value::Array(_)), chosen, rejected) => Content::Conversation(Conversation {
            prompt: fields::prompt(fields::messages(Some(prompt), "prompt")?, "prompt")?,
            chosen: fields::answer(fields::messages(chosen, "chosen")?, "chosen", 0)?,
            rejected: fields::answer(fields::messages(rejected, "rejected")?, "rejected", 0)?,
            ..around(record)?
        }),
        (Some(other), ..) => {
            return broken(
                "prompt",
                format!("expected a string or a list of messages, found {}", kind(other)),
            );
        }
        (None, Some(Value::String(chosen)), rejected) => {
            refuse_around_text(record)?;
            implicit_text(chosen, fields::text(rejected, "rejected")?)?
        }
        (None, ..) => implicit_conversation(record)?,
    };
    Ok(Example { weight: columns::weight(record)?, ..Example::new(content) })
}

/// Two lists of messages that hold the prompt, which is a text as well.
fn beside_a_text(record: &Map<String, Value>, prompt: &str) -> Result<Content, RecordError> {
    let content = implicit_conversation(record)?;
    let Content::Conversation(said) = &content else { return Ok(content) };
    match said.prompt.iter().any(|message| message.text().trim() == prompt.trim()) {
        true => Ok(content),
        false => broken(
            "prompt",
            "a text beside messages, and no message that `chosen` and `rejected` begin with is this text; write it as a list of messages",
        ),
    }
}

fn text(prompt: String, chosen: &str, rejected: &str) -> Result<Content, RecordError> {
    fields::output(chosen, "chosen")?;
    fields::output(rejected, "rejected")?;
    let (chosen, rejected) = (chosen.to_owned(), Some(rejected.to_owned()));
    Ok(Content::Text(PlainText { prompt: Some(prompt), chosen, rejected }))
}

/// Length of the common beginning by TRL's rule: at least one item of each remains.
fn common<T: PartialEq>(chosen: &[T], rejected: &[T]) -> usize {
    let same = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
    same.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1))
}

fn implicit_conversation(record: &Map<String, Value>) -> Result<Content, RecordError> {
    let mut chosen: Vec<Message> = fields::messages(record.get("chosen"), "chosen")?;
    let mut rejected: Vec<Message> = fields::messages(record.get("rejected"), "rejected")?;
    let shared = common(&chosen, &rejected);
    let (chosen_end, rejected_end) = (chosen.split_off(shared), rejected.split_off(shared));
    if shared == 0 {
        return broken(
            "record",
            "`chosen` and `rejected` do not begin with the same messages, and no list `prompt` says what they answer",
        );
    }
    Ok(Content::Conversation(Conversation {
        prompt: fields::prompt(chosen, "chosen")?,
        chosen: fields::answer(chosen_end, "chosen", shared)?,
        rejected: fields::answer(rejected_end, "rejected", shared)?,
        ..around(record)?
    }))
}

fn implicit_text(chosen: &str, rejected: &str) -> Result<Content, RecordError> {
    let letters = |text: &str| text.chars().collect::<Vec<char>>();
    let (chosen, rejected) = (letters(chosen), letters(rejected));
    let mut shared = common(&chosen, &rejected);
    let differs = chosen.get(shared) != rejected.get(shared);
    // A space before the first difference belongs to the answers.
    if differs && shared > 0 && chosen[shared - 1] == ' ' {
        shared -= 1;
    }
    if shared == 0 {
        return broken(
            "record",
            "`prompt` is missing, and `chosen` and `rejected` do not begin with the same text",
        );
    }
    let string = |letters: &[char]| letters.iter().collect::<String>();
    text(string(&chosen[..shared]), &string(&chosen[shared..]), &string(&rejected[shared..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairs::Role;

    fn parsed(line: &str) -> Result<Content, String> {
        FORM.parse(line).map(|example| example.content).map_err(|error| error.to_string())
    }

    fn plain_text(prompt: &str, chosen: &str, rejected: &str) -> Content {
        let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(str::to_owned);
        Content::Text(PlainText { prompt: Some(prompt), chosen, rejected: Some(rejected) })
    }

    fn chat(prompt: &str, chosen: &str, rejected: &str) -> Content {
        Content::Conversation(Conversation {
            prompt: vec![Message::new(Role::User, prompt)],
            chosen: vec![Message::new(Role::Assistant, chosen)],
            rejected: vec![Message::new(Role::Assistant, rejected)],
            ..Conversation::default()
        })
    }

    #[test]
    fn strings_become_plain_text() {
        let line = r#"{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}"#;
        assert_eq!(parsed(line), Ok(plain_text("The sky is", " blue.", " green.")));
    }

    #[test]
    fn messages_are_a_conversation() {
        let line = r#"{"prompt": [{"role": "user", "content": "Hi"}], "tools": null,
            "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": [{"role": "assistant", "content": "No"}]}"#;
        assert_eq!(parsed(line), Ok(chat("Hi", "Hello", "No")));
    }

    #[test]
    fn tools_and_template_variables_are_columns() {
        let line = r#"{"prompt": [{"role": "user", "content": "Hi"}], "tools": "[{\"type\": \"function\"}]", "chat_template_kwargs": {"b": 1, "a": null},
            "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": [{"role": "assistant", "content": "No"}]}"#;
        let Ok(Content::Conversation(said)) = parsed(line) else { panic!("no conversation") };
        assert_eq!(said.tools.unwrap().text(), r#"[{"type":"function"}]"#);
        assert_eq!(said.chat_template_kwargs.unwrap().text(), r#"{"b":1,"a":null}"#);
    }

    /// The examples of the documentation of TRL's `extract_prompt`, and its edges.
    #[test]
    fn a_missing_prompt_is_the_common_beginning() {
        let line = r#"{"chosen": [{"role": "user", "content": "What color is the sky?"}, {"role": "assistant", "content": "It is blue."}],
            "rejected": [{"role": "user", "content": "What color is the sky?"}, {"role": "assistant", "content": "It is green."}]}"#;
        assert_eq!(parsed(line), Ok(chat("What color is the sky?", "It is blue.", "It is green.")));
        let line = r#"{"chosen": "The sky is blue.", "rejected": "The sky is green."}"#;
        assert_eq!(parsed(line), Ok(plain_text("The sky is", " blue.", " green.")));
        // One text is the beginning of the other: both keep the last common character.
        let line = r#"{"chosen": "abc", "rejected": "abcd"}"#;
        assert_eq!(parsed(line), Ok(plain_text("ab", "c", "cd")));
        let line = r#"{"chosen": "x", "rejected": "y"}"#;
        assert!(parsed(line).unwrap_err().contains("do not begin with the same text"));
    }

    /// UltraFeedback-binarized: `chosen` and `rejected` hold the prompt, which is a column of text as well.
    #[test]
    fn a_prompt_of_text_beside_messages_is_the_one_in_the_messages() {
        let line = |prompt: &str| {
            format!(
                r#"{{"prompt": "{prompt}", "prompt_id": "f0e3", "score_chosen": 8.5, "score_rejected": 6, "messages": [],
                "chosen": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Hello"}}],
                "rejected": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "No"}}]}}"#
            )
        };
        assert_eq!(parsed(&line("Hi")), Ok(chat("Hi", "Hello", "No")));
        assert!(parsed(&line("Ho")).unwrap_err().starts_with("prompt: a text beside messages"));
    }

    #[test]
    fn every_broken_rule_names_its_field() {
        let cases = [
            (r#"{"prompt": "a", "chosen": "b"}"#, "rejected: missing"),
            (
                r#"{"prompt": "a", "chosen": "b", "regected": "c"}"#,
                "record: unknown field `regected`; did you mean `rejected`?",
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}"#,
                "rejected: expected a string, found a list",
            ),
            (
                r#"{"prompt": 7, "chosen": "b", "rejected": "c"}"#,
                "prompt: expected a string or a list of messages, found a number",
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "  "}"#,
                "rejected: empty; an output needs text to train on",
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]}"#,
                "tools: plain text has no chat template, which would read it; write messages",
            ),
            (
                r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}, {"role": "system", "content": "c"}], "rejected": []}"#,
                "chosen[1].role: an output holds no message of the system",
            ),
            (
                r#"{"chosen": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}"#,
                "chosen[1].role: an output begins with a message of the assistant, found \"user\"",
            ),
            (
                r#"{"prompt": "a", "prompt": "b", "chosen": "b", "rejected": "c"}"#,
                "record: field `prompt` is there twice at column 24",
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}"#,
                "images: images, audio and video are not supported: Dyad trains on text alone",
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(parsed(line).unwrap_err(), expected, "{line}");
        }
    }

    #[test]
    fn unread_columns_are_named() {
        let mut passed_over = PassedOver::new();
        let line = r#"{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7.5, "id": "x", "images": []}"#;
        FORM.check(line, &mut passed_over).unwrap();
        assert_eq!(passed_over.into_iter().collect::<Vec<_>>(), ["id", "score_chosen"]);
    }
}
