//! One pair becomes prompt, chosen and rejected ids, by TRL's rule: render the prompt and both full conversations, tokenise
//! each once, split at their common token prefix. Templates and tokenizers that treat the prompt's end differently alone
//! and in full therefore never shift the completion.

use dyad_proto::Fault;
use dyad_proto::preference::PreferencePair;
use dyad_proto::wire::{Pair, PairLength, PairVerdict};
use rayon::prelude::*;

use crate::tokenizer::ChatTokenizer;

/// Token ids of a pair. The full sequences are `prompt + chosen` and `prompt + rejected`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenized {
    /// What both answers continue.
    pub prompt: Vec<u32>,
    /// The preferred answer, with whatever the template puts after it.
    pub chosen: Vec<u32>,
    /// The other answer.
    pub rejected: Vec<u32>,
}

impl Tokenized {
    /// All of its ids.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        [&self.prompt, &self.chosen, &self.rejected].into_iter().flatten().copied()
    }
}

/// What a run asks of its sequences.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Most tokens of prompt plus completion.
    pub max_len: usize,
    /// Supervised fine-tuning: the other answer is left out, and decides nothing.
    pub preferred_only: bool,
}

/// Ids of a pair, and whether it can be trained on by the rule.
pub fn tokenize(
    tokenizer: &ChatTokenizer,
    pair: &PreferencePair,
    rule: Rule,
) -> Result<(PairVerdict, Tokenized), Fault> {
    let render = |answer| tokenizer.render_answered(&pair.messages, answer);
    let prompt = tokenizer.encode_like(tokenizer.render(&pair.messages, true)?, None)?;
    let chosen = tokenizer.encode_like(render(&pair.preferred)?, Some(&prompt))?;
    let mut rejected = Vec::new();
    let (prompt, mut shared) = (&prompt.ids, common_prefix(&prompt.ids, &chosen.ids));
    if !rule.preferred_only {
        rejected = tokenizer.encode_like(render(&pair.non_preferred)?, Some(&chosen))?.ids;
        shared = shared.min(common_prefix(prompt, &rejected));
    }
    let rest = |full: &[u32]| full.get(shared..).unwrap_or_default().to_vec();
    let tokenized =
        Tokenized { prompt: prompt[..shared].to_vec(), chosen: rest(&chosen.ids), rejected: rest(&rejected) };
    Ok(truncate(tokenized, rule))
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// Keeps the start of each sequence; drops the pair where a side would have nothing left to train on.
fn truncate(mut pair: Tokenized, rule: Rule) -> (PairVerdict, Tokenized) {
    if pair.prompt.is_empty() || pair.chosen.is_empty() || !rule.preferred_only && pair.rejected.is_empty() {
        return (PairVerdict::DroppedEmpty, pair);
    }
    let Some(room) = rule.max_len.checked_sub(pair.prompt.len()).filter(|&room| room > 0) else {
        return (PairVerdict::DroppedTooLong, pair);
    };
    let cut = pair.chosen.len() > room || pair.rejected.len() > room;
    pair.chosen.truncate(room);
    pair.rejected.truncate(room);
    (if cut { PairVerdict::Truncated } else { PairVerdict::Kept }, pair)
}

/// Parses and tokenises pairs from the wire, all cores at once, in order.
pub fn tokenize_all(
    tokenizer: &ChatTokenizer,
    pairs: &[Pair],
    rule: Rule,
) -> Result<Vec<(PairVerdict, Tokenized)>, Fault> {
    pairs
        .par_iter()
        .map(|pair| {
            let named =
                |fault: Fault| Fault { message: format!("pair {}: {}", pair.id, fault.message), ..fault };
            let parsed =
                PreferencePair::parse(&pair.json).map_err(|error| named(Fault::input(error.to_string())))?;
            tokenize(tokenizer, &parsed, rule).map_err(named)
        })
        .collect()
}

/// Token counts of pairs, for the coordinator's shards.
pub fn measure(tokenizer: &ChatTokenizer, pairs: &[Pair], rule: Rule) -> Result<Vec<PairLength>, Fault> {
    let tokenized = tokenize_all(tokenizer, pairs, rule)?;
    let length = |(pair, (verdict, tokens)): (&Pair, &(PairVerdict, Tokenized))| PairLength {
        id: pair.id,
        verdict: (*verdict).into(),
        prompt_tokens: tokens.prompt.len() as u32,
        chosen_tokens: tokens.chosen.len() as u32,
        rejected_tokens: tokens.rejected.len() as u32,
        cost: 0,
    };
    Ok(pairs.iter().zip(&tokenized).map(length).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_kept_pair_fits_and_has_something_to_train_on(p in 0usize..20, c in 0usize..20, r in 0usize..20, max in 1usize..30) {
            let pair = Tokenized { prompt: vec![1; p], chosen: vec![2; c], rejected: vec![3; r] };
            let (verdict, cut) = truncate(pair.clone(), Rule { max_len: max, preferred_only: false });
            match verdict {
                PairVerdict::Kept => prop_assert_eq!(&cut, &pair),
                PairVerdict::Truncated => prop_assert!(p + c.max(r) > max),
                PairVerdict::DroppedTooLong => prop_assert!(p >= max),
                PairVerdict::DroppedEmpty => prop_assert!(p == 0 || c == 0 || r == 0),
                PairVerdict::Unspecified => prop_assert!(false),
            }
            if matches!(verdict, PairVerdict::Kept | PairVerdict::Truncated) {
                prop_assert!(!cut.chosen.is_empty() && !cut.rejected.is_empty());
                prop_assert!(cut.prompt.len() + cut.chosen.len().max(cut.rejected.len()) <= max);
            }
        }
    }
}
