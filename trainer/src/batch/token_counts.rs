//! Counts the tokens that the passes compute and those that prefix sharing saves.

use dyad_data::tokenized::Tokenized;

use super::prefix_sharing::{PairLayout, plan};

/// Tokens of one or more passes, by origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TokenCounts {
    /// Tokens that go through the model.
    pub computed: u64,
    /// Prompt tokens among them that prefix sharing would have saved.
    pub repeated_prompt: u64,
    /// Padding tokens among them. Packed rows have none.
    pub padding: u64,
    /// Tokens to compute if every output had its own prompt.
    pub unshared: u64,
}

impl TokenCounts {
    /// Counts of one micro-batch.
    #[must_use]
    pub fn of(pairs: &[&Tokenized], layout: PairLayout) -> Self {
        let computed = |layout| -> u64 {
            let segments = plan(pairs, layout);
            let outputs = segments.iter().flat_map(|(_, outputs)| outputs);
            let prompts = segments.iter().map(|(prompt, _)| prompt.len());
            (prompts.sum::<usize>() + outputs.map(|output| output.tokens.len()).sum::<usize>()) as u64
        };
        match layout {
            PairLayout::ChosenOnly => {
                let computed = computed(layout);
                Self { computed, unshared: computed, ..Self::default() }
            }
            PairLayout::SharedPairs | PairLayout::SeparatePairs => Self {
                computed: computed(layout),
                repeated_prompt: computed(layout) - computed(PairLayout::SharedPairs),
                padding: 0,
                unshared: computed(PairLayout::SeparatePairs),
            },
        }
    }

    /// The mean over `steps` steps.
    #[must_use]
    pub fn per(self, steps: u64) -> Self {
        Self {
            computed: self.computed / steps,
            repeated_prompt: self.repeated_prompt / steps,
            padding: self.padding / steps,
            unshared: self.unshared / steps,
        }
    }
}

impl std::ops::AddAssign for TokenCounts {
    fn add_assign(&mut self, other: Self) {
        self.computed += other.computed;
        self.repeated_prompt += other.repeated_prompt;
        self.padding += other.padding;
        self.unshared += other.unshared;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_by_where_they_come_from() {
        let one = Tokenized::new([1, 2, 3].into(), [4, 5].into(), [6].into());
        let pairs = [&one];
        let shared = TokenCounts::of(&pairs, PairLayout::SharedPairs);
        assert_eq!(shared, TokenCounts { computed: 6, repeated_prompt: 0, padding: 0, unshared: 9 });
        let separate = TokenCounts::of(&pairs, PairLayout::SeparatePairs);
        assert_eq!(separate, TokenCounts { computed: 9, repeated_prompt: 3, padding: 0, unshared: 9 });
        assert_eq!(TokenCounts::of(&pairs, PairLayout::ChosenOnly).computed, 5);
    }
}
