//! The key `prefix_sharing`: whether outputs of the same prompt share its tokens.

use std::collections::HashMap;

use dyad_data::tokenized::{Tokenized, Untrained};
use dyad_proto::RunConfig;

/// Which completions a pass scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairLayout {
    /// Both sides, the prompt computed once.
    SharedPairs,
    /// Both sides, each with its own copy of the prompt.
    SeparatePairs,
    /// The chosen side alone (supervised fine-tuning, labelled answers).
    ChosenOnly,
}

impl PairLayout {
    /// The layout that the run's configuration asks for.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        match (config.objective().scores_both_outputs(), config.prefix_sharing) {
            (false, _) => Self::ChosenOnly,
            (true, true) => Self::SharedPairs,
            (true, false) => Self::SeparatePairs,
        }
    }

    /// The layout of a first pass, which also scores the answers of partners if the objective estimates the KL divergence with them.
    #[must_use]
    pub fn of_first_pass(config: &RunConfig) -> Self {
        match (config.objective().estimates_kl(), config.prefix_sharing) {
            (false, _) => Self::of(config),
            (true, true) => Self::SharedPairs,
            (true, false) => Self::SeparatePairs,
        }
    }
}

/// An answer that a pass scores.
pub(super) struct OutputTokens<'a> {
    pub(super) sequence: usize,
    pub(super) tokens: &'a [u32],
    pub(super) untrained: &'a Untrained,
}

impl OutputTokens<'_> {
    /// Number of trained tokens.
    pub(super) fn trained(&self) -> i64 {
        (self.tokens.len() - self.untrained.count()) as i64
    }
}

/// The segments of a micro-batch: each prompt with the answers that follow it. With `SharedPairs`, all pairs of one prompt share a
/// segment.
pub(super) fn plan<'a>(
    pairs: &[&'a Tokenized],
    layout: PairLayout,
) -> Vec<(&'a [u32], Vec<OutputTokens<'a>>)> {
    let mut plan: Vec<(&[u32], Vec<OutputTokens<'_>>)> = Vec::new();
    let mut of_prompt: HashMap<&[u32], usize> = HashMap::new();
    for (index, pair) in pairs.iter().enumerate() {
        let prompt = pair.prompt.as_slice();
        let output = |sequence, tokens, untrained| OutputTokens { sequence, tokens, untrained };
        let chosen = |sequence| output(sequence, &pair.chosen, &pair.chosen_untrained);
        let rejected = |sequence| output(sequence, &pair.rejected, &pair.rejected_untrained);
        match layout {
            PairLayout::ChosenOnly => plan.push((prompt, vec![chosen(index)])),
            PairLayout::SeparatePairs => {
                plan.push((prompt, vec![chosen(2 * index)]));
                plan.push((prompt, vec![rejected(2 * index + 1)]));
            }
            PairLayout::SharedPairs => {
                let segment = *of_prompt.entry(prompt).or_insert(plan.len());
                if segment == plan.len() {
                    plan.push((prompt, Vec::new()));
                }
                plan[segment].1.extend([chosen(2 * index), rejected(2 * index + 1)]);
            }
        }
    }
    plan
}

/// Packed tokens that one pair takes in a layout.
#[must_use]
pub fn packed_tokens(pair: &Tokenized, layout: PairLayout) -> usize {
    let (prompt, chosen, rejected) = (pair.prompt.len(), pair.chosen.len(), pair.rejected.len());
    match layout {
        PairLayout::SharedPairs => prompt + chosen + rejected,
        PairLayout::SeparatePairs => 2 * prompt + chosen + rejected,
        PairLayout::ChosenOnly => prompt + chosen,
    }
}
