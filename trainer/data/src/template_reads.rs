//! What a chat template reads of a message, found out by rendering small conversations and by the words of its source.

use dyad_proto::pairs::Role;
use dyad_proto::wire::{ChatMessage, Pair, pair};
use serde_json::{Value, json};

use crate::rendered::Chat;
use crate::tokenizer::ChatTokenizer;

/// A field, words of which the source has one if it reads the field, and the note for the user if it has none.
type Field = (fn(&Pair) -> bool, &'static [&'static str], &'static str);

const FIELDS: [Field; 3] = [
    (
        |pair| conversation(pair).is_some_and(|said| said.tools.is_some()),
        &["tools"],
        "the chat template does not read tools: the model does not see them",
    ),
    (
        |pair| messages(pair).any(|message| !message.tool_calls.is_empty()),
        &["tool_calls"],
        "the chat template does not read tool_calls: the model does not see them",
    ),
    (
        |pair| messages(pair).any(|message| message.reasoning.is_some()),
        &["reasoning", "thinking"],
        "the chat template does not read reasoning: the model does not see it",
    ),
];

fn conversation(pair: &Pair) -> Option<&dyad_proto::wire::Conversation> {
    match &pair.content {
        Some(pair::Content::Conversation(said)) => Some(said),
        _ => None,
    }
}

fn messages(pair: &Pair) -> impl Iterator<Item = &ChatMessage> {
    conversation(pair).into_iter().flat_map(|said| [&said.prompt, &said.chosen, &said.rejected]).flatten()
}

impl ChatTokenizer {
    /// Whether the template takes a content that is a list of parts and writes it like the text. A template that does not may print the
    /// list as Python does.
    pub(crate) fn takes_parts(&self, role: Role) -> bool {
        *self.reads.parts[role as usize].get_or_init(|| {
            let text = self.answers(role, json!("Qx7"));
            text.is_some() && text == self.answers(role, json!([{ "type": "text", "text": "Qx7" }]))
        })
    }

    /// Renders a short conversation that ends with this content.
    fn answers(&self, role: Role, content: Value) -> Option<String> {
        let said = |role: Role, content: Value| json!({ "role": role.name(), "content": content });
        let messages = match role {
            Role::System => vec![said(role, content), said(Role::User, json!("a"))],
            Role::User => vec![said(role, content)],
            Role::Assistant => vec![said(Role::User, json!("a")), said(role, content)],
            Role::Tool => vec![said(Role::User, json!("a")), called(json!({})), said(role, content)],
        };
        self.render_chat(&Chat::of(&messages)).ok()
    }

    /// Whether the template takes arguments of tool calls as objects. The others need JSON text.
    pub(crate) fn takes_argument_objects(&self) -> bool {
        *self.reads.argument_objects.get_or_init(|| {
            let rendered = |arguments: Value| {
                let messages = [json!({ "role": "user", "content": "a" }), called(arguments)];
                self.render_chat(&Chat::of(&messages)).is_ok()
            };
            rendered(json!({ "a": 1 })) || !rendered(json!("{\"a\": 1}"))
        })
    }

    /// Notes for the user about fields of a record that the template does not read.
    pub(crate) fn unread(&self, pair: &Pair) -> impl Iterator<Item = &'static str> {
        let unread =
            FIELDS.into_iter().filter(|(is_there, words, _)| is_there(pair) && !self.mentions(words));
        unread.map(|(_, _, note)| note)
    }
}

fn called(arguments: Value) -> Value {
    let call =
        json!({ "id": "123456789", "type": "function", "function": { "name": "f", "arguments": arguments } });
    json!({ "role": "assistant", "content": "", "tool_calls": [call] })
}
