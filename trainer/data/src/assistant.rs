//! Finds the tokens of the assistant's messages in a rendered conversation.
//!
//! If the template has `{% generation %}` blocks, they say which tokens these are, by transformers' rule. Otherwise the conversation is
//! rendered up to each message of the assistant, with the generation prompt, and up to its end. What lies between the ends of these two
//! texts in the whole one is the message.
//!
//! - DAT-A1: if a template writes a message in another way once others follow, its place is found by what follows its content, or the
//!   conversation is refused. No token is trained by guessing.

use std::ops::Range;

use dyad_proto::Fault;

use crate::dialogue::Dialogue;
use crate::quick::Encoded;
use crate::rendered::Rendered;

/// Contents that stand for a message's own one, to find where it ends.
const STAND_INS: [&str; 2] = ["Qx7", "Zj4"];

/// Some messages of a rendered conversation.
#[derive(Debug)]
pub(crate) struct Turns<'d> {
    pub(crate) dialogue: &'d Dialogue<'d>,
    /// The text of the whole conversation.
    pub(crate) text: &'d str,
    /// Its number of messages.
    pub(crate) count: usize,
    /// Which of them are the assistant's.
    pub(crate) assistant: Vec<usize>,
}

impl Turns<'_> {
    /// For each token of the whole text, whether it belongs to one of these messages of the assistant.
    pub(crate) fn tokens(&self, full: &Encoded, messages: &[usize]) -> Result<Vec<bool>, Fault> {
        match self.dialogue.marked()? {
            Some(marked) => self.of_marks(marked, messages),
            None => self.of_beginnings(full, messages),
        }
    }

    /// By the template's generation blocks.
    fn of_marks(&self, mut marked: Rendered, messages: &[usize]) -> Result<Vec<bool>, Fault> {
        if messages != self.assistant {
            let mut places = Vec::new();
            for &at in messages {
                let next = self.assistant.iter().find(|&&next| next > at);
                let end = next.map_or(Ok(self.text.len()), |&next| self.start(next))?;
                places.push(self.start(at)?..end);
            }
            // A block may begin before the generation prompt's end; it ends in its own message.
            let last = |range: &Range<usize>| range.end.saturating_sub(1);
            marked.generated.retain(|range| places.iter().any(|place| place.contains(&last(range))));
        }
        Ok(self.dialogue.tokenizer.encode_marked(&marked)?.generated)
    }

    /// By rendering the beginnings of the conversation.
    fn of_beginnings(&self, full: &Encoded, messages: &[usize]) -> Result<Vec<bool>, Fault> {
        let mut mine = vec![false; full.ids.len()];
        for &at in messages {
            let start = self.tokens_before(full, self.start(at)?)?;
            let end = self.tokens_before(full, self.end(at)?)?;
            mine.get_mut(start..end).into_iter().flatten().for_each(|token| *token = true);
        }
        Ok(mine)
    }

    /// Number of tokens that the whole text shares with its own beginning.
    fn tokens_before(&self, full: &Encoded, end: usize) -> Result<usize, Fault> {
        if end == self.text.len() {
            return Ok(full.ids.len());
        }
        let beginning = self.dialogue.tokenizer.encode_like(self.text[..end].to_owned(), Some(full))?;
        Ok(beginning.ids.iter().zip(&full.ids).take_while(|(a, b)| a == b).count())
    }

    /// Where the assistant's message begins, after the generation prompt.
    fn start(&self, at: usize) -> Result<usize, Fault> {
        if at == 0 {
            return self.start_of_first();
        }
        let opened = self.dialogue.beginning(at, true)?;
        let shared = common(&opened, self.text);
        if shared == opened.len() {
            return Ok(shared);
        }
        // A template may write another generation prompt than the start of an answer. The messages before must be the same.
        let closed = self.dialogue.beginning(at, false)?;
        if shared < common(&opened, &closed) {
            return Err(unclear(at));
        }
        Ok(shared)
    }

    /// Where the conversation's first message begins if it is the assistant's. No beginning without messages can be rendered, so the
    /// generation prompt is that of another conversation. It must be there once before the content.
    fn start_of_first(&self) -> Result<usize, Fault> {
        let asked = self.dialogue.asked();
        let (closed, opened) = (asked.beginning(1, false)?, asked.beginning(1, true)?);
        let prompt = &opened[common(&closed, &opened)..];
        let [one, other] =
            STAND_INS.map(|text| self.dialogue.with_text(0, text).beginning(self.count, false));
        let content = common(&one?, &other?).min(self.text.len());
        let before = self.text.get(..content).filter(|_| !prompt.is_empty()).unwrap_or_default();
        match before.match_indices(prompt).collect::<Vec<_>>()[..] {
            [(at, _)] if !prompt.is_empty() => Ok(at + prompt.len()),
            _ => Err(unclear(0)),
        }
    }

    /// Where the assistant's message ends, including the token that ends its turn.
    fn end(&self, at: usize) -> Result<usize, Fault> {
        if at + 1 == self.count {
            return Ok(self.text.len());
        }
        let alone = self.dialogue.beginning(at + 1, false)?;
        if self.text.starts_with(&alone) {
            return Ok(alone.len());
        }
        let after = |count: usize| -> Result<String, Fault> {
            let [one, other] =
                STAND_INS.map(|text| self.dialogue.with_text(at, text).beginning(count, false));
            let (one, other) = (one?, other?);
            Ok(one[one.len() - common_end(&one, &other)..].to_owned())
        };
        let (after_alone, after_here) = (after(at + 1)?, after(self.count)?);
        let content_end = self.text.len().checked_sub(after_here.len());
        let content_end =
            content_end.filter(|_| self.text.ends_with(&after_here)).ok_or_else(|| unclear(at))?;
        let end = content_end + common(&after_alone, &after_here);
        if end <= self.start(at)? {
            return Err(unclear(at));
        }
        Ok(end)
    }
}

fn unclear(at: usize) -> Fault {
    Fault::input(format!(
        "the chat template writes messages differently once others follow: the tokens of message {} cannot be found",
        at + 1
    ))
    .hint("mark them in the template with {% generation %} and {% endgeneration %}, or train all tokens (docs/data.md)")
}

/// Length of the common beginning in bytes, in whole characters.
fn common(a: &str, b: &str) -> usize {
    let same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    (0..=same).rev().find(|&at| a.is_char_boundary(at) && b.is_char_boundary(at)).unwrap_or(0)
}

/// Length of the common end in bytes, in whole characters.
fn common_end(a: &str, b: &str) -> usize {
    let same = a.bytes().rev().zip(b.bytes().rev()).take_while(|(a, b)| a == b).count();
    let boundary =
        |length: &usize| a.is_char_boundary(a.len() - length) && b.is_char_boundary(b.len() - length);
    (0..=same).rev().find(boundary).unwrap_or(0)
}
