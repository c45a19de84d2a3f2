//! The pairs of each step, and their assignment to ranks. Pure.
//!
//! - CRD-S1: the global batch of a step depends on (dataset hash, kept ids, seed, step) only, never on the world size.
//! - CRD-S2: an epoch holds every kept id exactly once; its last batch may be smaller. With weights an epoch has as many pairs, and every
//!   place has its share of them: all of its pairs come once before one of them comes again, over all epochs.
//! - CRD-S3: the ranks' shares of a batch are disjoint, complete, and in batch order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use dyad_proto::Fault;
use dyad_sources::FileShare;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// Determines the order of the pairs in every epoch.
#[derive(Clone, Debug)]
pub struct DataOrder {
    /// SHA-256 of the training file, lower-case hex.
    pub dataset_sha256: String,
    /// The config's `random_seed`.
    pub random_seed: u64,
    /// If false, every epoch is in file order.
    pub shuffle: bool,
    /// Ids that are trained on, ascending.
    pub kept: Vec<u64>,
    /// The places of a mixture; empty without weights.
    pub mixture: Vec<MixedPlace>,
}

/// A place of pairs in a mixture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MixedPlace {
    /// Its ids that are trained on, ascending.
    pub kept: Vec<u64>,
    /// Number of its pairs in an epoch.
    pub quota: u64,
}

/// The mixture of places with weights, for an epoch of all `kept` pairs; empty without weights. Fails if a place has a weight, but no pair
/// in an epoch.
pub fn mixture(shares: &[FileShare], kept: &[u64]) -> Result<Vec<MixedPlace>, Fault> {
    let weights: Vec<f64> = shares.iter().filter_map(|share| share.weight).collect();
    if weights.len() < shares.len() || shares.is_empty() {
        return Ok(Vec::new());
    }
    let quotas = quotas(&weights, kept.len() as u64);
    let place = |(share, quota): (&FileShare, u64)| {
        let inside = |id: &&u64| share.ids.contains(id);
        let kept: Vec<u64> = kept.iter().filter(inside).copied().collect();
        match (kept.is_empty(), quota) {
            (true, _) => Err(Fault::input(format!(
                "training_file {} has a weight, but no pair of it is left",
                share.place
            ))
            .hint("leave it out; the summary of left-out pairs says why they cannot be used")),
            (_, 0) => Err(Fault::input(format!(
                "the weight of training_file {} gives it no pair in an epoch",
                share.place
            ))
            .hint("raise its weight, or leave it out")),
            _ => Ok(MixedPlace { kept, quota }),
        }
    };
    shares.iter().zip(quotas).map(place).collect()
}

/// Splits a total by weights; what rounding leaves goes to the largest remainders, ties to the first.
fn quotas(weights: &[f64], total: u64) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| total as f64 * (weight / sum)).collect();
    let mut quotas: Vec<u64> = exact.iter().map(|exact| exact.floor() as u64).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let left = total.saturating_sub(quotas.iter().sum()) as usize;
    for &at in by_remainder.iter().cycle().take(left) {
        quotas[at] += 1;
    }
    quotas
}

impl DataOrder {
    /// All kept ids in the order in which an epoch (0-based) visits them.
    #[must_use]
    pub fn epoch(&self, epoch: u64) -> Vec<u64> {
        let mut order = match self.mixture.is_empty() {
            true => self.kept.clone(),
            false => (0..self.mixture.len()).flat_map(|place| self.drawn(place, epoch)).collect(),
        };
        if self.shuffle {
            shuffle(&mut order, &mut self.generator(epoch));
        }
        order
    }

    /// The pairs of a place in an epoch. They are the next ones of an endless sequence, in which all pairs of the place come in one order,
    /// then in another.
    fn drawn(&self, place: usize, epoch: u64) -> Vec<u64> {
        let MixedPlace { kept, quota } = &self.mixture[place];
        let count = kept.len() as u64;
        let (mut pass, mut order) = (None, Vec::new());
        (epoch * quota..(epoch + 1) * quota)
            .map(|at| {
                if pass != Some(at / count) {
                    pass = Some(at / count);
                    order.clone_from(kept);
                    if self.shuffle {
                        shuffle(&mut order, &mut self.generator_of(place as u64, at / count));
                    }
                }
                order[(at % count) as usize]
            })
            .collect()
    }

    /// The generator of one pass over a place.
    fn generator_of(&self, place: u64, pass: u64) -> ChaCha8Rng {
        let mut hash = Sha256::new();
        hash.update(self.dataset_sha256.as_bytes());
        hash.update(self.random_seed.to_le_bytes());
        hash.update(b"mixture");
        hash.update(place.to_le_bytes());
        hash.update(pass.to_le_bytes());
        ChaCha8Rng::from_seed(hash.finalize().into())
    }

    fn generator(&self, epoch: u64) -> ChaCha8Rng {
        let mut hash = Sha256::new();
        hash.update(self.dataset_sha256.as_bytes());
        hash.update(self.random_seed.to_le_bytes());
        hash.update(epoch.to_le_bytes());
        ChaCha8Rng::from_seed(hash.finalize().into())
    }
}

/// Fisher-Yates. Implemented here, because a resumed run must see the same order with any version of `rand`.
fn shuffle(ids: &mut [u64], generator: &mut ChaCha8Rng) {
    for last in (1..ids.len()).rev() {
        ids.swap(last, below(last as u64 + 1, generator) as usize);
    }
}

/// Uniform in `0..bound`: rejects draws from the incomplete last interval of length `bound`.
fn below(bound: u64, generator: &mut ChaCha8Rng) -> u64 {
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let draw = generator.next_u64();
        if draw < limit {
            return draw % bound;
        }
    }
}

/// The epoch (0-based) of a step (1-based), and the places of its batch in that epoch's order.
#[must_use]
pub fn batch_place(step: u64, kept: usize, batch_size: u32) -> (u64, Range<usize>) {
    let batch_size = batch_size as usize;
    let steps_per_epoch = kept.div_ceil(batch_size) as u64;
    let start = ((step - 1) % steps_per_epoch) as usize * batch_size;
    ((step - 1) / steps_per_epoch, start..(start + batch_size).min(kept))
}

/// A pair and the cost of computing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weighted {
    /// Record id.
    pub id: u64,
    /// In any unit; only ratios matter.
    pub cost: u64,
}

/// Splits a batch over ranks: the costliest remaining pair goes to the least loaded rank; ties go to the lower id and rank. Returns the
/// ids by rank, each in batch order.
#[must_use]
pub fn split_over_ranks(batch: &[Weighted], world_size: usize) -> Vec<Vec<u64>> {
    let mut longest_first: Vec<usize> = (0..batch.len()).collect();
    longest_first.sort_by_key(|&at| (Reverse(batch[at].cost), batch[at].id));
    let mut least_loaded: BinaryHeap<Reverse<(u64, usize)>> =
        (0..world_size).map(|rank| Reverse((0, rank))).collect();
    let mut rank_of = vec![0_usize; batch.len()];
    for at in longest_first {
        let Some(mut least) = least_loaded.peek_mut() else { break };
        rank_of[at] = least.0.1;
        least.0.0 += batch[at].cost;
    }
    let mut shares = vec![Vec::new(); world_size];
    for (pair, rank) in batch.iter().zip(rank_of) {
        shares[rank].push(pair.id);
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(kept: Vec<u64>, random_seed: u64) -> DataOrder {
        DataOrder { dataset_sha256: "ab".repeat(32), random_seed, shuffle: true, kept, mixture: Vec::new() }
    }

    /// Ids of one step's batch, and the same split over ranks.
    fn sharded(
        order: &DataOrder,
        step: u64,
        batch_size: u32,
        world_size: usize,
    ) -> (Vec<u64>, Vec<Vec<u64>>) {
        let (epoch, places) = batch_place(step, order.kept.len(), batch_size);
        let batch = order.epoch(epoch)[places].to_vec();
        let weighted: Vec<Weighted> =
            batch.iter().map(|&id| Weighted { id, cost: 1 + id * 7 % 50 }).collect();
        (batch, split_over_ranks(&weighted, world_size))
    }

    proptest! {
        /// A direct implementation of the rule, without a heap, gives the same shares.
        #[test]
        fn split_takes_the_least_loaded_rank_each_time(
            costs in proptest::collection::vec(0_u64..20, 0..60),
            world_size in 1_usize..9,
        ) {
            let batch: Vec<Weighted> = (0..).zip(&costs).map(|(id, &cost)| Weighted { id, cost }).collect();
            let mut loads = vec![0; world_size];
            let mut expected = vec![Vec::new(); world_size];
            let mut costliest_first = batch.clone();
            costliest_first.sort_by_key(|pair| (Reverse(pair.cost), pair.id));
            for pair in costliest_first {
                let rank = (0..world_size).min_by_key(|&rank| loads[rank]).unwrap();
                loads[rank] += pair.cost;
                expected[rank].push(pair.id);
            }
            expected.iter_mut().for_each(|share| share.sort_unstable());
            prop_assert_eq!(split_over_ranks(&batch, world_size), expected);
        }

        /// CRD-S2: over one epoch each kept id is seen exactly once, for world sizes 1 to 8.
        #[test]
        fn epoch_visits_every_kept_id_exactly_once(
            kept in proptest::collection::btree_set(0_u64..500, 1..80),
            batch_size in 1_u32..20, seed: u64, epoch in 0_u64..3, world_size in 1_usize..=8,
        ) {
            let kept: Vec<u64> = kept.into_iter().collect();
            let order = order(kept.clone(), seed);
            let steps = kept.len().div_ceil(batch_size as usize) as u64;
            let mut seen: Vec<u64> = (epoch * steps + 1..=(epoch + 1) * steps)
                .flat_map(|step| sharded(&order, step, batch_size, world_size).1.into_iter().flatten())
                .collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, kept);
        }

        /// CRD-S2 with weights: an epoch has the length of all places together, every place has its share of it, and over the epochs the
        /// pairs of a place are used equally often, but for one time.
        #[test]
        fn every_place_of_a_mixture_has_its_share_and_uses_its_pairs_evenly(
            sizes in proptest::collection::vec((1_u64..40, 0.1_f64..10.0), 2..5), seed: u64, shuffle: bool, epochs in 1_u64..5,
        ) {
            let mut shares = Vec::new();
            for (size, weight) in &sizes {
                let start = shares.last().map_or(0, |share: &FileShare| share.ids.end);
                shares.push(FileShare { place: "a".into(), ids: start..start + size, weight: Some(*weight) });
            }
            let total: u64 = sizes.iter().map(|(size, _)| size).sum();
            let kept: Vec<u64> = (0..total).collect();
            let Ok(mixture) = mixture(&shares, &kept) else { return Ok(()) };
            let order = DataOrder { shuffle, mixture, ..order(kept, seed) };
            let sum: f64 = sizes.iter().map(|(_, weight)| weight).sum();
            let mut seen = vec![0_u64; total as usize];
            for epoch in 0..epochs {
                let ids = order.epoch(epoch);
                prop_assert_eq!(ids.len() as u64, total);
                for (share, (_, weight)) in shares.iter().zip(&sizes) {
                    let count = ids.iter().filter(|id| share.ids.contains(id)).count() as f64;
                    prop_assert!((count - total as f64 * weight / sum).abs() < 1.0);
                }
                ids.iter().for_each(|&id| seen[id as usize] += 1);
            }
            for share in &shares {
                let counts = &seen[share.ids.start as usize..share.ids.end as usize];
                prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            }
        }

        /// CRD-S1 and CRD-S3: any number of ranks shares out the same batch, each rank in batch order.
        #[test]
        fn shares_are_the_batch_for_any_world_size(
            pairs in 1_u64..60, batch_size in 1_u32..20, seed: u64, step in 1_u64..30,
        ) {
            let order = order((0..pairs).collect(), seed);
            let expected = sharded(&order, step, batch_size, 1).1.remove(0);
            for world_size in 1..=8 {
                let (batch, shares) = sharded(&order, step, batch_size, world_size);
                prop_assert_eq!(&batch, &expected);
                let place = |id: &u64| batch.iter().position(|other| other == id);
                prop_assert!(shares.iter().all(|share| share.is_sorted_by_key(place)));
                let mut union: Vec<u64> = shares.concat();
                union.sort_by_key(place);
                prop_assert_eq!(&union, &batch);
            }
        }

        /// With the greedy split, loads differ by at most the longest pair.
        #[test]
        fn loads_differ_by_at_most_one_pair(
            tokens in proptest::collection::vec(1_u64..400, 1..60), world_size in 1_usize..=8,
        ) {
            let batch: Vec<Weighted> = (0..).zip(&tokens).map(|(id, &cost)| Weighted { id, cost }).collect();
            let loads: Vec<u64> = split_over_ranks(&batch, world_size).iter()
                .map(|share| share.iter().map(|&id| tokens[id as usize]).sum()).collect();
            let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
            prop_assert!(spread <= *tokens.iter().max().unwrap());
        }
    }

    #[test]
    fn a_place_without_a_pair_in_an_epoch_is_refused_and_places_without_weights_are_no_mixture() {
        let share = |ids, weight| FileShare { place: "a.jsonl".into(), ids, weight };
        assert_eq!(mixture(&[share(0..4, None), share(4..6, None)], &[0, 1, 4]), Ok(vec![]));
        let mixed = mixture(&[share(0..4, Some(3.0)), share(4..6, Some(1.0))], &[0, 1, 2, 4]).unwrap();
        assert_eq!(
            mixed,
            [MixedPlace { kept: vec![0, 1, 2], quota: 3 }, MixedPlace { kept: vec![4], quota: 1 }]
        );
        let gone = mixture(&[share(0..4, Some(3.0)), share(4..6, Some(1.0))], &[0, 1]).unwrap_err();
        assert!(gone.message.contains("no pair of it is left"), "{gone}");
        let none = mixture(&[share(0..4, Some(1e6)), share(4..6, Some(1e-6))], &[0, 4]).unwrap_err();
        assert!(none.message.contains("gives it no pair in an epoch"), "{none}");
        assert_eq!(quotas(&[1.0, 1.0, 1.0], 8), [3, 3, 2]);
    }

    /// Log-normal lengths like those of real data, eight ranks: mean excess of the slowest rank over many batches.
    #[test]
    fn ranks_wait_less_than_three_per_cent_for_the_slowest() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let mut normal = || -> f64 {
            let sum: f64 = (0..12).map(|_| below(1 << 32, &mut generator) as f64 / 4_294_967_296.0).sum();
            sum - 6.0
        };
        for pairs in [64, 256] {
            let mut gaps = 0.0;
            for _ in 0..200 {
                let mut cost = |_| (1e6 * (0.6 * normal()).exp()) as u64;
                let batch: Vec<Weighted> = (0..pairs).map(|id| Weighted { id, cost: cost(id) }).collect();
                let load = |share: &Vec<u64>| share.iter().map(|&id| batch[id as usize].cost).sum::<u64>();
                let loads: Vec<u64> = split_over_ranks(&batch, 8).iter().map(load).collect();
                let mean = loads.iter().sum::<u64>() as f64 / 8.0;
                gaps += *loads.iter().max().unwrap() as f64 / mean - 1.0;
            }
            let gap = gaps / 200.0;
            assert!(gap < 0.03, "{pairs} pairs: the slowest rank is {:.1} % above the mean", 100.0 * gap);
        }
    }

    #[test]
    fn order_depends_on_hash_seed_and_epoch() {
        let base = order((0..50).collect(), 1);
        let other_hash = DataOrder { dataset_sha256: "cd".repeat(32), ..base.clone() };
        let other_seed = DataOrder { random_seed: 2, ..base.clone() };
        let orders = [base.epoch(0), base.epoch(1), other_hash.epoch(0), other_seed.epoch(0)];
        for (at, one) in orders.iter().enumerate() {
            assert!(orders[at + 1..].iter().all(|other| other != one));
        }
        assert_eq!(base.epoch(0), orders[0]);
        assert_eq!(DataOrder { shuffle: false, ..base.clone() }.epoch(3), base.kept);
    }

    /// Pins the order: if it changed, older checkpoints could not be resumed correctly.
    #[test]
    fn order_never_changes() {
        assert_eq!(order((0..8).collect(), 42).epoch(0), [7, 0, 3, 6, 1, 2, 5, 4]);
    }

    #[test]
    fn longest_pair_first_and_ties_by_id() {
        let batch: Vec<Weighted> =
            [(4, 10), (1, 10), (7, 30), (2, 10)].map(|(id, cost)| Weighted { id, cost }).to_vec();
        assert_eq!(split_over_ranks(&batch, 2), [vec![7], vec![4, 1, 2]]);
        let equal: Vec<Weighted> = [5, 3, 9].map(|id| Weighted { id, cost: 6 }).to_vec();
        assert_eq!(split_over_ranks(&equal, 4), [vec![3], vec![5], vec![9], vec![]]);
    }

    #[test]
    fn last_batch_of_an_epoch_is_smaller() {
        assert_eq!(batch_place(1, 10, 4), (0, 0..4));
        assert_eq!(batch_place(3, 10, 4), (0, 8..10));
        assert_eq!(batch_place(4, 10, 4), (1, 0..4));
    }
}
