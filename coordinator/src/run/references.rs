//! Log-probabilities of pairs under the reference model: which are known, and which have to be scored. Pure.

use std::collections::HashMap;

use dyad_proto::counted;
use dyad_proto::run_config::ReferenceLogps as Mode;
use dyad_proto::wire::{Pair, PairReference, ReferenceLogps, Split};

use crate::run::report::WorkReport;
use crate::run::schedule::Work;

/// Most pairs in a chunk that is scored before the first step.
const CHUNK_PAIRS: usize = 256;

/// Hash of a pair's token ids; independent of file, template and date.
pub type TokensHash = (u64, u64);

/// A record and the hash of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairKey {
    /// Which file.
    pub split: Split,
    /// Which record.
    pub id: u64,
    /// Hash of its tokens.
    pub tokens: TokensHash,
}

/// The reference model's score of one pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Known {
    /// Which pair.
    pub key: PairKey,
    /// Log-probabilities of its chosen and rejected output.
    pub logps: ReferenceLogps,
}

/// The known reference scores of a run's pairs.
#[derive(Clone, Debug)]
pub struct References {
    mode: Mode,
    known: HashMap<(Split, u64), ReferenceLogps>,
    chunks: Vec<(Split, Vec<u64>)>,
    /// The chunk that is sent next.
    next: usize,
    /// Number of pairs in the scored chunks.
    scored: u64,
}

impl References {
    /// Starts with the scores that earlier runs stored.
    #[must_use]
    pub fn new(mode: Mode, known: impl IntoIterator<Item = Known>) -> Self {
        let known = known.into_iter().map(|known| ((known.key.split, known.key.id), known.logps)).collect();
        Self { mode, known, chunks: Vec::new(), next: 0, scored: 0 }
    }

    /// Chooses the pairs to score before the first step, from the ids that the run uses.
    pub fn plan(&mut self, train: &[u64], validation: &[u64]) {
        if self.mode != Mode::Precompute {
            return;
        }
        for (split, ids) in [(Split::Train, train), (Split::Validation, validation)] {
            let unknown: Vec<u64> =
                ids.iter().copied().filter(|&id| !self.known.contains_key(&(split, id))).collect();
            self.chunks.extend(unknown.chunks(CHUNK_PAIRS).map(|chunk| (split, chunk.to_vec())));
        }
    }

    /// Number of the next chunk to score; each is returned once.
    pub fn next_chunk(&mut self) -> Option<u64> {
        (self.next < self.chunks.len()).then(|| {
            self.next += 1;
            self.next as u64 - 1
        })
    }

    /// Ids of a chunk's pairs.
    #[must_use]
    pub fn chunk(&self, chunk: u64) -> (Split, &[u64]) {
        let (split, ids) = &self.chunks[chunk as usize];
        (*split, ids)
    }

    /// Number of pairs scored before the first step so far, and of all pairs to score there.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.scored, self.chunks.iter().map(|(_, ids)| ids.len() as u64).sum())
    }

    /// Adds the known scores to the pairs. With `cache`, evaluations compute them again, because they measure how far the policy has moved
    /// from the reference model.
    #[must_use]
    pub fn attach(&self, split: Split, mut pairs: Vec<Pair>) -> Vec<Pair> {
        if self.mode == Mode::Compute || self.mode == Mode::Cache && split == Split::Validation {
            return pairs;
        }
        for pair in &mut pairs {
            pair.reference = self.known.get(&(split, pair.id)).copied();
        }
        pairs
    }

    /// Takes the scores of the ranks' reports; returns the new ones. The error says how the ranks broke the protocol.
    pub fn learn(
        &mut self,
        work: Work,
        reports: &[WorkReport],
        key: impl Fn(Split, u64) -> Option<PairKey>,
    ) -> Result<Vec<Known>, String> {
        let split = match work {
            Work::Reference(chunk) => self.chunk(chunk).0,
            Work::Step(_) | Work::Evaluation(_) => Split::Train,
        };
        let scored: Vec<&PairReference> = reports.iter().flat_map(references).collect();
        if let Work::Reference(chunk) = work {
            let expected = self.chunk(chunk).1.len();
            if scored.len() != expected {
                return Err(format!("scored {} of {expected} in {work}", counted(scored.len(), "pair")));
            }
            self.scored += expected as u64;
        }
        let mut new = Vec::new();
        for reference in scored {
            let (id, Some(logps)) = (reference.id, reference.logps) else { continue };
            let key = key(split, id).ok_or_else(|| format!("scored pair {id}, which does not exist"))?;
            // Skip NaN: the step that produced it will fail.
            let finite = logps.chosen.is_finite() && logps.rejected.is_finite();
            if finite && self.known.insert((split, id), logps).is_none() {
                new.push(Known { key, logps });
            }
        }
        Ok(new)
    }
}

fn references(report: &WorkReport) -> &[PairReference] {
    match report {
        WorkReport::Step(report) => &report.references,
        WorkReport::Reference(report) => &report.references,
        WorkReport::Evaluation(_) => &[],
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::wire::{ReferenceReport, StepReport};

    use super::*;

    fn logps(chosen: f64) -> ReferenceLogps {
        ReferenceLogps { chosen, rejected: -1.0 }
    }

    fn key(split: Split, id: u64) -> Option<PairKey> {
        Some(PairKey { split, id, tokens: (0, id) })
    }

    fn pairs(ids: &[u64]) -> Vec<Pair> {
        ids.iter().map(|&id| Pair { id, ..Pair::default() }).collect()
    }

    fn scored(ids: &[u64]) -> Vec<PairReference> {
        ids.iter().map(|&id| PairReference { id, logps: Some(logps(-(id as f64))) }).collect()
    }

    #[test]
    fn a_pair_is_new_once_and_known_afterwards() {
        let mut references = References::new(Mode::Cache, []);
        let report = WorkReport::Step(StepReport { references: scored(&[3, 5]), ..StepReport::default() });
        let new = references.learn(Work::Step(1), std::slice::from_ref(&report), key).unwrap();
        assert_eq!(new.iter().map(|known| known.key.id).collect::<Vec<_>>(), [3, 5]);
        assert!(references.learn(Work::Step(2), &[report], key).unwrap().is_empty());
        let attached = references.attach(Split::Train, pairs(&[4, 5]));
        assert_eq!((attached[0].reference, attached[1].reference), (None, Some(logps(-5.0))));
        assert_eq!(references.attach(Split::Validation, pairs(&[5]))[0].reference, None);
    }

    #[test]
    fn precompute_scores_only_unknown_pairs() {
        let known = Known { key: key(Split::Train, 1).unwrap(), logps: logps(-7.0) };
        let mut references = References::new(Mode::Precompute, [known]);
        references.plan(&[0, 1, 2], &[0]);
        assert_eq!(
            (references.next_chunk(), references.next_chunk(), references.next_chunk()),
            (Some(0), Some(1), None)
        );
        assert_eq!(references.chunk(0), (Split::Train, &[0, 2][..]));
        assert_eq!(references.chunk(1), (Split::Validation, &[0][..]));
        let report = |ids: &[u64]| {
            WorkReport::Reference(ReferenceReport { references: scored(ids), ..ReferenceReport::default() })
        };
        assert!(
            references.learn(Work::Reference(0), &[report(&[0])], key).unwrap_err().contains("1 pair of 2")
        );
        references.learn(Work::Reference(0), &[report(&[0]), report(&[2])], key).unwrap();
        references.learn(Work::Reference(1), &[report(&[0])], key).unwrap();
        assert_eq!(references.progress(), (3, 3));
        assert_eq!(references.attach(Split::Validation, pairs(&[0]))[0].reference, Some(logps(0.0)));
        assert_eq!(references.attach(Split::Train, pairs(&[1]))[0].reference, Some(logps(-7.0)));
    }

    #[test]
    fn nan_scores_are_not_kept() {
        let mut references = References::new(Mode::Cache, []);
        let bad = PairReference { id: 0, logps: Some(logps(f64::NAN)) };
        let report = WorkReport::Step(StepReport { references: vec![bad], ..StepReport::default() });
        assert!(references.learn(Work::Step(1), &[report], key).unwrap().is_empty());
    }
}
