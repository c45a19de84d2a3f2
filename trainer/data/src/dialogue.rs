//! A conversation of a data file as a chat template takes it.

use dyad_proto::Fault;
use dyad_proto::pairs::{Conversation, Json, Message, MessageContent};
use serde_json::{Map, Value, json};

use crate::rendered::{Chat, Rendered};
use crate::tokenizer::ChatTokenizer;

/// Messages, tools and variables, ready to be rendered.
#[derive(Debug)]
pub(crate) struct Dialogue<'t> {
    pub(crate) tokenizer: &'t ChatTokenizer,
    messages: Vec<Value>,
    tools: Option<Value>,
    variables: Option<Map<String, Value>>,
}

impl<'t> Dialogue<'t> {
    /// The prompt of a conversation, followed by some messages.
    pub(crate) fn of(tokenizer: &'t ChatTokenizer, said: &Conversation, output: &[Message]) -> Self {
        let messages = said.prompt.iter().chain(output).map(|message| as_json(tokenizer, message));
        let variables = said.chat_template_kwargs.as_ref().map(Json::value);
        Self {
            tokenizer,
            messages: messages.collect(),
            tools: said.tools.as_ref().map(Json::value),
            variables: variables.and_then(|value| match value {
                Value::Object(variables) => Some(variables),
                _ => None,
            }),
        }
    }

    /// The same with another text in one message.
    pub(crate) fn with_text(&self, at: usize, text: &str) -> Self {
        let mut messages = self.messages.clone();
        if let Some(Value::Object(message)) = messages.get_mut(at) {
            message.insert("content".into(), text.into());
        }
        Self { messages, tools: self.tools.clone(), variables: self.variables.clone(), ..*self }
    }

    /// A conversation of one message, the user's.
    pub(crate) fn asked(&self) -> Self {
        let messages = vec![json!({ "role": "user", "content": "a" })];
        Self { messages, tools: self.tools.clone(), variables: self.variables.clone(), ..*self }
    }

    /// Renders the first `count` messages.
    pub(crate) fn beginning(&self, count: usize, add_generation_prompt: bool) -> Result<String, Fault> {
        self.tokenizer.render_chat(&self.chat(count, add_generation_prompt))
    }

    /// Renders all messages.
    pub(crate) fn whole(&self) -> Result<String, Fault> {
        self.beginning(self.messages.len(), false)
    }

    /// Renders all messages, and finds what generation blocks write; `None` if the template has no such blocks.
    pub(crate) fn marked(&self) -> Result<Option<Rendered>, Fault> {
        let marks = self.tokenizer.marks_generation(self.tools.is_some());
        marks.then(|| self.tokenizer.render_marked(&self.chat(self.messages.len(), false))).transpose()
    }

    fn chat(&self, count: usize, add_generation_prompt: bool) -> Chat<'_> {
        Chat {
            messages: &self.messages[..count.min(self.messages.len())],
            tools: self.tools.as_ref(),
            documents: None,
            variables: self.variables.as_ref(),
            add_generation_prompt,
        }
    }
}

impl ChatTokenizer {
    /// Renders a conversation, with the start of the assistant's turn if `add_generation_prompt`.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Fault> {
        let dialogue = Dialogue::of(self, &Conversation::default(), messages);
        dialogue.beginning(messages.len(), add_generation_prompt)
    }

    /// Renders the prompt of a record, with the start of the assistant's turn.
    pub fn render_prompt(&self, said: &Conversation) -> Result<String, Fault> {
        Dialogue::of(self, said, &[]).beginning(said.prompt.len(), true)
    }
}

/// The message as a JSON object.
fn as_json(tokenizer: &ChatTokenizer, message: &Message) -> Value {
    let mut object = Map::new();
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            object.insert(key.into(), value);
        }
    };
    let calls = || message.tool_calls.iter().map(|call| call_json(tokenizer, call)).collect::<Vec<_>>();
    put("role", Some(message.role.name().into()));
    put("content", message.content.as_ref().map(|content| content_json(tokenizer, message, content)));
    put("reasoning", message.reasoning.clone().map(Value::from));
    put("tool_calls", (!message.tool_calls.is_empty()).then(|| calls().into()));
    put("tool_call_id", message.tool_call_id.clone().map(Value::from));
    put("name", message.name.clone().map(Value::from));
    Value::Object(object)
}

/// A tool call. Templates get arguments as an object, except those that fail on objects.
fn call_json(tokenizer: &ChatTokenizer, call: &Json) -> Value {
    let mut call = call.value();
    if tokenizer.takes_argument_objects() {
        let function = if call.get("function").is_some() { &mut call["function"] } else { &mut call };
        if let Some(Ok(arguments)) = function["arguments"].as_str().map(serde_json::from_str) {
            function["arguments"] = arguments;
        }
    }
    call
}

fn content_json(tokenizer: &ChatTokenizer, message: &Message, content: &MessageContent) -> Value {
    match content {
        MessageContent::Text(text) => text.as_str().into(),
        MessageContent::Parts(parts) if tokenizer.takes_parts(message.role) => {
            parts.iter().map(|text| json!({ "type": "text", "text": text })).collect()
        }
        // Templates that take parts write them one after the other.
        MessageContent::Parts(_) => content.text().into(),
    }
}
