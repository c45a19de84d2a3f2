//! Conversion of records to and from their wire form.

use super::{Content, Conversation, Example, Json, Message, MessageContent, PlainText, Role};
use crate::{Fault, wire};

impl From<Role> for wire::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
            Role::Tool => Self::Tool,
        }
    }
}

fn text_of(json: Json) -> String {
    json.text().to_owned()
}

impl From<Message> for wire::ChatMessage {
    fn from(message: Message) -> Self {
        use wire::chat_message::Content;
        Self {
            role: wire::Role::from(message.role).into(),
            content: message.content.map(|content| match content {
                MessageContent::Text(text) => Content::Text(text),
                MessageContent::Parts(texts) => Content::Parts(wire::TextParts { texts }),
            }),
            reasoning: message.reasoning,
            tool_calls: message.tool_calls.into_iter().map(text_of).collect(),
            tool_call_id: message.tool_call_id,
            name: message.name,
            weight: message.weight,
        }
    }
}

impl From<Content> for wire::pair::Content {
    fn from(content: Content) -> Self {
        let messages = |messages: Vec<Message>| messages.into_iter().map(Into::into).collect();
        match content {
            Content::Conversation(said) => Self::Conversation(wire::Conversation {
                prompt: messages(said.prompt),
                chosen: messages(said.chosen),
                rejected: messages(said.rejected),
                tools: said.tools.map(text_of),
                chat_template_kwargs: said.chat_template_kwargs.map(text_of),
            }),
            Content::Text(PlainText { prompt, chosen, rejected }) => {
                Self::Text(wire::PlainText { prompt, chosen, rejected })
            }
        }
    }
}

impl Example {
    /// The wire form; `place` is the record's file and line.
    #[must_use]
    pub fn into_wire(self, id: u64, place: String) -> wire::Pair {
        let weight = (self.weight != 1.0).then_some(self.weight);
        wire::Pair {
            id,
            place,
            content: Some(self.content.into()),
            reference: None,
            weight,
            label: self.label,
        }
    }
}

fn json(text: String) -> Result<Json, Fault> {
    Json::parse(text).ok_or_else(incomplete)
}

impl TryFrom<wire::ChatMessage> for Message {
    type Error = Fault;

    fn try_from(message: wire::ChatMessage) -> Result<Self, Fault> {
        use wire::chat_message::Content;
        let role = match message.role() {
            wire::Role::System => Role::System,
            wire::Role::User => Role::User,
            wire::Role::Assistant => Role::Assistant,
            wire::Role::Tool => Role::Tool,
            wire::Role::Unspecified => return Err(incomplete()),
        };
        Ok(Self {
            role,
            content: message.content.map(|content| match content {
                Content::Text(text) => MessageContent::Text(text),
                Content::Parts(wire::TextParts { texts }) => MessageContent::Parts(texts),
            }),
            reasoning: message.reasoning,
            tool_calls: message.tool_calls.into_iter().map(json).collect::<Result<_, _>>()?,
            tool_call_id: message.tool_call_id,
            name: message.name,
            weight: message.weight,
        })
    }
}

impl TryFrom<wire::pair::Content> for Content {
    type Error = Fault;

    fn try_from(content: wire::pair::Content) -> Result<Self, Fault> {
        let messages = |messages: Vec<wire::ChatMessage>| -> Result<Vec<Message>, Fault> {
            messages.into_iter().map(Message::try_from).collect()
        };
        Ok(match content {
            wire::pair::Content::Conversation(said) => {
                let said = Conversation {
                    prompt: messages(said.prompt)?,
                    chosen: messages(said.chosen)?,
                    rejected: messages(said.rejected)?,
                    tools: said.tools.map(json).transpose()?,
                    chat_template_kwargs: said.chat_template_kwargs.map(json).transpose()?,
                };
                if said.chosen.is_empty() {
                    return Err(incomplete());
                }
                Self::Conversation(said)
            }
            wire::pair::Content::Text(wire::PlainText { prompt, chosen, rejected }) => {
                Self::Text(PlainText { prompt, chosen, rejected })
            }
        })
    }
}

impl wire::Pair {
    /// Converts to a record; fails if a part is missing.
    pub fn into_example(self) -> Result<Example, Fault> {
        let weight = self.weight.unwrap_or(1.0);
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(incomplete());
        }
        Ok(Example { content: self.content.ok_or_else(incomplete)?.try_into()?, weight, label: self.label })
    }
}

fn incomplete() -> Fault {
    Fault::failed("the coordinator sent an incomplete pair")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairs::forms;

    #[test]
    fn a_record_survives_the_wire_in_fewer_bytes_than_its_line() {
        use prost::Message as _;
        for line in [
            r#"{"input":{"messages":[{"role":"system","content":"é"},{"role":"tool","content":""},{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Yo"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#,
            r#"{"prompt":"","chosen":"b","rejected":"c"}"#,
            r#"{"input":{"messages":[{"role":"user","content":[{"type":"text","text":"a"}],"name":"Ada"}],"tools":[{"type":"function"}]},"weight":2.5,"preferred_output":[{"role":"assistant","content":null,"reasoning":"r","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{\"z\":1,\"a\":[]}"}}]},{"role":"tool","tool_call_id":"1","content":"7"},{"role":"assistant","content":"Yo","weight":0}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#,
            r#"{"prompt":[{"role":"user","content":"a"}],"completion":[{"role":"assistant","content":"b"}],"label":false,"chat_template_kwargs":{"enable_thinking":false}}"#,
            r#"{"text":"b","weight":0}"#,
        ] {
            let example = forms::parse(line).unwrap();
            let sent = example.clone().into_wire(7, "a.jsonl line 9".into());
            assert!(sent.encoded_len() < line.len() + sent.place.len());
            assert_eq!(sent.into_example(), Ok(example));
        }
        assert!(wire::Pair::default().into_example().is_err());
    }
}
