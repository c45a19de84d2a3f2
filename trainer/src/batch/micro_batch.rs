//! Tensors of one packed micro-batch: the tokens of many pairs in one row without padding, and which positions are scored.

use std::cell::OnceCell;

use dyad_data::tokenized::Tokenized;
use dyad_torch::backend::on_gpu_path;
use dyad_torch::ops::flash_attention::{Gathered, Runs, Varlen};
use dyad_torch::ops::segment::Segment;
use dyad_torch::transfer::{Pack, narrow_view};
use tch::{Device, Kind, Tensor};

use super::prefix_sharing::{OutputTokens, PairLayout, plan};
use crate::model::rotary::Rotary;

/// Tokens, positions and scored rows of one micro-batch.
///
/// Scored rows are ordered pair by pair, chosen before rejected; row r predicts `targets[r]` from the hidden state at
/// `rows[r]` and belongs to sequence `sequences[r]` (`2 * pair` for chosen, `2 * pair + 1` for rejected; the pair's number
/// itself with [`PairLayout::ChosenOnly`]).
#[derive(Debug)]
pub struct MicroBatch {
    /// `[tokens]`.
    pub tokens: Tensor,
    /// `[tokens]`.
    pub positions: Tensor,
    /// Prompts and their branches: which tokens attend to which.
    pub segments: Vec<Segment>,
    /// The segments for variable-length kernels; `None` on devices without these kernels and for an empty batch.
    pub varlen: Option<Varlen>,
    /// Cosines and sines of the positions; the first model that needs them computes them.
    pub rotary: OnceCell<Rotary>,
    /// `[rows]`.
    pub rows: Tensor,
    /// `[rows]`.
    pub targets: Tensor,
    /// `[rows]`.
    pub sequences: Tensor,
    /// 1 for rows beyond the length of the pair's shorter output, 0 for others; all 0 without a second output. `[rows]`
    pub tails: Tensor,
    /// Trained completion tokens of each sequence. `[sequences]`
    pub lengths: Tensor,
    /// Factor of each pair's loss. `[pairs]`, float64
    pub weights: Tensor,
    /// Side of each sequence in metrics: [`CHOSEN`], [`REJECTED`] or [`PARTNER`]. `[sequences]`
    pub sides: Tensor,
    /// Rows of each pair, in order: the head works on whole pairs.
    pub rows_per_pair: Vec<i64>,
    /// 2 for both sides, 1 for the chosen side alone.
    pub sequences_per_pair: i64,
}

/// Side of preferred and of desirable answers.
pub const CHOSEN: i64 = 0;
/// Side of the other answers.
pub const REJECTED: i64 = 1;
/// Side of answers to other prompts, with which KTO estimates the KL divergence.
pub const PARTNER: i64 = 2;

/// Sides of a pair's sequences.
fn sides(pair: &Tokenized) -> [i64; 2] {
    match pair.label {
        None => [CHOSEN, REJECTED],
        Some(true) => [CHOSEN, PARTNER],
        Some(false) => [REJECTED, PARTNER],
    }
}

impl MicroBatch {
    /// Packs pairs in the given order.
    #[must_use]
    pub fn pack(pairs: &[&Tokenized], layout: PairLayout, device: Device) -> Self {
        let mut builder = Builder::default();
        for (prompt, outputs) in plan(pairs, layout) {
            builder.segment(prompt, outputs);
        }
        let weights = pairs.iter().map(|pair| pair.weight).collect();
        let per_pair = if layout == PairLayout::ChosenOnly { 1 } else { 2 };
        let sides = pairs.iter().flat_map(|pair| sides(pair).into_iter().take(per_pair)).collect();
        builder.finish(device, per_pair as i64, weights, sides)
    }

    /// Packed tokens of this micro-batch.
    #[must_use]
    pub fn token_count(&self) -> i64 {
        self.tokens.size()[0]
    }

    /// True if there is nothing to compute, because another rank has more micro-batches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows_per_pair.is_empty()
    }

    /// Pairs of this micro-batch.
    #[must_use]
    pub fn pair_count(&self) -> i64 {
        self.rows_per_pair.len() as i64
    }
}

/// Where an answer lies in the packed row.
struct Placed<'a> {
    output: OutputTokens<'a>,
    /// One past the prompt's last token.
    prompt_end: i64,
    first: i64,
}

#[derive(Default)]
struct Builder<'a> {
    tokens: Vec<i64>,
    positions: Vec<i64>,
    segments: Vec<Segment>,
    placed: Vec<Placed<'a>>,
}

impl<'a> Builder<'a> {
    fn segment(&mut self, prompt: &[u32], outputs: Vec<OutputTokens<'a>>) {
        let start = self.tokens.len() as i64;
        self.extend(prompt, 0);
        let prompt_end = self.tokens.len() as i64;
        let branches = outputs.iter().map(|output| output.tokens.len() as i64).collect();
        for output in outputs {
            let first = self.tokens.len() as i64;
            self.extend(output.tokens, prompt.len() as i64);
            self.placed.push(Placed { output, prompt_end, first });
        }
        self.segments.push(Segment { start, prompt: prompt.len() as i64, branches });
    }

    fn extend(&mut self, tokens: &[u32], first_position: i64) {
        self.tokens.extend(tokens.iter().map(|&token| i64::from(token)));
        self.positions.extend((0..tokens.len() as i64).map(|offset| first_position + offset));
    }

    fn finish(
        mut self,
        device: Device,
        sequences_per_pair: i64,
        weights: Vec<f64>,
        sides: Vec<i64>,
    ) -> MicroBatch {
        self.placed.sort_by_key(|placed| placed.output.sequence);
        let (mut rows, mut targets, mut sequences, mut tails) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let lengths: Vec<i64> = self.placed.iter().map(|placed| placed.output.trained()).collect();
        let shorter = |place: usize| {
            let first = place - place % sequences_per_pair as usize;
            lengths[first..first + sequences_per_pair as usize].iter().min().copied().unwrap_or(0)
        };
        for (place, Placed { output, prompt_end, first }) in self.placed.iter().enumerate() {
            let shorter = shorter(place);
            // Tokens that are not trained have no row, so the head never sees them.
            for (row, offset) in output.untrained.trained(output.tokens.len()).enumerate() {
                tails.push(i64::from(row as i64 >= shorter));
                // The last prompt token predicts the first token of every answer; later tokens follow their own answer.
                rows.push(if offset == 0 { prompt_end - 1 } else { first + offset as i64 - 1 });
                targets.push(i64::from(output.tokens[offset]));
                sequences.push(output.sequence as i64);
            }
        }
        let of_pair = self.placed.chunks(sequences_per_pair as usize);
        let rows_of = |placed: &[Placed<'_>]| placed.iter().map(|placed| placed.output.trained()).sum();
        let rows_per_pair = of_pair.map(rows_of).collect();
        // Sent as bits among the lists of integers.
        let weights = weights.into_iter().map(|weight| weight.to_bits() as i64).collect();
        let lists = [self.tokens, self.positions, rows, targets, sequences, tails, lengths, weights, sides];
        let runs = (on_gpu_path(device) && !self.segments.is_empty()).then(|| Runs::of(&self.segments));
        let (lists, varlen) = upload(lists, runs, device);
        let [tokens, positions, rows, targets, sequences, tails, lengths, weights, sides] = lists;
        MicroBatch {
            tokens,
            positions,
            segments: self.segments,
            varlen,
            rotary: OnceCell::new(),
            rows,
            targets,
            sequences,
            tails,
            lengths,
            weights: weights.view_dtype(Kind::Double),
            sides,
            rows_per_pair,
            sequences_per_pair,
        }
    }
}

/// Uploads all tensors of a micro-batch in one copy.
fn upload(lists: [Vec<i64>; 9], runs: Option<Runs>, device: Device) -> ([Tensor; 9], Option<Varlen>) {
    let mut pack = Pack::default();
    lists.into_iter().for_each(|list| pack.add(list));
    if let Some(runs) = &runs {
        pack.add_narrow(&runs.queries);
        pack.add_narrow(&runs.keys);
        pack.add(runs.gather.iter().copied());
        let copies = runs.copies();
        pack.add_narrow(&copies.starts);
        pack.add_narrow(&copies.places);
    }
    let mut sent = pack.upload(device).into_iter();
    let mut next = || sent.next().unwrap_or_default();
    let lists = std::array::from_fn(|_| next());
    let varlen = runs.map(|runs| Varlen {
        queries: narrow_view(&next(), runs.queries.len()),
        keys: narrow_view(&next(), runs.keys.len()),
        gathered: gathered(&runs, [next(), next(), next()]),
        max_queries: runs.max_queries,
        max_keys: runs.max_keys,
        pairs: runs.pairs,
    });
    (lists, varlen)
}

fn gathered(runs: &Runs, [rows, starts, places]: [Tensor; 3]) -> Option<Gathered> {
    let (keys, queries) = (runs.gather.len(), runs.queries.last().map_or(0, |&rows| rows as usize));
    let lists = || (narrow_view(&starts, queries + 1), narrow_view(&places, keys));
    (keys > 0).then(lists).map(|(starts, places)| Gathered { rows, starts, places })
}

#[cfg(test)]
mod tests {
    use dyad_data::tokenized::Untrained;

    use super::*;
    use crate::batch::TokenCounts;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized::new(prompt.into(), chosen.into(), rejected.into())
    }

    fn list(tensor: &Tensor) -> Vec<i64> {
        tensor.try_into().unwrap()
    }

    #[test]
    fn rejected_restarts_at_the_prompts_end() {
        let pair = pair(&[1, 2, 3], &[4, 5], &[6, 7, 8]);
        let batch = MicroBatch::pack(&[&pair], PairLayout::SharedPairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(list(&batch.positions), [0, 1, 2, 3, 4, 3, 4, 5]);
        assert_eq!(list(&batch.rows), [2, 3, 2, 5, 6]);
        assert_eq!(list(&batch.targets), [4, 5, 6, 7, 8]);
        assert_eq!(list(&batch.sequences), [0, 0, 1, 1, 1]);
        assert_eq!(list(&batch.lengths), [2, 3]);
        assert_eq!(batch.segments, [Segment { start: 0, prompt: 3, branches: vec![2, 3] }]);
    }

    /// Position, attention and inputs are those of all tokens; only trained ones have rows.
    #[test]
    fn tokens_that_are_not_trained_have_no_rows() {
        let pair = Tokenized {
            chosen_untrained: Untrained::of(&[true, false, false, true]),
            rejected_untrained: Untrained::of(&[false, true]),
            ..pair(&[1, 2], &[3, 4, 5, 6], &[7, 8])
        };
        let batch = MicroBatch::pack(&[&pair], PairLayout::SharedPairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(list(&batch.positions), [0, 1, 2, 3, 4, 5, 2, 3]);
        assert_eq!(batch.segments, [Segment { start: 0, prompt: 2, branches: vec![4, 2] }]);
        assert_eq!((list(&batch.rows), list(&batch.targets)), (vec![1, 4, 6], vec![3, 6, 8]));
        assert_eq!((list(&batch.sequences), list(&batch.lengths)), (vec![0, 0, 1], vec![2, 1]));
        assert_eq!((list(&batch.tails), batch.rows_per_pair), (vec![0, 1, 0], vec![3]));
    }

    #[test]
    fn separate_layout_repeats_the_prompt() {
        let pair = pair(&[1, 2], &[4], &[6]);
        let batch = MicroBatch::pack(&[&pair, &pair], PairLayout::SeparatePairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 4, 1, 2, 6, 1, 2, 4, 1, 2, 6]);
        assert_eq!(list(&batch.rows), [1, 4, 7, 10]);
        assert_eq!(list(&batch.sequences), [0, 1, 2, 3]);
        assert_eq!(batch.rows_per_pair, [2, 2]);
    }

    /// Two pairs of one prompt with another between them: the rows keep the pairs' order.
    #[test]
    fn pairs_of_one_prompt_share_it() {
        let (a, b) = (pair(&[1, 2], &[4], &[6, 7]), pair(&[9], &[4], &[5]));
        let again = pair(&[1, 2], &[8], &[3]);
        let batch = MicroBatch::pack(&[&a, &b, &again], PairLayout::SharedPairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 4, 6, 7, 8, 3, 9, 4, 5]);
        assert_eq!(list(&batch.positions), [0, 1, 2, 2, 3, 2, 2, 0, 1, 1]);
        assert_eq!(batch.segments[0], Segment { start: 0, prompt: 2, branches: vec![1, 2, 1, 1] });
        assert_eq!(list(&batch.rows), [1, 1, 3, 7, 7, 1, 1]);
        assert_eq!(list(&batch.targets), [4, 6, 7, 4, 5, 8, 3]);
        assert_eq!(list(&batch.sequences), [0, 1, 1, 2, 3, 4, 5]);
        assert_eq!(batch.rows_per_pair, [3, 2, 2]);
        assert_eq!(TokenCounts::of(&[&a, &b, &again], PairLayout::SharedPairs).computed, 10);
    }
}
