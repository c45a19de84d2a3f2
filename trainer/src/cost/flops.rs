//! Cost of a pair, by which ranks get equal shares: operations of one forward pass. The backward pass costs the same multiple of it for
//! every pair.

use dyad_families::shape::{PairTokens, Shape};
use dyad_proto::wire::PairLength;

use crate::batch::PairLayout;
use dyad_families::ModelConfig;

/// Counts the operations of one model's passes.
#[derive(Clone, Debug)]
pub struct PassCost {
    shape: Shape,
    layout: PairLayout,
}

impl PassCost {
    /// For a model with this configuration.
    #[must_use]
    pub fn new(config: &ModelConfig, layout: PairLayout) -> Self {
        Self { shape: Shape::from(config), layout }
    }

    /// Operations of a forward pass over a pair of these lengths, in thousands.
    #[must_use]
    pub fn of(&self, length: &PairLength) -> u64 {
        let pair = PairTokens {
            prompt: length.prompt_tokens.into(),
            chosen: length.chosen_tokens.into(),
            rejected: length.rejected_tokens.into(),
        };
        let work = match self.layout {
            PairLayout::ChosenOnly => pair.chosen_only(),
            PairLayout::SharedPairs => pair.shared(),
            PairLayout::SeparatePairs => pair.separate(),
        };
        (self.shape.forward(work).total() / 1e3) as u64
    }
}
