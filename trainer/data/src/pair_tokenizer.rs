//! Tokenises pairs from the wire and caches them: measuring, every epoch, every evaluation and the reference model's pass use the same
//! pairs.

use std::collections::{BTreeSet, HashMap};

use dyad_proto::wire::{Pair, PairLength, PairVerdict, Split};
use dyad_proto::{ErrorCode, Fault};
use rayon::prelude::*;

use crate::tokenize::tokenize;
use crate::tokenized::Tokenized;
use crate::tokenizer::ChatTokenizer;
use crate::truncation::{Rule, is_trainable};

/// Largest cache of token ids in bytes: about 60,000 pairs of 1,000 tokens.
pub const CACHE_BYTES: usize = 256 << 20;

/// Tokens of a pair, or why it cannot be tokenised for this model.
type Outcome = Result<(PairVerdict, Tokenized), Fault>;

/// Results of measuring pairs.
#[derive(Debug, Default)]
pub struct Measured {
    /// Token counts, in the order of the pairs.
    pub lengths: Vec<PairLength>,
    /// The error of the first pair that cannot be used.
    pub refusal: Option<Fault>,
    /// Notes for the user about what the chat template does not read.
    pub notes: BTreeSet<&'static str>,
}

/// Tokenizer, rule, and cached pairs.
#[derive(Debug)]
pub struct PairTokenizer {
    tokenizer: ChatTokenizer,
    rule: Rule,
    /// Trainable pairs by file and id.
    cache: HashMap<(Split, u64), (PairVerdict, Tokenized)>,
    /// Bytes that the cache may still take.
    bytes_left: usize,
}

impl PairTokenizer {
    /// Creates a tokenizer with an empty cache of at most `cache_bytes`.
    #[must_use]
    pub fn new(tokenizer: ChatTokenizer, rule: Rule, cache_bytes: usize) -> Self {
        Self { tokenizer, rule, cache: HashMap::new(), bytes_left: cache_bytes }
    }

    /// Returns the tokens of pairs of one file; fails if a pair cannot be trained on.
    pub fn tokenize(&mut self, split: Split, pairs: &[Pair]) -> Result<Vec<Tokenized>, Fault> {
        let usable = |(pair, outcome): (&Pair, Outcome)| {
            let named =
                |fault: Fault| Fault { message: format!("{}: {}", pair.place, fault.message), ..fault };
            match outcome {
                Ok((verdict, tokens)) if is_trainable(verdict) => Ok(tokens),
                Ok(_) => Err(named(
                    Fault::failed("nothing to train on, although some rank has measured otherwise")
                        .hint("do all hosts have the same tokenizer and chat template?"),
                )),
                Err(fault) => Err(named(fault)),
            }
        };
        pairs.iter().zip(self.outcomes(split, pairs)).map(usable).collect()
    }

    /// The same; each pair also gets the answer of its partner, if there are partners.
    pub fn tokenize_with_partners(
        &mut self,
        split: Split,
        pairs: &[Pair],
        partners: &[Pair],
    ) -> Result<Vec<Tokenized>, Fault> {
        let own = self.tokenize(split, pairs)?;
        if partners.is_empty() {
            return Ok(own);
        }
        let partners = self.tokenize(split, partners)?;
        let max_len = self.rule.max_len;
        Ok(own.into_iter().zip(&partners).map(|(own, partner)| own.with_partner(partner, max_len)).collect())
    }

    /// Measures pairs for the coordinator's shards. Fails only for reasons that are not the fault of a pair.
    pub fn measure(&mut self, split: Split, pairs: &[Pair]) -> Result<Measured, Fault> {
        let mut measured = Measured::default();
        for (pair, outcome) in pairs.iter().zip(self.outcomes(split, pairs)) {
            measured.notes.extend(self.tokenizer.unread(pair));
            measured.lengths.push(match outcome {
                Ok((verdict, tokens)) => {
                    let endless = verdict == PairVerdict::Kept && !self.tokenizer.ends(&tokens.chosen);
                    PairLength { endless, ..length(pair.id, verdict, &tokens) }
                }
                Err(fault) if fault.code == ErrorCode::InvalidInput => {
                    measured.refusal.get_or_insert(fault);
                    PairLength { id: pair.id, verdict: PairVerdict::Refused.into(), ..PairLength::default() }
                }
                Err(fault) => return Err(fault),
            });
        }
        Ok(measured)
    }

    /// Tokens that end an answer, as text.
    #[must_use]
    pub fn stop_tokens(&self) -> Vec<String> {
        self.tokenizer.stop_tokens()
    }

    /// Outcomes in the order of `pairs`; tokenises pairs that are not cached on all cores.
    fn outcomes(&mut self, split: Split, pairs: &[Pair]) -> Vec<Outcome> {
        let cached: Vec<_> = pairs.iter().map(|pair| self.cache.get(&(split, pair.id)).cloned()).collect();
        let missing: Vec<&Pair> =
            pairs.iter().zip(&cached).filter(|(_, known)| known.is_none()).map(|(pair, _)| pair).collect();
        let tokenize = |pair: &&Pair| tokenize(&self.tokenizer, &(*pair).clone().into_example()?, self.rule);
        let made: Vec<Outcome> = missing.par_iter().map(tokenize).collect();
        for (pair, outcome) in missing.iter().zip(&made) {
            if let Ok(outcome) = outcome {
                self.keep((split, pair.id), outcome);
            }
        }
        let mut made = made.into_iter();
        cached.into_iter().filter_map(|known| known.map(Ok).or_else(|| made.next())).collect()
    }

    fn keep(&mut self, key: (Split, u64), outcome: &(PairVerdict, Tokenized)) {
        let bytes = outcome.1.tokens().count() * size_of::<u32>() + size_of_val(&key) + size_of_val(outcome);
        if is_trainable(outcome.0) && bytes <= self.bytes_left && !self.cache.contains_key(&key) {
            self.bytes_left -= bytes;
            self.cache.insert(key, outcome.clone());
        }
    }
}

fn length(id: u64, verdict: PairVerdict, tokens: &Tokenized) -> PairLength {
    let (tokens_hash_high, tokens_hash_low) = tokens.hash();
    PairLength {
        id,
        verdict: verdict.into(),
        prompt_tokens: tokens.prompt.len() as u32,
        chosen_tokens: tokens.chosen.len() as u32,
        rejected_tokens: tokens.rejected.len() as u32,
        cost: 0,
        tokens_hash_high,
        tokens_hash_low,
        endless: false,
        chosen_untrained_tokens: tokens.chosen_untrained.count() as u32,
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::pairs::{Content, Example, PlainText};

    use super::*;
    use crate::new_model::{NewModelOptions, create};

    fn tokenizer() -> ChatTokenizer {
        let dir = tempfile::tempdir().unwrap();
        let line = r#"{"prompt":"ab","chosen":"cd","rejected":"ef"}"#;
        std::fs::write(dir.path().join("pairs.jsonl"), line).unwrap();
        let options = NewModelOptions {
            out: dir.path().join("model"),
            texts: dir.path().join("pairs.jsonl"),
            vocab_size: 300,
            hidden_size: 8,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            intermediate_size: 16,
            max_positions: 64,
            model_type: "llama".into(),
            seed: 1,
            overwrite: false,
        };
        create(&options).unwrap();
        ChatTokenizer::load(&options.out, &options.out, chrono::NaiveDateTime::default()).unwrap()
    }

    fn pair(id: u64, rejected: &str) -> Pair {
        let (prompt, rejected) = (Some("a ".to_owned()), Some(rejected.to_owned()));
        let text = PlainText { prompt, chosen: format!("yes {id}"), rejected };
        Example::new(Content::Text(text)).into_wire(id, format!("pairs.jsonl line {}", id + 1))
    }

    const RULE: Rule = Rule {
        max_len: 64,
        preferred_only: false,
        embedding_rows: u32::MAX,
        train_on_inputs: false,
        assistant_only: true,
    };

    #[test]
    fn a_pair_is_tokenised_once_and_only_for_its_own_file() {
        let mut tokens = PairTokenizer::new(tokenizer(), RULE, CACHE_BYTES);
        let pairs = [pair(0, "no"), pair(1, "never"), pair(0, "no")];
        let measured = tokens.measure(Split::Train, &pairs).unwrap();
        assert_eq!((measured.lengths.len(), measured.refusal, tokens.cache.len()), (3, None, 2));
        let first = tokens.tokenize(Split::Train, &pairs).unwrap();
        assert_eq!((&first[0], tokens.cache.len()), (&first[2], 2));
        // Pair 0 has another text under its old id: equal tokens show that they came from the cache.
        let changed = [pair(2, "new"), pair(0, "something else"), pair(1, "never")];
        let cached = tokens.tokenize(Split::Train, &changed).unwrap();
        assert_eq!(cached[1..], first[..2]);
        let other_file = tokens.tokenize(Split::Validation, &changed).unwrap();
        assert_ne!(other_file[1], first[0]);
    }

    #[test]
    fn a_full_cache_changes_no_tokens() {
        let pairs: Vec<Pair> = (0..9).map(|id| pair(id, "no")).collect();
        let found = [0, 400, CACHE_BYTES].map(|bytes| {
            let mut tokens = PairTokenizer::new(tokenizer(), RULE, bytes);
            let twice = [0, 1].map(|_| tokens.tokenize(Split::Train, &pairs).unwrap());
            assert_eq!(twice[0], twice[1]);
            (twice, tokens.cache.len())
        });
        assert_eq!((found[0].1, found[2].1), (0, 9));
        assert!((1..9).contains(&found[1].1), "{}", found[1].1);
        assert!(found[0].0 == found[1].0 && found[1].0 == found[2].0);
    }

    #[test]
    fn pairs_that_cannot_be_trained_on_are_not_kept() {
        let mut tokens = PairTokenizer::new(tokenizer(), Rule { max_len: 2, ..RULE }, CACHE_BYTES);
        let measured = tokens.measure(Split::Train, &[pair(0, "no")]).unwrap();
        assert_eq!(measured.lengths[0].verdict(), PairVerdict::DroppedTooLong);
        assert!(tokens.cache.is_empty());
        assert!(tokens.tokenize(Split::Train, &[pair(0, "no")]).is_err());
    }
}
