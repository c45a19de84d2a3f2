//! The form of TRL's `DPOTrainer`: `prompt`, `chosen` and `rejected`, all three texts or all three lists of messages.
//!
//! ```json
//! {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
//! {"prompt": [{"role": "user", "content": "Hi"}],
//!  "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": [{"role": "assistant", "content": "No"}]}
//! ```
//!
//! Without `prompt`, the common beginning of `chosen` and `rejected` is the prompt, by the rule of TRL's `extract_prompt`. Other columns
//! are ignored, as in TRL; columns that would change a text are refused.

use serde_json::{Map, Value};

use super::{Form, PassedOver};
use crate::pairs::fields::{self, kind};
use crate::pairs::{Conversation, Message, PlainText, PreferencePair, RecordError, broken};
use crate::plain;

pub(super) const FORM: Form = Form {
    name: "TRL",
    fields: "`prompt`, `chosen` and `rejected`",
    recognises: |record| record.contains_key("chosen") || record.contains_key("rejected"),
    parse: read,
    check: |line, passed_over| read(line, passed_over).map(drop),
};

/// Columns that TRL reads and Dyad does not support.
const REFUSED: [&str; 4] = ["tools", "chat_template_kwargs", "image", "images"];
/// Maximum number of ignored columns that are named.
const MOST_NAMED: usize = 16;

fn read(line: &str, passed_over: &mut PassedOver) -> Result<PreferencePair, RecordError> {
    let record = fields::record(line)?;
    for (key, value) in &record {
        let is_set =
            !value.is_null() && *value != Value::Array(Vec::new()) && *value != Value::Object(Map::new());
        match key.as_str() {
            "prompt" | "chosen" | "rejected" => {}
            refused if REFUSED.contains(&refused) && is_set => {
                return broken(refused, "not supported; remove the column");
            }
            refused if REFUSED.contains(&refused) => {}
            other if passed_over.len() < MOST_NAMED => {
                passed_over.insert(plain::quoted(other).into_owned());
            }
            _ => {}
        }
    }
    let prompt = record.get("prompt").filter(|prompt| !prompt.is_null());
    match (prompt, record.get("chosen"), record.get("rejected")) {
        (Some(Value::String(prompt)), chosen, rejected) => {
            text(prompt.clone(), fields::text(chosen, "chosen")?, fields::text(rejected, "rejected")?)
        }
        (Some(Value::Array(_)), chosen, rejected) => {
            let prompt = fields::messages(prompt, "prompt")?;
            conversation(prompt, fields::messages(chosen, "chosen")?, fields::messages(rejected, "rejected")?)
        }
        (Some(other), ..) => {
            broken("prompt", format!("expected a string or a list of messages, found {}", kind(other)))
        }
        (None, Some(Value::String(chosen)), rejected) => {
            implicit_text(chosen, fields::text(rejected, "rejected")?)
        }
        (None, chosen, rejected) => implicit_conversation(
            fields::messages(chosen, "chosen")?,
            fields::messages(rejected, "rejected")?,
        ),
    }
}

fn text(prompt: String, chosen: &str, rejected: &str) -> Result<PreferencePair, RecordError> {
    fields::output(chosen, "chosen")?;
    fields::output(rejected, "rejected")?;
    Ok(PreferencePair::Text(PlainText { prompt, chosen: chosen.to_owned(), rejected: rejected.to_owned() }))
}

fn conversation(
    prompt: Vec<Message>,
    chosen: Vec<Message>,
    rejected: Vec<Message>,
) -> Result<PreferencePair, RecordError> {
    Ok(PreferencePair::Conversation(Conversation {
        messages: fields::prompt(prompt, "prompt")?,
        preferred: fields::answer(chosen, "chosen", 0)?,
        non_preferred: fields::answer(rejected, "rejected", 0)?,
    }))
}

/// Length of the common beginning by TRL's rule: at least one item of each remains.
fn common<T: PartialEq>(chosen: &[T], rejected: &[T]) -> usize {
    let same = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
    same.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1))
}

fn implicit_conversation(
    mut chosen: Vec<Message>,
    mut rejected: Vec<Message>,
) -> Result<PreferencePair, RecordError> {
    let shared = common(&chosen, &rejected);
    let (chosen_end, rejected_end) = (chosen.split_off(shared), rejected.split_off(shared));
    if shared == 0 {
        return broken(
            "record",
            "`prompt` is missing, and `chosen` and `rejected` do not begin with the same messages",
        );
    }
    Ok(PreferencePair::Conversation(Conversation {
        messages: fields::prompt(chosen, "chosen")?,
        preferred: fields::answer(chosen_end, "chosen", shared)?,
        non_preferred: fields::answer(rejected_end, "rejected", shared)?,
    }))
}

fn implicit_text(chosen: &str, rejected: &str) -> Result<PreferencePair, RecordError> {
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

    fn parsed(line: &str) -> Result<PreferencePair, String> {
        FORM.parse(line).map_err(|error| error.to_string())
    }

    fn plain_text(prompt: &str, chosen: &str, rejected: &str) -> PreferencePair {
        let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(str::to_owned);
        PreferencePair::Text(PlainText { prompt, chosen, rejected })
    }

    fn chat(prompt: &str, chosen: &str, rejected: &str) -> PreferencePair {
        let message = |role, content: &str| Message { role, content: content.to_owned() };
        PreferencePair::Conversation(Conversation {
            messages: vec![message(Role::User, prompt)],
            preferred: message(Role::Assistant, chosen),
            non_preferred: message(Role::Assistant, rejected),
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

    #[test]
    fn every_broken_rule_names_its_field() {
        let cases = [
            (r#"{"prompt": "a", "chosen": "b"}"#, "rejected: missing"),
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
                "tools: not supported; remove the column",
            ),
            (
                r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "rejected": []}"#,
                "chosen: expected exactly one assistant message, found 2",
            ),
            (
                r#"{"chosen": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}"#,
                "chosen[1].role: expected \"assistant\", found \"user\"",
            ),
            (
                r#"{"prompt": "a", "prompt": "b", "chosen": "b", "rejected": "c"}"#,
                "record: field `prompt` is there twice at column 24",
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
