//! One pair becomes prompt, chosen and rejected ids, by TRL's rule: render the prompt and both full conversations (plain text stands
//! for itself, with the end-of-sequence token after both outputs), tokenise
//! each once, split at their common token prefix. Templates and tokenizers that treat the prompt's end differently alone
//! and in full therefore never shift the completion.

use dyad_proto::Fault;
use dyad_proto::pairs::{Conversation, PlainText, PreferencePair};
use dyad_proto::wire::PairVerdict;
use sha2::{Digest, Sha256};

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

    /// First 16 bytes of SHA-256 over the ids and where each part ends, as two numbers.
    #[must_use]
    pub fn hash(&self) -> (u64, u64) {
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for part in [&self.prompt, &self.chosen, &self.rejected] {
            hash.update((part.len() as u64).to_be_bytes());
            bytes.clear();
            bytes.extend(part.iter().flat_map(|id| id.to_be_bytes()));
            hash.update(&bytes);
        }
        let digest = hash.finalize();
        let number =
            |at: usize| digest[at..at + 8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        (number(0), number(8))
    }
}

/// What a run asks of its sequences.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Most tokens of prompt plus completion.
    pub max_len: usize,
    /// Supervised fine-tuning: the other answer is left out, and decides nothing.
    pub preferred_only: bool,
    /// Rows of the model's embedding: ids from there on have no meaning to it.
    pub embedding_rows: u32,
}

/// Ids of a pair, and whether it can be trained on by the rule.
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
    let tokenized = Tokenized { prompt: prompt[..shared].to_vec(), chosen: rest(&chosen), rejected };
    let (verdict, tokenized) = truncate(tokenized, rule);
    if is_trainable(verdict) {
        tokenizer.check_known(tokenized.tokens(), rule.embedding_rows)?;
    }
    Ok((verdict, tokenized))
}

/// Ids of whole texts: the prompt, and each output behind it.
struct Sequences {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    /// `None` where the run leaves it out.
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

/// Pairs of this verdict are computed on.
#[must_use]
pub fn is_trainable(verdict: PairVerdict) -> bool {
    matches!(verdict, PairVerdict::Kept | PairVerdict::Truncated)
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// Keeps the start of each sequence; drops the pair where a side would have nothing left to train on, or both the same.
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
    // A supervised run has no other side, and trains on one that is preferred to nothing as well.
    if !rule.preferred_only && pair.chosen == pair.rejected {
        return (PairVerdict::DroppedIdentical, pair);
    }
    (if cut { PairVerdict::Truncated } else { PairVerdict::Kept }, pair)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULE: Rule = Rule { max_len: 10, preferred_only: false, embedding_rows: u32::MAX };

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized { prompt: prompt.to_vec(), chosen: chosen.to_vec(), rejected: rejected.to_vec() }
    }

    #[test]
    fn sides_of_the_same_tokens_are_dropped_also_after_the_cut() {
        let verdict = |pair, rule| truncate(pair, rule).0;
        assert_eq!(verdict(pair(&[1], &[2, 3], &[2, 3]), RULE), PairVerdict::DroppedIdentical);
        let late = || pair(&[1; 8], &[2, 3, 4], &[2, 3, 5]);
        assert_eq!(verdict(late(), RULE), PairVerdict::DroppedIdentical);
        assert_eq!(verdict(late(), Rule { max_len: 11, ..RULE }), PairVerdict::Kept);
        let cut_to_a_prefix = pair(&[1; 8], &[2, 3], &[2, 3, 5]);
        assert_eq!(verdict(cut_to_a_prefix, RULE), PairVerdict::DroppedIdentical);
        let sft = Rule { preferred_only: true, ..RULE };
        assert_eq!(verdict(pair(&[1], &[2], &[2]), sft), PairVerdict::Kept);
    }

    #[test]
    fn a_hash_follows_every_token_and_where_the_parts_end() {
        let hashes = [
            pair(&[1, 2], &[3], &[4]),
            pair(&[1], &[2, 3], &[4]),
            pair(&[1, 2], &[3], &[5]),
            pair(&[1, 2], &[4], &[3]),
            pair(&[1, 2], &[3, 4], &[]),
        ]
        .map(|pair| pair.hash());
        let different: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(different.len(), hashes.len());
        // python3 -c 'import hashlib,struct; print(hashlib.sha256(struct.pack(">QIIQIQI",2,1,2,1,3,1,4)).hexdigest()[:32])'
        assert_eq!(format!("{:016x}{:016x}", hashes[0].0, hashes[0].1), "429d382db28e128ae5cf25465e45f610");
    }

    proptest! {
        #[test]
        fn a_kept_pair_fits_and_has_something_to_train_on(p in 0usize..20, c in 0usize..20, r in 0usize..20, max in 1usize..30) {
            let pair = Tokenized { prompt: vec![1; p], chosen: vec![2; c], rejected: vec![3; r] };
            let (verdict, cut) = truncate(pair.clone(), Rule { max_len: max, ..RULE });
            match verdict {
                PairVerdict::Kept => prop_assert_eq!(&cut, &pair),
                PairVerdict::Truncated => prop_assert!(p + c.max(r) > max),
                PairVerdict::DroppedTooLong => prop_assert!(p >= max),
                PairVerdict::DroppedEmpty => prop_assert!(p == 0 || c == 0 || r == 0),
                _ => prop_assert!(false),
            }
            if is_trainable(verdict) {
                prop_assert!(!cut.chosen.is_empty() && !cut.rejected.is_empty());
                prop_assert!(cut.prompt.len() + cut.chosen.len().max(cut.rejected.len()) <= max);
            }
        }
    }
}
