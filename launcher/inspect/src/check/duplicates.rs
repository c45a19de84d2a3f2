//! Records that are there more than once, in one file or in several, or in training and validation.

use std::collections::HashMap;

use dyad_proto::pairs::{Content, Example, Message, MessageContent};
use twox_hash::XxHash3_128;

use super::finding::{Problem, Severity};

/// Hashes of a record: as it is, and with its two outputs exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest {
    own: u128,
    exchanged: Option<u128>,
}

impl Digest {
    /// The hash of what a record says. Weights, labels and columns that are not read do not count.
    pub(super) fn of(example: &Example) -> Self {
        let mut parts = [const { Vec::new() }; 3];
        match &example.content {
            Content::Text(text) => {
                put(&mut parts[0], text.prompt.as_deref().unwrap_or_default());
                put(&mut parts[1], &text.chosen);
                put(&mut parts[2], text.rejected.as_deref().unwrap_or_default());
            }
            Content::Conversation(said) => {
                for (part, messages) in parts.iter_mut().zip([&said.prompt, &said.chosen, &said.rejected]) {
                    messages.iter().for_each(|message| put_message(part, message));
                }
                let around = [&said.tools, &said.chat_template_kwargs];
                around
                    .into_iter()
                    .for_each(|json| put(&mut parts[0], json.as_ref().map_or("", |json| json.text())));
            }
        }
        let [prompt, chosen, rejected] = parts.map(|part| XxHash3_128::oneshot(&part));
        let all = |parts: [u128; 3]| {
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.to_le_bytes()).collect();
            XxHash3_128::oneshot(&bytes)
        };
        let pair = match &example.content {
            Content::Text(text) => text.rejected.is_some(),
            Content::Conversation(said) => !said.rejected.is_empty(),
        };
        Self {
            own: all([prompt, chosen, rejected]),
            exchanged: (pair && chosen != rejected).then(|| all([prompt, rejected, chosen])),
        }
    }
}

fn put(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_message(out: &mut Vec<u8>, message: &Message) {
    let Message { role, content, reasoning, tool_calls, tool_call_id, name, weight: _ } = message;
    out.push(*role as u8);
    match content {
        None => out.push(0),
        Some(MessageContent::Text(text)) => put(out, text),
        Some(MessageContent::Parts(parts)) => put(out, &parts.concat()),
    }
    for text in [reasoning, tool_call_id, name] {
        put(out, text.as_deref().unwrap_or_default());
    }
    tool_calls.iter().for_each(|call| put(out, call.text()));
}

/// The records seen so far: 32 bytes for each.
#[derive(Debug, Default)]
pub(super) struct Seen(HashMap<u128, (u32, u64)>);

impl Seen {
    /// Notes a record of a file, and says whether it, or its opposite, was there before. `place` describes a file and line.
    pub(super) fn add(
        &mut self,
        digest: Digest,
        file: u32,
        line: u64,
        place: impl Fn(u32, u64) -> String,
    ) -> Option<Problem> {
        let warn = |what: String| Some(Problem::new(Severity::Warning, "record", what));
        if let Some(&(file, line)) = self.0.get(&digest.own) {
            return warn(format!("the same as {}", place(file, line)));
        }
        self.0.insert(digest.own, (file, line));
        let (file, line) = *self.0.get(&digest.exchanged?)?;
        warn(format!("prefers the opposite of {}", place(file, line)))
    }
}
