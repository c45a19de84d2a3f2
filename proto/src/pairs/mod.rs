//! Preference pairs and the files that hold them.
//!
//! - [`forms`]: how a JSON object describes a pair. Each form is one file and one line in [`forms::FORMS`].
//! - [`source`]: access to pairs by number. Each kind of file implements [`source::PairSource`].
//! - [`open`]: opens a file by its kind.
//! - [`json_lines`]: JSON Lines, the only kind of file so far.

mod fields;
mod format;
pub mod forms;
pub mod json_lines;
pub mod open;
pub mod source;
mod strict;
mod wired;

use serde::{Deserialize, Serialize};

/// Role of a message's author.
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

/// One message of a conversation, as chat templates take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Role of the author.
    pub role: Role,
    /// Text of the message.
    pub content: String,
}

/// A prompt and two outputs, one of them preferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PreferencePair {
    /// A conversation, which the model's chat template renders as text.
    Conversation(Conversation),
    /// Text that goes to the tokenizer unchanged.
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
    /// The text that both outputs continue.
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

/// Error for a line that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct RecordError {
    /// Path of the field, e.g. `input.messages[2].role`; `record` for the line as a whole.
    pub field: String,
    /// The problem, and what was expected.
    pub problem: String,
}

fn broken<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, RecordError> {
    Err(RecordError { field: field.into(), problem: problem.into() })
}
