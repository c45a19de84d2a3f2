//! Messages of a conversation, as chat templates take them.

use super::json::Json;

/// Role of a message's author.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    pub(super) const NAMES: [&'static str; 4] = ["system", "user", "assistant", "tool"];

    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "system" => Some(Self::System),
            "user" => Some(Self::User),
            "assistant" => Some(Self::Assistant),
            "tool" => Some(Self::Tool),
            _ => None,
        }
    }

    /// The name in data files and templates.
    #[must_use]
    pub const fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// Content of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MessageContent {
    /// A text.
    Text(String),
    /// A list of text parts.
    Parts(Vec<String>),
}

impl MessageContent {
    /// The whole text; parts are joined without a separator.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts.concat(),
        }
    }

    /// Whether there is only white space.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Text(text) => text.trim().is_empty(),
            Self::Parts(parts) => parts.iter().all(|part| part.trim().is_empty()),
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Role of the author.
    pub role: Role,
    /// What the author says; absent where a file has null, as beside tool calls.
    pub content: Option<MessageContent>,
    /// The assistant's reasoning before its answer; `reasoning`, `reasoning_content` or `thinking` in files.
    pub reasoning: Option<String>,
    /// Calls of tools by the assistant as in the file. Their arguments are objects, or JSON texts of objects.
    pub tool_calls: Vec<Json>,
    /// The call that a tool's message answers.
    pub tool_call_id: Option<String>,
    /// Name of the author or tool.
    pub name: Option<String>,
    /// Whether the message is trained (`weight` 1 or 0 in files); absent counts as 1 for the assistant's messages.
    pub weight: Option<bool>,
}

impl Message {
    /// A message with text alone.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            content: Some(MessageContent::Text(text.into())),
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            weight: None,
        }
    }

    /// Whether it is the assistant's and its `weight` is not 0.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        self.role == Role::Assistant && self.weight != Some(false)
    }

    /// The whole text of its content; empty without one.
    #[must_use]
    pub fn text(&self) -> String {
        self.content.as_ref().map_or_else(String::new, MessageContent::text)
    }

    /// Every text in it.
    pub(super) fn into_texts(self) -> impl Iterator<Item = String> {
        let text = self.text();
        let calls = self.tool_calls.into_iter().map(|call| call.text().to_owned());
        [Some(text), self.reasoning].into_iter().flatten().chain(calls)
    }
}
