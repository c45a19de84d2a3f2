//! Records of data files: preference pairs, labelled answers, and answers alone.
//!
//! - [`forms`]: how a JSON object describes a record. Each form is one file and one line in [`forms::FORMS`].
//! - [`source`]: access to records by number.
//! - [`json_lines`]: a checked file of lines; [`windows`] reads it. `dyad-sources` turns other kinds of files into lines.
//! - [`notes`]: what the user should know about how files are read.

mod columns;
mod fields;
mod format;
pub mod forms;
mod json;
pub mod json_lines;
mod message;
pub mod notes;
pub mod source;
mod strict;
pub mod wanted;
pub mod windows;
mod wired;

pub use self::json::Json;
pub use self::message::{Message, MessageContent, Role};

/// One record of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// What is said.
    pub content: Content,
    /// Factor of the record's loss. 0: the record is left out.
    pub weight: f64,
    /// KTO: whether the answer is desirable. Such a record has no rejected answer.
    pub label: Option<bool>,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A conversation, which the model's chat template renders as text.
    Conversation(Conversation),
    /// Text that goes to the tokenizer unchanged.
    Text(PlainText),
}

/// A conversation and its continuations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The conversation up to the answer. Empty if `chosen` is one whole conversation.
    pub prompt: Vec<Message>,
    /// The answer to move towards; a whole conversation if there is no prompt. Never empty.
    pub chosen: Vec<Message>,
    /// The answer to move away from; empty if the record has only one answer.
    pub rejected: Vec<Message>,
    /// Tools that the model may call: a list.
    pub tools: Option<Json>,
    /// Further variables of the chat template: an object.
    pub chat_template_kwargs: Option<Json>,
}

/// A text and its continuations. No chat template is applied; the end-of-sequence token is added to the continuations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlainText {
    /// The text that is continued. Absent if `chosen` is one whole text.
    pub prompt: Option<String>,
    /// The continuation to move towards.
    pub chosen: String,
    /// The continuation to move away from; absent if the record has only one.
    pub rejected: Option<String>,
}

/// What the records of a form are good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Two answers, one of them preferred.
    Pair,
    /// One answer, and whether it is desirable.
    Labelled,
    /// One answer, or one whole conversation or text.
    Answer,
}

impl Example {
    /// A record of weight 1 without a label.
    #[must_use]
    pub fn new(content: Content) -> Self {
        Self { content, weight: 1.0, label: None }
    }

    /// Every text in it, e.g. to train a tokenizer on.
    pub fn into_texts(self) -> Vec<String> {
        match self.content {
            Content::Conversation(Conversation { prompt, chosen, rejected, tools, .. }) => {
                let messages = prompt.into_iter().chain(chosen).chain(rejected);
                let tools = tools.map(|tools| tools.text().to_owned());
                messages.flat_map(Message::into_texts).chain(tools).collect()
            }
            Content::Text(PlainText { prompt, chosen, rejected }) => {
                [prompt, Some(chosen), rejected].into_iter().flatten().collect()
            }
        }
    }
}

/// Error for a record that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct RecordError {
    /// Path of the field, e.g. `input.messages[2].role`; `record` for the record as a whole.
    pub field: String,
    /// The problem, and what was expected.
    pub problem: String,
}

fn broken<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, RecordError> {
    Err(RecordError { field: field.into(), problem: problem.into() })
}
