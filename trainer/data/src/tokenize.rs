//! Turns one record into prompt, chosen and rejected ids, by TRL's rule: render the prompt and both full conversations, tokenise each
//! once, and split at their common token prefix. Plain text is not rendered; it only gets the end-of-sequence token after the outputs.
//! So the split stays correct if a template or tokenizer writes the end of the prompt differently when an answer follows.
//!
//! What is trained: all tokens of an output with one message, as in TRL; of several messages and of whole conversations the assistant's
//! ([`crate::assistant`]), unless the configuration says otherwise.

use dyad_proto::Fault;
use dyad_proto::pairs::{Content, Conversation, Example, Message, PlainText, Role};
use dyad_proto::wire::PairVerdict;

use crate::assistant::Turns;
use crate::dialogue::Dialogue;
use crate::quick::Encoded;
use crate::tokenized::{Tokenized, Untrained};
use crate::tokenizer::ChatTokenizer;
use crate::truncation::{Rule, is_trainable, truncate};

/// Returns the ids of a record, and whether the rule allows to train on it.
pub fn tokenize(
    tokenizer: &ChatTokenizer,
    example: &Example,
    rule: Rule,
) -> Result<(PairVerdict, Tokenized), Fault> {
    if example.weight == 0.0 {
        return Ok((PairVerdict::DroppedWeight, Tokenized::new(Vec::new(), Vec::new(), Vec::new())));
    }
    let sequences = match &example.content {
        Content::Conversation(said) if said.prompt.is_empty() => of_whole(tokenizer, said, rule)?,
        Content::Conversation(said) => of_conversation(tokenizer, said, rule)?,
        Content::Text(text) => of_text(tokenizer, text, rule)?,
    };
    let tokenized = Tokenized { weight: example.weight, label: example.label, ..sequences.split(rule) };
    let (verdict, tokenized) = truncate(tokenized, rule);
    if is_trainable(verdict) {
        tokenizer.check_known(tokenized.tokens(), rule.embedding_rows)?;
    }
    Ok((verdict, tokenized))
}

/// Ids of a whole text.
struct Sequence {
    ids: Vec<u32>,
    /// For each id, whether it is trained; `None` if all after the prompt are.
    trained: Option<Vec<bool>>,
}

impl Sequence {
    fn all(ids: Vec<u32>) -> Self {
        Self { ids, trained: None }
    }

    /// The ids from a place on.
    fn rest(&self, from: usize) -> (Vec<u32>, Untrained) {
        let trained = self.trained.as_ref().and_then(|trained| trained.get(from..));
        (
            self.ids.get(from..).unwrap_or_default().to_vec(),
            trained.map_or_else(Untrained::default, Untrained::of),
        )
    }
}

/// The prompt alone, and the prompt with each output.
struct Sequences {
    /// `None` for a whole conversation or text, whose first trained token ends the prompt.
    prompt: Option<Vec<u32>>,
    chosen: Sequence,
    /// `None` if there is no rejected output, or the run ignores it.
    rejected: Option<Sequence>,
}

impl Sequences {
    fn split(self, rule: Rule) -> Tokenized {
        let Self { prompt, chosen, rejected } = self;
        let shared = match &prompt {
            Some(prompt) if !rule.train_on_inputs => {
                let shared = |full: &Sequence| common_prefix(prompt, &full.ids);
                rejected.as_ref().map_or(usize::MAX, shared).min(shared(&chosen))
            }
            _ => first_trained(&chosen),
        };
        let beginning = chosen.ids[..shared.min(chosen.ids.len())].to_vec();
        let (chosen, chosen_untrained) = chosen.rest(shared);
        let (rejected, rejected_untrained) =
            rejected.map_or_else(Default::default, |rejected| rejected.rest(shared));
        Tokenized { chosen_untrained, rejected_untrained, ..Tokenized::new(beginning, chosen, rejected) }
    }
}

/// Place of the first trained token. Nothing predicts the first token of a text.
fn first_trained(sequence: &Sequence) -> usize {
    match &sequence.trained {
        None => 1,
        Some(trained) => {
            let first = trained.iter().skip(1).position(|trained| *trained);
            first.map_or(trained.len(), |first| first + 1)
        }
    }
}

/// A conversation of which each message of the assistant is trained.
fn of_whole(tokenizer: &ChatTokenizer, said: &Conversation, rule: Rule) -> Result<Sequences, Fault> {
    let dialogue = Dialogue::of(tokenizer, said, &said.chosen);
    let text = dialogue.whole()?;
    let full = tokenizer.encode_like(text.clone(), None)?;
    let trained = trained(&dialogue, &text, &full, said, &said.chosen, rule.train_on_inputs)?;
    Ok(Sequences { prompt: None, chosen: Sequence { ids: full.ids, trained }, rejected: None })
}

/// The tokens that are trained: those of the assistant's messages, or everything but messages of weight 0; `None` for all tokens.
fn trained(
    dialogue: &Dialogue<'_>,
    text: &str,
    full: &Encoded,
    said: &Conversation,
    output: &[Message],
    everything: bool,
) -> Result<Option<Vec<bool>>, Fault> {
    let places = |output: &[Message], wanted: fn(&Message) -> bool, first: usize| -> Vec<usize> {
        let wanted = output.iter().enumerate().filter(|(_, message)| wanted(message));
        wanted.map(|(at, _)| first + at).collect()
    };
    let by_assistant: fn(&Message) -> bool = |message| message.role == Role::Assistant;
    let before = said.prompt.len();
    let assistant = [places(&said.prompt, by_assistant, 0), places(output, by_assistant, before)].concat();
    let turns = Turns { dialogue, text, count: before + output.len(), assistant };
    if !everything {
        return turns.tokens(full, &places(output, Message::is_trained, before)).map(Some);
    }
    let left_out = places(output, |message| message.weight == Some(false), before);
    if left_out.is_empty() {
        return Ok(None);
    }
    let left_out = turns.tokens(full, &left_out)?;
    Ok(Some(left_out.into_iter().map(|left_out| !left_out).collect()))
}

fn of_conversation(tokenizer: &ChatTokenizer, said: &Conversation, rule: Rule) -> Result<Sequences, Fault> {
    let chosen = Dialogue::of(tokenizer, said, &said.chosen);
    let prompt = tokenizer.encode_like(chosen.beginning(said.prompt.len(), true)?, None)?;
    let (full, chosen) = output(&chosen, said, &said.chosen, &prompt, rule)?;
    let rejected = match rule.preferred_only || said.rejected.is_empty() {
        true => None,
        false => {
            let rejected = Dialogue::of(tokenizer, said, &said.rejected);
            Some(output(&rejected, said, &said.rejected, &full, rule)?.1)
        }
    };
    Ok(Sequences { prompt: Some(prompt.ids), chosen, rejected })
}

/// Ids of the prompt with an output; `like` is an earlier text with the same start.
fn output(
    dialogue: &Dialogue<'_>,
    said: &Conversation,
    output: &[Message],
    like: &Encoded,
    rule: Rule,
) -> Result<(Encoded, Sequence), Fault> {
    let text = dialogue.whole()?;
    let full = dialogue.tokenizer.encode_like(text.clone(), Some(like))?;
    let alone = matches!(output, [message] if message.is_trained());
    let everything = rule.train_on_inputs || !rule.assistant_only;
    let trained = match alone {
        true => None,
        false => trained(dialogue, &text, &full, said, output, everything)?,
    };
    let ids = full.ids.clone();
    Ok((full, Sequence { ids, trained }))
}

fn of_text(tokenizer: &ChatTokenizer, text: &PlainText, rule: Rule) -> Result<Sequences, Fault> {
    let eos = tokenizer.eos_token()?;
    let prompt = text.prompt.as_deref();
    let whole = |output: &str| {
        let end = if output.ends_with(eos) { "" } else { eos };
        let ids = tokenizer.encode_plain(&[prompt.unwrap_or_default(), output, end].concat());
        ids.map(Sequence::all)
    };
    Ok(Sequences {
        prompt: prompt.map(|prompt| tokenizer.encode_plain(prompt)).transpose()?,
        chosen: whole(&text.chosen)?,
        rejected: text.rejected.as_deref().filter(|_| !rule.preferred_only).map(whole).transpose()?,
    })
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
