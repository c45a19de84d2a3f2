//! Objectives whose loss of a pair depends on all pairs of the step, such as optimal transport and KTO.
//!
//! A first forward pass without gradients collects the log-probabilities of this rank's pairs. The ranks exchange them, and each applies
//! the objective to all pairs. So the derivative of every pair is known before the passes that compute gradients, and neither ranks nor
//! micro-batches change it. The cost is one more forward pass of the policy. The exchange makes the host wait for the device.

use dyad_data::tokenized::Tokenized;
use tch::{Kind, Tensor};

use super::Engine;
use super::micro_steps::{MicroBatchPairs, MicroStepPlan};
use super::step_statistics::StepStatistics;
use crate::batch::MicroBatch;
use crate::error::EngineError;
use crate::objective::head::{Collected, Scorer, collect_batch};
use crate::objective::logps::OwnedLogps;
use crate::objective::{Scored, StepObjective};
use dyad_torch::comm::CommError;
use dyad_torch::transfer::{read, upload};

/// Columns of the table that ranks exchange: policy, likelihood, reference and length of both outputs, the pair's weight, and whether it is
/// desirable.
const COLUMNS: i64 = 10;

impl Engine {
    /// Applies the objective to the pairs of all ranks. Returns the results of this rank's pairs, in the order of the plan, and adds
    /// their sums and those of their tokens to `totals`. `masks` seeds the dropout of each micro-batch.
    pub(super) fn score_coupled(
        &self,
        plan: &MicroStepPlan<'_>,
        objective: &StepObjective,
        masks: impl Fn(usize) -> Option<u64>,
        totals: &mut StepStatistics,
    ) -> Result<Scored, EngineError> {
        let mut all = Vec::new();
        for (index, micro_batch) in plan.micro_batches.iter().enumerate() {
            let collected =
                self.collect(micro_batch, plan.visits_reference, objective, masks(index), totals)?;
            if self.settings.keeps_references {
                totals.keep_references(collected.scores.reference_logps, micro_batch.pairs.len());
            }
            all.push(collected.logps);
        }
        let own = OwnedLogps::joined(&all, self.device());
        let (everyone, first) = self.exchanged(&own)?;
        let scored = tch::with_grad(|| objective.score(&everyone.read())).narrow(first, own.pairs());
        totals.sums.add(&scored.statistics());
        Ok(scored)
    }

    fn collect(
        &self,
        MicroBatchPairs { pairs, known }: &MicroBatchPairs<'_>,
        visits_reference: bool,
        objective: &StepObjective,
        masks: Option<u64>,
        totals: &mut StepStatistics,
    ) -> Result<Collected, EngineError> {
        let batch = MicroBatch::pack(pairs, self.settings.first_layout, self.device());
        let reference = self.reference_side(&batch, known, visits_reference)?;
        let rows = match masks {
            None => self.policy.score_rows(&batch)?,
            // With dropout the first pass must see what the second one sees.
            Some(_) => {
                let tape = tch::no_grad(|| self.forward(&batch, masks))?;
                self.policy.normed_rows(&tape.last, &batch.rows)
            }
        };
        let _heads = self.gather_heads(visits_reference)?;
        let policy = Scorer { rows: &rows, weight: self.policy.head() };
        let collected = collect_batch(&batch, objective.token_reading(), policy, self.scored_by(&reference));
        totals.add(&collected.scores, &reference, pairs);
        Ok(collected)
    }

    /// The log-probabilities of all ranks in rank order, and the number of pairs before this rank's.
    fn exchanged(&self, own: &OwnedLogps) -> Result<(OwnedLogps, i64), CommError> {
        let counts = self.gathered(&upload(&[own.pairs()], self.device()))?;
        let counts = read::<i64>(&counts);
        let most = counts.iter().max().copied().unwrap_or(0);
        let table = Tensor::zeros([most, COLUMNS], (Kind::Double, self.device()));
        table.narrow(0, 0, own.pairs()).copy_(&as_table(own));
        let all = self.gathered(&table)?.view([-1, most, COLUMNS]);
        let parts =
            counts.iter().enumerate().map(|(rank, &pairs)| all.select(0, rank as i64).narrow(0, 0, pairs));
        let first = counts.iter().take(self.communicator.rank()).sum();
        Ok((of_table(&Tensor::cat(&parts.collect::<Vec<_>>(), 0)), first))
    }

    fn gathered(&self, own: &Tensor) -> Result<Tensor, CommError> {
        let ranks = self.communicator.world_size() as i64;
        let all = Tensor::zeros([ranks * own.numel() as i64], (own.kind(), own.device()));
        self.communicator.all_gather(&all, &own.view([-1]))?.wait()?;
        Ok(all)
    }
}

fn as_table(logps: &OwnedLogps) -> Tensor {
    let by_pair = |values: &Tensor| values.to_kind(Kind::Double).view([-1, 2]);
    let columns = [&logps.policy, &logps.likelihood, &logps.reference, &logps.lengths].map(by_pair);
    let (weights, desirable) = (logps.weights.view([-1, 1]), logps.desirable.view([-1, 1]));
    Tensor::cat(&[&columns[0], &columns[1], &columns[2], &columns[3], &weights, &desirable], 1)
}

fn of_table(table: &Tensor) -> OwnedLogps {
    let columns = |first: i64| table.narrow(1, first, 2).reshape([-1]);
    OwnedLogps {
        policy: columns(0),
        likelihood: columns(2),
        reference: columns(4),
        lengths: columns(6).to_kind(Kind::Int64),
        weights: table.select(1, COLUMNS - 2),
        desirable: table.select(1, COLUMNS - 1),
        alignment: None,
    }
}

/// The results of each micro-batch of a plan.
pub(super) fn by_micro_batch(scored: &Scored, plan: &MicroStepPlan<'_>) -> Vec<Scored> {
    let mut first = 0;
    let of = |pairs: &Vec<&Tokenized>| {
        let count = pairs.len() as i64;
        first += count;
        scored.narrow(first - count, count)
    };
    plan.micro_batches.iter().map(|micro_batch| &micro_batch.pairs).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exchanged_table_keeps_every_value_of_a_pair() {
        let values = |from: f64| Tensor::from_slice(&[from, from - 1.0, from - 2.0, from - 3.0]);
        let own = OwnedLogps {
            policy: values(-1.0),
            likelihood: values(-2.0),
            reference: values(-3.0),
            lengths: Tensor::from_slice(&[4_i64, 5, 6, 7]),
            weights: Tensor::from_slice(&[0.5, 2.0]),
            desirable: Tensor::from_slice(&[1.0, 0.0]),
            alignment: None,
        };
        let back = of_table(&as_table(&own));
        for (a, b) in [
            (&own.policy, &back.policy),
            (&own.likelihood, &back.likelihood),
            (&own.reference, &back.reference),
            (&own.lengths, &back.lengths),
            (&own.weights, &back.weights),
            (&own.desirable, &back.desirable),
        ] {
            assert_eq!(a, b);
        }
    }
}
