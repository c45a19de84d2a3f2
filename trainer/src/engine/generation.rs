//! Greedy answers of the policy during a run. Every pass is packed as the passes of a step are, so it runs on every device and with every
//! stage of ZeRO.
//!
//! There is no cache of keys and values: sample answers are few and short, and a cache would be a second implementation of attention.

use dyad_data::tokenized::Tokenized;
use dyad_torch::transfer::values;

use super::Engine;
use crate::batch::{MicroBatch, PairLayout};
use crate::error::EngineError;
use crate::observe::progress;

/// How answers are generated.
#[derive(Clone, Copy, Debug)]
pub struct Generation<'a> {
    /// Ids that end an answer.
    pub stop_ids: &'a [u32],
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Most tokens of prompt and answer.
    pub max_len: usize,
    /// Number of answers of the rank that has most.
    pub slots: usize,
    /// Weights are sharded: every rank makes as many passes as any other.
    pub together: bool,
}

/// An answer that is being generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratedAnswer {
    /// Ids of the answer, without the one that ended it.
    pub ids: Vec<u32>,
    /// A stop id ended the answer; otherwise it was cut.
    pub ended: bool,
}

impl Engine {
    /// Greedy answers to this rank's prompts. With sharded weights every rank must call it, with the same `how`: ranks without a prompt
    /// help to gather the weights.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        how: Generation<'_>,
    ) -> Result<Vec<GeneratedAnswer>, EngineError> {
        let mut answers = Vec::new();
        for slot in 0..how.slots {
            let prompt = prompts.get(slot);
            let mut ids = prompt.cloned().unwrap_or_default();
            let (start, mut ended) = (ids.len(), prompt.is_none());
            for _ in 0..how.max_new_tokens {
                let full = ended || ids.len() >= how.max_len;
                if full && !how.together {
                    break;
                }
                let next = self.next_token((!full).then_some(&ids))?;
                progress::advance();
                match next {
                    Some(id) if how.stop_ids.contains(&id) => ended = true,
                    Some(id) => ids.push(id),
                    None => {}
                }
            }
            if prompt.is_some() {
                answers.push(GeneratedAnswer { ids: ids.split_off(start), ended });
            }
        }
        Ok(answers)
    }

    /// The likeliest token after these; `None` without tokens.
    fn next_token(&self, ids: Option<&Vec<u32>>) -> Result<Option<u32>, EngineError> {
        // A row scores a completion's token from the position before it. The token itself does not matter here.
        let pair = ids.map(|ids| Tokenized::new(ids.clone(), vec![0], Vec::new()));
        let pairs: Vec<&Tokenized> = pair.iter().collect();
        let batch = MicroBatch::pack(&pairs, PairLayout::ChosenOnly, self.policy.place.device);
        let rows = self.policy.score_rows(&batch)?;
        let _head = self.policy.gather_head()?;
        if batch.is_empty() {
            return Ok(None);
        }
        let logits = tch::no_grad(|| rows.matmul(&self.policy.head().tr()));
        Ok(values::<i64>(&logits.argmax(-1, false)).first().map(|id| *id as u32))
    }
}
