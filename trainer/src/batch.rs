//! Packed micro-batches: the tokens of many pairs in one row, no padding, and who sees whom.
//!
//! A [`Segment`] is one prompt with its branches. With prefix sharing a pair is one segment with two branches
//! (`[prompt | chosen | rejected]`, the prompt computed once, the rejected positions restarting at the prompt's end), and
//! further pairs of the same prompt are further branches; without it, two segments with one branch each. Both give the same
//! log-probabilities.

use std::cell::OnceCell;
use std::collections::HashMap;

use dyad_data::tokenized::Tokenized;
use dyad_proto::RunConfig;
use tch::{Device, Tensor};

use crate::model::blocks::Rotary;
use dyad_torch::backend::on_gpu_path;
use dyad_torch::ops::flash_attention::{Gathered, Runs, Varlen};
use dyad_torch::ops::segment::Segment;
use dyad_torch::transfer::{Pack, narrow_view};

/// Which completions a pass scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Both sides, the prompt computed once.
    SharedPairs,
    /// Both sides, each with its own copy of the prompt.
    SeparatePairs,
    /// The chosen side alone (supervised fine-tuning).
    ChosenOnly,
}

impl Layout {
    /// What a run asks for.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        match (config.objective().scores_both_outputs(), config.prefix_sharing) {
            (false, _) => Self::ChosenOnly,
            (true, true) => Self::SharedPairs,
            (true, false) => Self::SeparatePairs,
        }
    }
}

/// Tokens, positions and scored rows of one micro-batch.
///
/// Scored rows are ordered pair by pair, chosen before rejected; row r predicts `targets[r]` from the hidden state at
/// `rows[r]` and belongs to sequence `sequences[r]` (`2 * pair` for chosen, `2 * pair + 1` for rejected; the pair's number
/// itself with [`Layout::ChosenOnly`]).
#[derive(Debug)]
pub struct MicroBatch {
    /// `[tokens]`.
    pub tokens: Tensor,
    /// `[tokens]`.
    pub positions: Tensor,
    /// Who sees whom.
    pub segments: Vec<Segment>,
    /// The same for variable-length kernels, on devices that have them.
    pub varlen: Option<Varlen>,
    /// Cosines and sines of the positions, once a model has needed them.
    pub rotary: OnceCell<Rotary>,
    /// `[rows]`.
    pub rows: Tensor,
    /// `[rows]`.
    pub targets: Tensor,
    /// `[rows]`.
    pub sequences: Tensor,
    /// Completion tokens of each sequence. `[sequences]`
    pub lengths: Tensor,
    /// Rows of each pair, in order: the head works on whole pairs.
    pub rows_per_pair: Vec<i64>,
    /// 2 for both sides, 1 for the chosen side alone.
    pub sequences_per_pair: i64,
}

impl MicroBatch {
    /// Packs pairs in the given order.
    #[must_use]
    pub fn pack(pairs: &[&Tokenized], layout: Layout, device: Device) -> Self {
        let mut builder = Builder::default();
        for (prompt, outputs) in plan(pairs, layout) {
            builder.segment(prompt, outputs);
        }
        builder.finish(device, if layout == Layout::ChosenOnly { 1 } else { 2 })
    }

    /// Packed tokens of this micro-batch.
    #[must_use]
    pub fn token_count(&self) -> i64 {
        self.tokens.size()[0]
    }

    /// Nothing to compute: another rank has more micro-batches.
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

/// An answer that a pass scores.
struct OutputTokens<'a> {
    sequence: usize,
    tokens: &'a [u32],
}

/// Which answers follow which prompt, computed once. Pairs of one prompt share it.
fn plan<'a>(pairs: &[&'a Tokenized], layout: Layout) -> Vec<(&'a [u32], Vec<OutputTokens<'a>>)> {
    let mut plan: Vec<(&[u32], Vec<OutputTokens<'_>>)> = Vec::new();
    let mut of_prompt: HashMap<&[u32], usize> = HashMap::new();
    for (index, pair) in pairs.iter().enumerate() {
        let prompt = pair.prompt.as_slice();
        let chosen = |sequence| OutputTokens { sequence, tokens: &pair.chosen };
        let rejected = |sequence| OutputTokens { sequence, tokens: &pair.rejected };
        match layout {
            Layout::ChosenOnly => plan.push((prompt, vec![chosen(index)])),
            Layout::SeparatePairs => {
                plan.push((prompt, vec![chosen(2 * index)]));
                plan.push((prompt, vec![rejected(2 * index + 1)]));
            }
            Layout::SharedPairs => {
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

    fn finish(mut self, device: Device, sequences_per_pair: i64) -> MicroBatch {
        self.placed.sort_by_key(|placed| placed.output.sequence);
        let (mut rows, mut targets, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        let lengths = self.placed.iter().map(|placed| placed.output.tokens.len() as i64).collect();
        for Placed { output, prompt_end, first } in &self.placed {
            for (offset, &target) in output.tokens.iter().enumerate() {
                // The last prompt token predicts the first token of every answer; later tokens follow their own answer.
                rows.push(if offset == 0 { prompt_end - 1 } else { first + offset as i64 - 1 });
                targets.push(i64::from(target));
                sequences.push(output.sequence as i64);
            }
        }
        let of_pair = self.placed.chunks(sequences_per_pair as usize);
        let rows_of =
            |placed: &[Placed<'_>]| placed.iter().map(|placed| placed.output.tokens.len() as i64).sum();
        let rows_per_pair = of_pair.map(rows_of).collect();
        let lists = [self.tokens, self.positions, rows, targets, sequences, lengths];
        let runs = (on_gpu_path(device) && !self.segments.is_empty()).then(|| Runs::of(&self.segments));
        let ([tokens, positions, rows, targets, sequences, lengths], varlen) = upload(lists, runs, device);
        MicroBatch {
            tokens,
            positions,
            segments: self.segments,
            varlen,
            rotary: OnceCell::new(),
            rows,
            targets,
            sequences,
            lengths,
            rows_per_pair,
            sequences_per_pair,
        }
    }
}

/// Everything that a device needs of a micro-batch, in one copy.
fn upload(lists: [Vec<i64>; 6], runs: Option<Runs>, device: Device) -> ([Tensor; 6], Option<Varlen>) {
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
    let lists = [next(), next(), next(), next(), next(), next()];
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

/// Packed tokens that one pair takes in a layout.
#[must_use]
pub fn cost(pair: &Tokenized, layout: Layout) -> usize {
    let (prompt, chosen, rejected) = (pair.prompt.len(), pair.chosen.len(), pair.rejected.len());
    match layout {
        Layout::SharedPairs => prompt + chosen + rejected,
        Layout::SeparatePairs => 2 * prompt + chosen + rejected,
        Layout::ChosenOnly => prompt + chosen,
    }
}

/// Where the tokens of some passes come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TokenCounts {
    /// Tokens that go through the model.
    pub computed: u64,
    /// Of these, prompt tokens that were computed before for the same pair.
    pub repeated_prompt: u64,
    /// Of these, padding. Packed rows have none.
    pub padding: u64,
    /// What it would take if every output had a prompt of its own.
    pub unshared: u64,
}

impl TokenCounts {
    /// Of one micro-batch.
    #[must_use]
    pub fn of(pairs: &[&Tokenized], layout: Layout) -> Self {
        let computed = |layout| -> u64 {
            let segments = plan(pairs, layout);
            let outputs = segments.iter().flat_map(|(_, outputs)| outputs);
            let prompts = segments.iter().map(|(prompt, _)| prompt.len());
            (prompts.sum::<usize>() + outputs.map(|output| output.tokens.len()).sum::<usize>()) as u64
        };
        match layout {
            Layout::ChosenOnly => {
                let computed = computed(layout);
                Self { computed, unshared: computed, ..Self::default() }
            }
            Layout::SharedPairs | Layout::SeparatePairs => Self {
                computed: computed(layout),
                repeated_prompt: computed(layout) - computed(Layout::SharedPairs),
                padding: 0,
                unshared: computed(Layout::SeparatePairs),
            },
        }
    }

    /// The mean over so many steps.
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

/// Splits pairs, in order, into as few runs of at most `budget` packed tokens as there can be, and these into runs of about
/// the same size; a pair above the budget stands alone.
#[must_use]
pub fn micro_batches(pairs: &[Tokenized], layout: Layout, budget: usize) -> Vec<Vec<&Tokenized>> {
    let fewest = filled_up(pairs, layout, budget);
    let total: usize = pairs.iter().map(|pair| cost(pair, layout)).sum();
    // The smallest budget that still needs no more runs is the one that evens them out.
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

/// Runs of at most `budget` packed tokens, each as full as the next pair allows.
fn filled_up(pairs: &[Tokenized], layout: Layout, budget: usize) -> Vec<Vec<&Tokenized>> {
    let mut batches: Vec<Vec<&Tokenized>> = Vec::new();
    let mut filled = 0;
    for pair in pairs {
        let cost = cost(pair, layout);
        match batches.last_mut() {
            Some(batch) if filled + cost <= budget => {
                batch.push(pair);
                filled += cost;
            }
            _ => {
                batches.push(vec![pair]);
                filled = cost;
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized { prompt: prompt.into(), chosen: chosen.into(), rejected: rejected.into() }
    }

    fn list(tensor: &Tensor) -> Vec<i64> {
        tensor.try_into().unwrap()
    }

    #[test]
    fn rejected_restarts_at_the_prompts_end() {
        let pair = pair(&[1, 2, 3], &[4, 5], &[6, 7, 8]);
        let batch = MicroBatch::pack(&[&pair], Layout::SharedPairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(list(&batch.positions), [0, 1, 2, 3, 4, 3, 4, 5]);
        assert_eq!(list(&batch.rows), [2, 3, 2, 5, 6]);
        assert_eq!(list(&batch.targets), [4, 5, 6, 7, 8]);
        assert_eq!(list(&batch.sequences), [0, 0, 1, 1, 1]);
        assert_eq!(list(&batch.lengths), [2, 3]);
        assert_eq!(batch.segments, [Segment { start: 0, prompt: 3, branches: vec![2, 3] }]);
    }

    #[test]
    fn separate_layout_repeats_the_prompt() {
        let pair = pair(&[1, 2], &[4], &[6]);
        let batch = MicroBatch::pack(&[&pair, &pair], Layout::SeparatePairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 4, 1, 2, 6, 1, 2, 4, 1, 2, 6]);
        assert_eq!(list(&batch.rows), [1, 4, 7, 10]);
        assert_eq!(list(&batch.sequences), [0, 1, 2, 3]);
        assert_eq!(batch.rows_per_pair, [2, 2]);
    }

    #[test]
    fn tokens_are_counted_by_where_they_come_from() {
        let one = pair(&[1, 2, 3], &[4, 5], &[6]);
        let pairs = [&one];
        let shared = TokenCounts::of(&pairs, Layout::SharedPairs);
        assert_eq!(shared, TokenCounts { computed: 6, repeated_prompt: 0, padding: 0, unshared: 9 });
        let separate = TokenCounts::of(&pairs, Layout::SeparatePairs);
        assert_eq!(separate, TokenCounts { computed: 9, repeated_prompt: 3, padding: 0, unshared: 9 });
        assert_eq!(TokenCounts::of(&pairs, Layout::ChosenOnly).computed, 5);
    }

    /// Two pairs of one prompt with another between them: the rows keep the pairs' order.
    #[test]
    fn pairs_of_one_prompt_share_it() {
        let (a, b) = (pair(&[1, 2], &[4], &[6, 7]), pair(&[9], &[4], &[5]));
        let again = pair(&[1, 2], &[8], &[3]);
        let batch = MicroBatch::pack(&[&a, &b, &again], Layout::SharedPairs, Device::Cpu);
        assert_eq!(list(&batch.tokens), [1, 2, 4, 6, 7, 8, 3, 9, 4, 5]);
        assert_eq!(list(&batch.positions), [0, 1, 2, 2, 3, 2, 2, 0, 1, 1]);
        assert_eq!(batch.segments[0], Segment { start: 0, prompt: 2, branches: vec![1, 2, 1, 1] });
        assert_eq!(list(&batch.rows), [1, 1, 3, 7, 7, 1, 1]);
        assert_eq!(list(&batch.targets), [4, 6, 7, 4, 5, 8, 3]);
        assert_eq!(list(&batch.sequences), [0, 1, 1, 2, 3, 4, 5]);
        assert_eq!(batch.rows_per_pair, [3, 2, 2]);
        assert_eq!(TokenCounts::of(&[&a, &b, &again], Layout::SharedPairs).computed, 10);
    }

    #[test]
    fn micro_batches_keep_order_and_budget() {
        let pairs: Vec<Tokenized> = (1..6).map(|n| pair(&vec![1; n], &[2], &[3])).collect();
        let batches = micro_batches(&pairs, Layout::SharedPairs, 8);
        let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
        assert_eq!(sizes, [2, 1, 1, 1]);
        let tiny = micro_batches(&pairs, Layout::SharedPairs, 1);
        assert_eq!(tiny.len(), 5);
        assert!(micro_batches(&[], Layout::SharedPairs, 8).is_empty());
    }

    #[test]
    fn micro_batches_are_of_about_the_same_size() {
        // Ten pairs of 4 tokens in runs of at most 36: not nine and one.
        let pairs: Vec<Tokenized> = (0..10).map(|_| pair(&[1, 2], &[3], &[4])).collect();
        let sizes = |budget| -> Vec<usize> {
            micro_batches(&pairs, Layout::SharedPairs, budget).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(36), [5, 5]);
        assert_eq!(sizes(40), [10]);
        assert_eq!(sizes(16), [4, 4, 2]);
    }
}
