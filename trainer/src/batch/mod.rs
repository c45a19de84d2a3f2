//! Packed micro-batches: the tokens of many pairs in one row without padding.
//!
//! - [`micro_batch`]: the tensors of one micro-batch.
//! - [`prefix_sharing`]: which pairs share the tokens of their prompt.
//! - [`token_counts`]: how many tokens the passes compute, and how many sharing saves.
//!
//! A segment is one prompt with its branches. With prefix sharing a pair is one segment with two branches (`[prompt | chosen |
//! rejected]`): the prompt is computed once, and the rejected positions restart at the prompt's end. Further pairs of the same prompt are
//! further branches. Without prefix sharing a pair is two segments with one branch each. Both layouts give the same log-probabilities.

pub mod micro_batch;
pub mod prefix_sharing;
pub mod token_counts;

use dyad_data::tokenized::Tokenized;

pub use self::micro_batch::MicroBatch;
pub use self::prefix_sharing::{PairLayout, packed_tokens};
pub use self::token_counts::TokenCounts;

/// Splits pairs, in order, into the fewest runs of at most `budget` packed tokens, and evens out their sizes. A pair above the budget
/// gets its own run.
#[must_use]
pub fn micro_batches(pairs: &[Tokenized], layout: PairLayout, budget: usize) -> Vec<Vec<&Tokenized>> {
    let fewest = filled_up(pairs, layout, budget);
    let total: usize = pairs.iter().map(|pair| packed_tokens(pair, layout)).sum();
    // The smallest budget that gives no more runs evens them out.
    let (mut low, mut high) = (total / fewest.len().max(1), budget);
    let mut best = None;
    while low < high {
        let middle = low + (high - low) / 2;
        let tried = filled_up(pairs, layout, middle);
        if tried.len() > fewest.len() {
            low = middle + 1;
        } else {
            (high, best) = (middle, Some(tried));
        }
    }
    best.unwrap_or(fewest)
}

/// Fills runs of at most `budget` packed tokens greedily, in order.
fn filled_up(pairs: &[Tokenized], layout: PairLayout, budget: usize) -> Vec<Vec<&Tokenized>> {
    let mut batches: Vec<Vec<&Tokenized>> = Vec::new();
    let mut filled = 0;
    for pair in pairs {
        let tokens = packed_tokens(pair, layout);
        match batches.last_mut() {
            Some(batch) if filled + tokens <= budget => {
                batch.push(pair);
                filled += tokens;
            }
            _ => {
                batches.push(vec![pair]);
                filled = tokens;
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized::new(prompt.into(), chosen.into(), rejected.into())
    }

    #[test]
    fn micro_batches_keep_order_and_budget() {
        let pairs: Vec<Tokenized> = (1..6).map(|n| pair(&vec![1; n], &[2], &[3])).collect();
        let batches = micro_batches(&pairs, PairLayout::SharedPairs, 8);
        let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
        assert_eq!(sizes, [2, 1, 1, 1]);
        let tiny = micro_batches(&pairs, PairLayout::SharedPairs, 1);
        assert_eq!(tiny.len(), 5);
        assert!(micro_batches(&[], PairLayout::SharedPairs, 8).is_empty());
    }

    #[test]
    fn micro_batches_are_of_about_the_same_size() {
        // Ten pairs of 4 tokens in runs of at most 36: not nine and one.
        let pairs: Vec<Tokenized> = (0..10).map(|_| pair(&[1, 2], &[3], &[4])).collect();
        let sizes = |budget| -> Vec<usize> {
            micro_batches(&pairs, PairLayout::SharedPairs, budget).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(36), [5, 5]);
        assert_eq!(sizes(40), [10]);
        assert_eq!(sizes(16), [4, 4, 2]);
    }
}
