//! Log-probabilities of pairs under the reference model: which are known, which are still to be scored. Pure.

use std::collections::HashMap;

use dyad_proto::counted;
use dyad_proto::run_config::ReferenceLogps as Mode;
use dyad_proto::wire::{Pair, PairReference, ReferenceLogps, Split};

use crate::run::report::Report;
use crate::run::schedule::Work;

/// Pairs of one chunk of scoring before the first step.
const CHUNK_PAIRS: usize = 256;

/// Names the tokens of a pair, whatever file, template or date they come from.
pub type TokensHash = (u64, u64);

/// A record, and what the model sees of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairKey {
    /// Which file.
    pub split: Split,
    /// Which record.
    pub id: u64,
    /// Its tokens.
    pub tokens: TokensHash,
}

/// What the reference model says of one pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Known {
    /// Which pair.
    pub key: PairKey,
    /// Log-probabilities of its outputs.
    pub logps: ReferenceLogps,
}

/// All that is known of the pairs of a run.
#[derive(Clone, Debug)]
pub struct References {
    mode: Mode,
    known: HashMap<(Split, u64), ReferenceLogps>,
    chunks: Vec<(Split, Vec<u64>)>,
    /// The chunk that is sent next.
    next: usize,
    /// Pairs of the chunks that have been scored.
    scored: u64,
}

impl References {
    /// With what earlier runs have left.
    #[must_use]
    pub fn new(mode: Mode, known: impl IntoIterator<Item = Known>) -> Self {
        let known = known.into_iter().map(|known| ((known.key.split, known.key.id), known.logps)).collect();
        Self { mode, known, chunks: Vec::new(), next: 0, scored: 0 }
    }

    /// Decides what is scored before the first step, of the pairs that the run uses.
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

    /// The next chunk to score, once.
    pub fn next_chunk(&mut self) -> Option<u64> {
        (self.next < self.chunks.len()).then(|| {
            self.next += 1;
            self.next as u64 - 1
        })
    }

    /// Pairs of a chunk.
    #[must_use]
    pub fn chunk(&self, chunk: u64) -> (Split, &[u64]) {
        let (split, ids) = &self.chunks[chunk as usize];
        (*split, ids)
    }

    /// Pairs scored before the first step, and all of them.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.scored, self.chunks.iter().map(|(_, ids)| ids.len() as u64).sum())
    }

    /// Puts what is known beside the pairs. Evaluations of a run that keeps its reference model measure anew, so that they
    /// can tell how far the policy has moved from it.
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

    /// Takes up what the ranks have scored; returns what is new, the error says how they break the protocol.
    pub fn learn(
        &mut self,
        work: Work,
        reports: &[Report],
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
            let key = key(split, id).ok_or_else(|| format!("scored pair {id}, which there is not"))?;
            // Skip NaN: the step that produced it will fail.
            let finite = logps.chosen.is_finite() && logps.rejected.is_finite();
            if finite && self.known.insert((split, id), logps).is_none() {
                new.push(Known { key, logps });
            }
        }
        Ok(new)
    }
}

fn references(report: &Report) -> &[PairReference] {
    match report {
        Report::Step(report) => &report.references,
        Report::Reference(report) => &report.references,
        Report::Evaluation(_) => &[],
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
    fn a_pair_is_scored_once_and_known_from_then_on() {
        let mut references = References::new(Mode::Cache, []);
        let report = Report::Step(StepReport { references: scored(&[3, 5]), ..StepReport::default() });
        let new = references.learn(Work::Step(1), std::slice::from_ref(&report), key).unwrap();
        assert_eq!(new.iter().map(|known| known.key.id).collect::<Vec<_>>(), [3, 5]);
        assert!(references.learn(Work::Step(2), &[report], key).unwrap().is_empty());
        let attached = references.attach(Split::Train, pairs(&[4, 5]));
        assert_eq!((attached[0].reference, attached[1].reference), (None, Some(logps(-5.0))));
        assert_eq!(references.attach(Split::Validation, pairs(&[5]))[0].reference, None);
    }

    #[test]
    fn precomputing_scores_what_no_earlier_run_has() {
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
            Report::Reference(ReferenceReport { references: scored(ids), ..ReferenceReport::default() })
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
    fn what_is_no_number_is_not_kept() {
        let mut references = References::new(Mode::Cache, []);
        let bad = PairReference { id: 0, logps: Some(logps(f64::NAN)) };
        let report = Report::Step(StepReport { references: vec![bad], ..StepReport::default() });
        assert!(references.learn(Work::Step(1), &[report], key).unwrap().is_empty());
    }
}
