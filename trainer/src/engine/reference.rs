//! The reference model's side of a micro-batch: log-probabilities that are already known, or a pass of the reference model.

use dyad_data::tokenized::Tokenized;
use dyad_proto::wire::ReferenceLogps;
use tch::Tensor;

use super::Engine;
use crate::batch::MicroBatch;
use crate::error::EngineError;
use crate::objective::head::{Reference, Scorer, sequence_logps};
use dyad_torch::transfer::{read, upload};

/// How many times larger a forward-only micro-batch may be.
const REFERENCE_BATCH: usize = 4;

/// What a micro-batch is compared with.
#[derive(Debug)]
pub(super) enum ReferenceSide {
    Absent,
    /// Rows of the reference model, ready for its head.
    Rows(Tensor),
    /// Log-probabilities that are already known. `[sequences]`
    Known(Tensor),
}

impl Engine {
    /// The reference model's side of a micro-batch: the known scores if every pair has them, else rows of the reference model.
    pub(super) fn reference_side(
        &self,
        batch: &MicroBatch,
        known: &[Option<ReferenceLogps>],
        visits_reference: bool,
    ) -> Result<ReferenceSide, EngineError> {
        let all: Option<Vec<ReferenceLogps>> = known.iter().copied().collect();
        match (all, &self.reference) {
            (Some(known), model) if self.settings.objective.needs_reference() => {
                if let (Some(model), true) = (model, visits_reference) {
                    // Another rank needs the model: help gather its weights.
                    let _ = model.score_rows(&MicroBatch::pack(&[], self.settings.layout, self.device()))?;
                }
                let interleaved: Vec<f64> =
                    known.iter().flat_map(|logps| [logps.chosen, logps.rejected]).collect();
                Ok(ReferenceSide::Known(upload(&interleaved, self.device())))
            }
            (_, Some(model)) => Ok(ReferenceSide::Rows(model.score_rows(batch)?)),
            (_, None) if self.settings.compares_with_known => Err(EngineError::NoReference),
            (_, None) => Ok(ReferenceSide::Absent),
        }
    }

    pub(super) fn scored_by<'a>(&'a self, side: &'a ReferenceSide) -> Reference<'a> {
        match (side, &self.reference) {
            (ReferenceSide::Known(logps), _) => Reference::Known(logps),
            (ReferenceSide::Rows(rows), Some(model)) => {
                Reference::Model(Scorer { rows, weight: model.head() })
            }
            (ReferenceSide::Rows(_), None) | (ReferenceSide::Absent, _) => Reference::Absent,
        }
    }

    /// Scores pairs with the reference model, before it is freed.
    pub fn score_references(&self, pairs: &[Tokenized]) -> Result<Vec<ReferenceLogps>, EngineError> {
        let model = self.reference.as_ref().ok_or(EngineError::NoReference)?;
        let mut references = Vec::new();
        // Nothing is kept for a backward pass, so larger micro-batches fit.
        let budget = REFERENCE_BATCH * self.settings.micro_batch_tokens;
        for micro_batch in self.plan(pairs, &vec![None; pairs.len()], budget)?.micro_batches {
            let batch = MicroBatch::pack(&micro_batch.pairs, self.settings.layout, self.device());
            let rows = model.score_rows(&batch)?;
            let _head = model.gather_head()?;
            let scorer = Scorer { rows: &rows, weight: model.head() };
            let logps = sequence_logps(&batch, scorer, self.settings.evaluation.token_reading());
            references.extend(by_pair(&read(&logps)));
        }
        Ok(references)
    }

    /// Frees the reference model; from here on every pair must come with its scores.
    pub fn release_reference(&mut self) {
        self.reference = None;
        self.settings.compares_with_known = self.settings.objective.needs_reference();
    }
}

/// Groups interleaved log-probabilities (chosen, rejected) by pair.
pub(super) fn by_pair(values: &[f64]) -> Vec<ReferenceLogps> {
    let pairs = values.chunks_exact(2);
    pairs.map(|pair| ReferenceLogps { chosen: pair[0], rejected: pair[1] }).collect()
}
