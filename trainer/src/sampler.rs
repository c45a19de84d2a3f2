//! Sample answers at evaluations: prompts of validation pairs, answered by the policy.

use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::wire::SampleAnswer;
use dyad_proto::{Fault, RunConfig};

use crate::engine::Engine;
use crate::engine::generation::Generation;
use crate::session::feed::SampledPrompts;

/// Answers prompts and turns the answers into text.
#[derive(Debug)]
pub struct Sampler {
    tokenizer: ChatTokenizer,
    max_new_tokens: usize,
    max_len: usize,
    /// Ranks generate together, because weights are sharded.
    together: bool,
}

impl Sampler {
    /// The sampler of a run; `max_len` is the most tokens of prompt and answer.
    #[must_use]
    pub fn new(tokenizer: ChatTokenizer, config: &RunConfig, max_len: usize) -> Self {
        let together = config.zero_stage == 3;
        Self { tokenizer, max_new_tokens: config.max_new_tokens() as usize, max_len, together }
    }

    /// Greedy answers of the policy to this rank's prompts.
    pub fn answers(&self, engine: &Engine, asked: &SampledPrompts) -> Result<Vec<SampleAnswer>, Fault> {
        let how = Generation {
            stop_ids: self.tokenizer.stop_ids(),
            max_new_tokens: self.max_new_tokens,
            max_len: self.max_len,
            slots: asked.slots,
            together: self.together,
        };
        let prompts: Vec<Vec<u32>> = asked.prompts.iter().map(|(.., ids)| ids.clone()).collect();
        let answers = engine.generate(&prompts, how)?;
        let text = |((id, place, prompt), answer): (&(u64, String, Vec<u32>), _)| {
            let crate::engine::generation::GeneratedAnswer { ids, ended } = answer;
            Ok(SampleAnswer {
                id: *id,
                place: place.clone(),
                prompt: self.tokenizer.decode_all(prompt)?,
                answer: self.tokenizer.decode(&ids)?.trim().to_owned(),
                tokens: ids.len() as u32,
                ended,
            })
        };
        asked.prompts.iter().zip(answers).map(text).collect()
    }
}
