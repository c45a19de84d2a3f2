//! Masters and moments as checkpoints hold them: whole tensors by parameter, whatever part of them a rank has.

use dyad_proto::Fault;
use tch::{Device, Tensor};

use super::{Bucket, Parameters};
use crate::error::EngineError;
use crate::optimizer::states::{MASTER, StateTensor};
use crate::optimizer::update::Update;
use crate::zero::ranges::{ALIGN, Slot};
use crate::zero::unit_weights::part;
use dyad_torch::comm::CommError;

/// A whole tensor with its checkpoint name, e.g. `model.norm.weight` and `exp_avg`.
#[derive(Debug)]
pub struct WholeTensor {
    /// The parameter's name.
    pub name: String,
    /// Suffix of the tensor, e.g. `exp_avg`.
    pub suffix: &'static str,
    /// On the host, or a view of the tensor in use.
    pub tensor: Tensor,
}

/// Returns a tensor by its parameter's name, suffix and shape.
pub type Source<'a> = &'a dyn Fn(&str, &'static str, &[i64]) -> Result<Tensor, Fault>;

impl Parameters {
    /// Returns the masters, and the moments if asked for. Every rank must call this. If states are sharded, only rank 0 gets tensors.
    pub fn collect(&self, moments: bool) -> Result<Vec<WholeTensor>, CommError> {
        let mut kept = Vec::new();
        for bucket in self.buckets.iter().rev() {
            for state_tensor in bucket.states.state_tensors() {
                if moments || state_tensor.suffix == MASTER {
                    kept.extend(self.whole(bucket, &state_tensor)?);
                }
            }
        }
        Ok(kept)
    }

    fn whole(&self, bucket: &Bucket, state_tensor: &StateTensor<'_>) -> Result<Vec<WholeTensor>, CommError> {
        let layout = bucket.weights.layout();
        let whole = match self.keeping.sharding.of_states() {
            false => state_tensor.values.shallow_clone(),
            true => {
                let communicator = self.keeping.link.communicator()?;
                let own = state_tensor.values.to_device(bucket.grad.device());
                let whole = Tensor::empty([layout.len / state_tensor.per], (own.kind(), own.device()));
                communicator.all_gather(&whole, &own)?.wait()?;
                if communicator.rank() != 0 {
                    return Ok(Vec::new());
                }
                whole.to_device(Device::Cpu)
            }
        };
        let parameters = self.of_bucket(bucket);
        let kept = |(parameter, slot): (&super::Parameter, &Slot)| {
            let place = scaled(*slot, state_tensor.per);
            let flat = whole.narrow(0, place.offset, place.len);
            let shape = shape(&parameter.leaf, state_tensor);
            WholeTensor {
                name: parameter.name.clone(),
                suffix: state_tensor.suffix,
                tensor: flat.view(shape.as_slice()),
            }
        };
        Ok(parameters.zip(&layout.slots).map(kept).collect())
    }

    /// Overwrites this rank's part of masters and moments with the tensors of `source`.
    pub fn restore(&mut self, source: Source<'_>) -> Result<(), Fault> {
        for bucket in &self.buckets {
            let own = self.keeping.sharding.own(bucket.weights.layout().len);
            let parameters = self.of_bucket(bucket);
            for (parameter, slot) in parameters.zip(&bucket.weights.layout().slots) {
                for state_tensor in bucket.states.state_tensors() {
                    let tensor =
                        source(&parameter.name, state_tensor.suffix, &shape(&parameter.leaf, &state_tensor))?;
                    let own = own.start / state_tensor.per..own.end / state_tensor.per;
                    if let Some((from, to)) = scaled(*slot, state_tensor.per).overlap(&own) {
                        let values = part(&tensor.flatten(0, -1), from).to_kind(state_tensor.values.kind());
                        tch::no_grad(|| part(state_tensor.values, to).copy_(&values));
                    }
                }
            }
        }
        self.publish().map_err(|error| Fault::failed(error.to_string()))
    }

    /// Copies updated masters to the weights that the model computes with, on this rank and on the others.
    pub fn publish(&mut self) -> Result<(), CommError> {
        // Begins with the units that the next pass needs first.
        self.buckets.iter().rev().try_for_each(Bucket::publish)
    }
}

impl Bucket {
    /// Takes an optimizer step, and copies the result to the weights that the model computes with.
    pub(crate) fn step(&mut self, update: &Update<'_>) -> Result<(), EngineError> {
        self.weights.wait()?;
        let published = (!self.masters_are_weights).then(|| self.weights.own());
        // A rank that updates only a part of the gradient leaves clearing it to the start of the next step.
        let clears = self.total.is_some() || update.grad.numel() == self.grad.numel();
        if self.states.update_in_one_pass(update, published.as_ref(), clears)? {
            self.cleared = clears;
            return Ok(self.weights.scatter()?);
        }
        self.states.update(update)?;
        Ok(self.publish()?)
    }

    pub(crate) fn publish(&self) -> Result<(), CommError> {
        self.weights.wait()?;
        if !self.masters_are_weights {
            tch::no_grad(|| self.weights.own().copy_(&self.states.master));
        }
        self.weights.scatter()
    }
}

fn scaled(slot: Slot, per: i64) -> Slot {
    Slot { offset: slot.offset / per, len: (slot.len + per - 1) / per }
}

fn shape(leaf: &Tensor, state_tensor: &StateTensor<'_>) -> Vec<i64> {
    match state_tensor.per {
        1 => leaf.size(),
        per => vec![(leaf.numel() as i64 + per - 1) / per],
    }
}

const _: () = assert!(ALIGN % crate::optimizer::eight_bit::BLOCK == 0, "no block straddles two parameters");
