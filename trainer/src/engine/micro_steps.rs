//! Splits a rank's pairs into micro-batches. If gradients are sharded, ranks wait for each other in each micro-batch, so every rank gets
//! the same number.

use dyad_data::tokenized::Tokenized;
use dyad_proto::wire::ReferenceLogps;
use tch::{Kind, Tensor};

use super::Engine;
use crate::batch;
use crate::zero::unit_weights::GatheredWeights;
use dyad_torch::comm::CommError;
use dyad_torch::transfer::{read, upload};

/// The micro-batches of a step or evaluation.
pub(super) struct MicroStepPlan<'a> {
    /// At least one. A rank with fewer pairs than others has empty ones at the end.
    pub(super) micro_batches: Vec<MicroBatchPairs<'a>>,
    /// True if some rank needs the reference model.
    pub(super) visits_reference: bool,
}

/// One micro-batch.
pub(super) struct MicroBatchPairs<'a> {
    pub(super) pairs: Vec<&'a Tokenized>,
    /// Reference log-probabilities of each pair, where they are known.
    pub(super) known: &'a [Option<ReferenceLogps>],
}

impl Engine {
    pub(super) fn plan<'a>(
        &self,
        pairs: &'a [Tokenized],
        references: &'a [Option<ReferenceLogps>],
        budget: usize,
    ) -> Result<MicroStepPlan<'a>, CommError> {
        let mut rest = references;
        let mut micro_batches: Vec<MicroBatchPairs<'_>> = Vec::new();
        for pairs in batch::micro_batches(pairs, self.settings.first_layout, budget) {
            let (known, later) = rest.split_at(pairs.len());
            rest = later;
            micro_batches.push(MicroBatchPairs { pairs, known });
        }
        let known = |micro_batch: &MicroBatchPairs<'_>| micro_batch.known.iter().all(Option::is_some);
        let asks = self.settings.objective.needs_reference() && !micro_batches.iter().all(known);
        let [count, asks] = self.agree([micro_batches.len() as i64, i64::from(asks)])?;
        micro_batches
            .resize_with(count.max(1) as usize, || MicroBatchPairs { pairs: Vec::new(), known: &[] });
        Ok(MicroStepPlan { micro_batches, visits_reference: asks > 0 && self.reference.is_some() })
    }

    /// Returns the maximum of each value over all ranks if gradients are sharded, else this rank's own values.
    fn agree(&self, values: [i64; 2]) -> Result<[i64; 2], CommError> {
        let sharding = self.parameters.sharding();
        if !sharding.of_gradients() {
            return Ok(values);
        }
        let own = upload(&values, self.device());
        let ranks = self.communicator.world_size() as i64;
        let all = Tensor::zeros([2 * ranks], (Kind::Int64, self.device()));
        self.communicator.all_gather(&all, &own)?.wait()?;
        // The host has to know how many micro-batches there are before the passes begin.
        let all = read::<i64>(&all);
        let largest = |place: usize| all.iter().skip(place).step_by(2).copied().max().unwrap_or(0);
        Ok([largest(0), largest(1)])
    }

    /// Gathers the heads of the policy and, if asked, of the reference. They stay until the result is dropped.
    pub(super) fn gather_heads(
        &self,
        with_reference: bool,
    ) -> Result<Vec<(GatheredWeights, GatheredWeights)>, CommError> {
        let mut gathered = vec![self.policy.gather_head()?];
        if let (true, Some(model)) = (with_reference, &self.reference) {
            gathered.push(model.gather_head()?);
        }
        Ok(gathered)
    }
}
