//! Preference pairs: what a pair is, and where pairs come from.
//!
//! - [`forms`]: how a line of JSON says a pair. A form is one file, and one line in [`forms::FORMS`].
//! - [`source`]: pairs by number, wherever they lie. A kind of file is one type behind [`source::PairSource`].
//! - [`open`]: which kind of file a path is.
//! - [`json_lines`]: the one kind that there is, JSON Lines.

mod fields;
mod format;
pub mod forms;
pub mod json_lines;
pub mod open;
pub mod source;
mod strict;
mod wired;

use serde::{Deserialize, Serialize};

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

    const fn name(self) -> &'static str {
        Self::NAMES[self as usize]
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

/// A prompt and two outputs, one of them preferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PreferencePair {
    /// A conversation, which the model's chat template makes text of.
    Conversation(Conversation),
    /// Text that goes to the tokenizer as it stands.
    Text(PlainText),
}

/// A conversation and two answers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// The conversation up to the answer; never empty, never ends with the assistant.
    pub messages: Vec<Message>,
    /// The answer to move towards.
    pub preferred: Message,
    /// The answer to move away from.
    pub non_preferred: Message,
}

/// A text and two continuations of it. No chat template is applied; the end-of-sequence token is added to both continuations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainText {
    /// What both continue.
    pub prompt: String,
    /// The continuation to move towards.
    pub chosen: String,
    /// The continuation to move away from.
    pub rejected: String,
}

impl PreferencePair {
    /// Every text in it, e.g. to train a tokenizer on.
    pub fn into_texts(self) -> Vec<String> {
        match self {
            Self::Conversation(Conversation { messages, preferred, non_preferred }) => {
                let messages = messages.into_iter().chain([preferred, non_preferred]);
                messages.map(|message| message.content).collect()
            }
            Self::Text(PlainText { prompt, chosen, rejected }) => vec![prompt, chosen, rejected],
        }
    }
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
