//! What the micro-batches of a step are compared with, and what they add up to.

use dyad_data::tokenize::Tokenized;
use dyad_proto::run_config::TrainingMethod;
use dyad_proto::wire::{PreferenceSums, ReferenceLogps};
use tch::{Device, Tensor};

use super::{Engine, EngineError};
use crate::batch::{MicroBatch, TokenCounts};
use crate::head::{Reference, Scorer, Scores};

/// What a micro-batch is compared with.
#[derive(Debug)]
pub(super) enum ReferenceSide {
    Absent,
    /// Rows of the reference model, ready for its head.
    Rows(Tensor),
    /// Log-probabilities from before. `[sequences]`
    Known(Tensor),
}

impl Engine {
    /// The reference's part in a micro-batch: what is known of every pair, or else its rows.
    pub(super) fn reference_side(
        &self,
        batch: &MicroBatch,
        known: &[Option<ReferenceLogps>],
        visits_reference: bool,
    ) -> Result<ReferenceSide, EngineError> {
        let all: Option<Vec<ReferenceLogps>> = known.iter().copied().collect();
        match (all, &self.reference) {
            (Some(known), model) if self.settings.method == TrainingMethod::Dpo => {
                if let (Some(model), true) = (model, visits_reference) {
                    // Another rank asks: bring it this rank's part of the weights.
                    let _ = model.score_rows(&MicroBatch::pack(&[], self.settings.layout, self.device()))?;
                }
                let interleaved: Vec<f64> =
                    known.iter().flat_map(|logps| [logps.chosen, logps.rejected]).collect();
                Ok(ReferenceSide::Known(Tensor::from_slice(&interleaved).to_device(self.device())))
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
}

/// What the micro-batches of a step add up to.
#[derive(Debug)]
pub(super) struct Tally {
    /// Sums of [`crate::loss`].
    pub(super) statistics: Tensor,
    /// Completion tokens that the reference model was run on.
    pub(super) kl_tokens: u64,
    pub(super) tokens: TokenCounts,
    /// What the reference model said of each pair, where it was asked and the run keeps it.
    pub(super) references: Vec<Option<ReferenceLogps>>,
}

impl Tally {
    pub(super) fn add(&mut self, scores: &Scores, reference: &ReferenceSide, pairs: &[&Tokenized]) {
        // On the device alone: a step waits for it once, at its end.
        self.statistics += &scores.statistics;
        if matches!(reference, ReferenceSide::Rows(_)) {
            self.kl_tokens +=
                pairs.iter().map(|pair| (pair.chosen.len() + pair.rejected.len()) as u64).sum::<u64>();
        }
    }

    /// Notes what the reference model said of each pair of a micro-batch. Waits for the device.
    pub(super) fn keep_references(&mut self, scores: &Scores, pairs: usize) {
        match &scores.reference_logps {
            Some(logps) => self.references.extend(by_pair(logps).into_iter().map(Some)),
            None => self.references.extend(std::iter::repeat_n(None, pairs)),
        }
    }
}

/// Interleaved log-probabilities, chosen and rejected, by pair. Waits for the device.
pub(super) fn by_pair(logps: &Tensor) -> Vec<ReferenceLogps> {
    let values = Vec::<f64>::try_from(logps.to_device(Device::Cpu)).unwrap_or_default();
    let pairs = values.chunks_exact(2);
    pairs.map(|pair| ReferenceLogps { chosen: pair[0], rejected: pair[1] }).collect()
}

/// Reads the device's statistics once and adds what the host knows.
pub(super) fn sums(tally: &Tally, pairs: &[Tokenized], method: TrainingMethod) -> PreferenceSums {
    let statistics = tally.statistics.to_device(Device::Cpu);
    let values: Vec<f64> = Vec::<f64>::try_from(statistics).unwrap_or_default();
    let value = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let count = |lengths: &dyn Fn(&Tokenized) -> usize| pairs.iter().map(lengths).sum::<usize>() as u64;
    let (completion_tokens, tokens) = match method {
        TrainingMethod::Dpo => (
            count(&|pair| pair.chosen.len() + pair.rejected.len()),
            count(&|pair| 2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len()),
        ),
        TrainingMethod::Sft => {
            (count(&|pair| pair.chosen.len()), count(&|pair| pair.prompt.len() + pair.chosen.len()))
        }
    };
    PreferenceSums {
        pairs: pairs.len() as u64,
        loss: value(0),
        rewards_chosen: value(1),
        rewards_rejected: value(2),
        rewards_correct: value(3) as u64,
        logps_chosen: value(4),
        logps_rejected: value(5),
        logps_correct: value(6) as u64,
        kl: value(7),
        completion_tokens,
        tokens,
        kl_tokens: tally.kl_tokens,
    }
}
