//! Conversations for chat templates, with everything that a template can read, and their texts.

use std::ops::Range;

use serde_json::{Map, Value};

/// A conversation as transformers' `apply_chat_template` takes it.
///
/// Values are JSON. Templates see them as Python's `json.loads` would make them: objects keep the order of their keys, `1` is not `1.0`.
#[derive(Clone, Copy, Debug)]
pub struct Chat<'a> {
    /// Objects with `role`, `content`, `tool_calls`, `reasoning_content` and any other fields. Fields that are null count as missing.
    pub messages: &'a [Value],
    /// JSON schemas. An empty list is not the same as none for every template.
    pub tools: Option<&'a Value>,
    /// Objects with `title` and `text`.
    pub documents: Option<&'a Value>,
    /// Further variables of the template (TRL's `chat_template_kwargs`).
    pub variables: Option<&'a Map<String, Value>>,
    /// Whether the text ends with the start of the assistant's turn.
    pub add_generation_prompt: bool,
}

impl<'a> Chat<'a> {
    /// A conversation without tools, documents and variables.
    #[must_use]
    pub fn of(messages: &'a [Value]) -> Self {
        Self { messages, tools: None, documents: None, variables: None, add_generation_prompt: false }
    }
}

/// The text of a conversation, and which parts of it the model is meant to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// Byte ranges of what `{% generation %}` blocks wrote, in order.
    pub generated: Vec<Range<usize>>,
}

/// Ids of a text, and which of them the model is meant to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marked {
    /// Ids of the whole text.
    pub ids: Vec<u32>,
    /// For each id, whether a generation block wrote it: transformers' `assistant_masks`.
    pub generated: Vec<bool>,
}
