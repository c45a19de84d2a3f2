//! Turns one pair into prompt, chosen and rejected ids, by TRL's rule: render the prompt and both full conversations, tokenise each
//! once, and split at their common token prefix. Plain text is not rendered; it only gets the end-of-sequence token after both outputs.
//! So the split stays correct if a template or tokenizer writes the end of the prompt differently when an answer follows.

use dyad_proto::Fault;
use dyad_proto::pairs::{Conversation, PlainText, PreferencePair};
use dyad_proto::wire::PairVerdict;

use crate::tokenized::Tokenized;
use crate::tokenizer::ChatTokenizer;
use crate::truncation::{Rule, is_trainable, truncate};

/// Returns the ids of a pair, and whether the rule allows to train on it.
pub fn tokenize(
    tokenizer: &ChatTokenizer,
    pair: &PreferencePair,
    rule: Rule,
) -> Result<(PairVerdict, Tokenized), Fault> {
    let Sequences { prompt, chosen, rejected } = match pair {
        PreferencePair::Conversation(pair) => of_conversation(tokenizer, pair, rule)?,
        PreferencePair::Text(pair) => of_text(tokenizer, pair, rule)?,
    };
    let mut shared = common_prefix(&prompt, &chosen);
    if let Some(rejected) = &rejected {
        shared = shared.min(common_prefix(&prompt, rejected));
    }
    let rest = |full: &[u32]| full.get(shared..).unwrap_or_default().to_vec();
    let rejected = rejected.map_or_else(Vec::new, |rejected| rest(&rejected));
    let tokenized = Tokenized::new(prompt[..shared].to_vec(), rest(&chosen), rejected);
    let (verdict, tokenized) = truncate(tokenized, rule);
    if is_trainable(verdict) {
        tokenizer.check_known(tokenized.tokens(), rule.embedding_rows)?;
    }
    Ok((verdict, tokenized))
}

/// Ids of whole texts: the prompt alone, and the prompt with each output.
struct Sequences {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    /// `None` if the run ignores the rejected output.
    rejected: Option<Vec<u32>>,
}

fn of_conversation(tokenizer: &ChatTokenizer, pair: &Conversation, rule: Rule) -> Result<Sequences, Fault> {
    let render = |answer| tokenizer.render_answered(&pair.messages, answer);
    let prompt = tokenizer.encode_like(tokenizer.render(&pair.messages, true)?, None)?;
    let chosen = tokenizer.encode_like(render(&pair.preferred)?, Some(&prompt))?;
    let rejected = match rule.preferred_only {
        true => None,
        false => Some(tokenizer.encode_like(render(&pair.non_preferred)?, Some(&chosen))?.ids),
    };
    Ok(Sequences { prompt: prompt.ids, chosen: chosen.ids, rejected })
}

fn of_text(tokenizer: &ChatTokenizer, pair: &PlainText, rule: Rule) -> Result<Sequences, Fault> {
    let eos = tokenizer.eos_token()?;
    let whole = |output: &str| {
        let end = if output.ends_with(eos) { "" } else { eos };
        tokenizer.encode_plain(&[&pair.prompt, output, end].concat())
    };
    Ok(Sequences {
        prompt: tokenizer.encode_plain(&pair.prompt)?,
        chosen: whole(&pair.chosen)?,
        rejected: (!rule.preferred_only).then(|| whole(&pair.rejected)).transpose()?,
    })
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
