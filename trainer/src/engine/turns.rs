//! A rank's pairs as micro-batches, as many on every rank where ranks wait for each other in each of them.

use dyad_data::tokenize::Tokenized;
use dyad_proto::run_config::TrainingMethod;
use dyad_proto::wire::ReferenceLogps;
use tch::{Kind, Tensor};

use super::Engine;
use crate::batch::micro_batches;
use crate::comm::CommError;
use crate::flat::Lent;
use crate::transfer::{read, upload};

/// What all ranks do together.
pub(super) struct Plan<'a> {
    /// At least one; those that this rank has no pairs for are empty.
    pub(super) turns: Vec<Turn<'a>>,
    /// Some rank asks the reference model.
    pub(super) visits_reference: bool,
}

/// One micro-batch.
pub(super) struct Turn<'a> {
    pub(super) pairs: Vec<&'a Tokenized>,
    /// What the reference model says of each, where that is known.
    pub(super) known: &'a [Option<ReferenceLogps>],
}

impl Engine {
    pub(super) fn plan<'a>(
        &self,
        pairs: &'a [Tokenized],
        references: &'a [Option<ReferenceLogps>],
        budget: usize,
    ) -> Result<Plan<'a>, CommError> {
        let mut rest = references;
        let mut turns: Vec<Turn<'_>> = Vec::new();
        for pairs in micro_batches(pairs, self.settings.layout, budget) {
            let (known, later) = rest.split_at(pairs.len());
            rest = later;
            turns.push(Turn { pairs, known });
        }
        let known = |turn: &Turn<'_>| turn.known.iter().all(Option::is_some);
        let asks = self.settings.method == TrainingMethod::Dpo && !turns.iter().all(known);
        let [count, asks] = self.agree([turns.len() as i64, i64::from(asks)])?;
        turns.resize_with(count.max(1) as usize, || Turn { pairs: Vec::new(), known: &[] });
        Ok(Plan { turns, visits_reference: asks > 0 && self.reference.is_some() })
    }

    /// The largest of every rank's values, where ranks have to do the same.
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

    /// Heads of both models, there until dropped.
    pub(super) fn lend_heads(&self, with_reference: bool) -> Result<Vec<(Lent, Lent)>, CommError> {
        let mut lent = vec![self.policy.lend_head()?];
        if let (true, Some(model)) = (with_reference, &self.reference) {
            lent.push(model.lend_head()?);
        }
        Ok(lent)
    }
}
