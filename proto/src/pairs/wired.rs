//! Conversion of pairs to and from their wire form.

use super::{Conversation, Message, PlainText, PreferencePair, Role};
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

impl From<Message> for wire::ChatMessage {
    fn from(message: Message) -> Self {
        Self { role: wire::Role::from(message.role).into(), content: message.content }
    }
}

impl From<PreferencePair> for wire::pair::Content {
    fn from(pair: PreferencePair) -> Self {
        match pair {
            PreferencePair::Conversation(Conversation { messages, preferred, non_preferred }) => {
                Self::Conversation(wire::Conversation {
                    messages: messages.into_iter().map(Into::into).collect(),
                    preferred: Some(preferred.into()),
                    non_preferred: Some(non_preferred.into()),
                })
            }
            PreferencePair::Text(PlainText { prompt, chosen, rejected }) => {
                Self::Text(wire::PlainText { prompt, chosen, rejected })
            }
        }
    }
}

impl TryFrom<wire::ChatMessage> for Message {
    type Error = Fault;

    fn try_from(message: wire::ChatMessage) -> Result<Self, Fault> {
        let role = match message.role() {
            wire::Role::System => Role::System,
            wire::Role::User => Role::User,
            wire::Role::Assistant => Role::Assistant,
            wire::Role::Tool => Role::Tool,
            wire::Role::Unspecified => return Err(incomplete()),
        };
        Ok(Self { role, content: message.content })
    }
}

impl TryFrom<wire::pair::Content> for PreferencePair {
    type Error = Fault;

    fn try_from(content: wire::pair::Content) -> Result<Self, Fault> {
        let message = |message: Option<wire::ChatMessage>| Message::try_from(message.ok_or_else(incomplete)?);
        Ok(match content {
            wire::pair::Content::Conversation(said) => Self::Conversation(Conversation {
                messages: said.messages.into_iter().map(Message::try_from).collect::<Result<_, _>>()?,
                preferred: message(said.preferred)?,
                non_preferred: message(said.non_preferred)?,
            }),
            wire::pair::Content::Text(wire::PlainText { prompt, chosen, rejected }) => {
                Self::Text(PlainText { prompt, chosen, rejected })
            }
        })
    }
}

impl wire::Pair {
    /// Converts to a pair; fails if a part is missing.
    pub fn into_pair(self) -> Result<PreferencePair, Fault> {
        self.content.ok_or_else(incomplete)?.try_into()
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
    fn a_pair_survives_the_wire_in_fewer_bytes_than_its_line() {
        use prost::Message as _;
        for line in [
            r#"{"input":{"messages":[{"role":"system","content":"é"},{"role":"tool","content":""},{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Yo"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#,
            r#"{"prompt":"","chosen":"b","rejected":"c"}"#,
        ] {
            let pair = forms::parse(line).unwrap();
            let sent = wire::Pair { id: 7, line: 9, reference: None, content: Some(pair.clone().into()) };
            assert!(sent.encoded_len() < line.len());
            assert_eq!(sent.into_pair(), Ok(pair));
        }
        assert!(wire::Pair::default().into_pair().is_err());
    }
}
