//! A reference model that follows the policy: TR-DPO, Gorbatovski et al. 2024 (arXiv 2404.09656), eq. 5 and 6.
//!
//! Every `ref_model_sync_steps` steps, `reference <- alpha policy + (1 - alpha) reference` with alpha = `ref_model_mixup_alpha`, tensor by
//! tensor, in the precision of the passes. The reference has tensors of its own. Beside adapters it is the base with the adapters merged
//! into it, so that the rule is that of full weights.

use std::collections::HashMap;

use dyad_proto::Fault;
use dyad_torch::comm::CommError;
use tch::{Device, Tensor};

use super::Model;
use super::lora::{self, Adapters};
use crate::model::weights::Weights;
use crate::zero::parameters::WholeTensor;
use crate::zero::unit_weights::Keep;

/// Suffix of the reference's tensors in a checkpoint.
pub const REFERENCE: &str = "reference";

/// A model of copied tensors for the reference that moves.
pub fn copy_of(policy: &Model, keep: Keep) -> Model {
    let mut copy = policy.frozen_copy(keep);
    // Without buffers, tensors are still those of the policy.
    if copy.residence.flats().is_empty() {
        copy.named_tensors().into_iter().for_each(|(_, tensor)| *tensor = tensor.copy());
    }
    copy
}

/// Moves the reference towards the policy. Every rank must call this if weights are sharded.
pub fn move_towards(
    reference: &mut Model,
    policy: &mut Model,
    adapters: Option<&Adapters>,
    alpha: f64,
) -> Result<(), CommError> {
    tch::no_grad(|| {
        let named = lora::named_tensors(policy).into_iter().flatten();
        let trained: HashMap<String, Tensor> = named.map(|(name, tensor)| (name, tensor.detach())).collect();
        let find = |name: &str| trained.get(name).map(Tensor::shallow_clone);
        for unit in 0..policy.unit_count() {
            let _here =
                (policy.residence.gather_unit(unit, None)?, reference.residence.gather_unit(unit, None)?);
            let own = policy.units().swap_remove(unit).into_iter();
            for ((name, target), (_, own)) in reference.units().swap_remove(unit).into_iter().zip(own) {
                let merged = adapters.and_then(|adapters| adapters.merged(&name, &own.detach(), &find));
                let towards = merged.unwrap_or_else(|| own.detach()).to_kind(target.kind());
                // Through an alias, so that autograd does not notice the change.
                let mut target = target.data();
                let _ = target.g_mul_scalar_(1.0 - alpha);
                target += towards * alpha;
            }
            reference.residence.unit(unit).iter().for_each(|flat| flat.keep());
        }
        Ok(())
    })
}

/// The whole reference for a checkpoint, on the host. Every rank must call this if weights are sharded.
pub fn collect(reference: &mut Model) -> Result<Vec<WholeTensor>, CommError> {
    let mut kept = Vec::new();
    for unit in 0..reference.unit_count() {
        let _here = reference.residence.gather_unit(unit, None)?;
        for (name, tensor) in reference.units().swap_remove(unit) {
            let tensor = tensor.detach().to_device(Device::Cpu).copy();
            kept.push(WholeTensor { name, suffix: REFERENCE, tensor });
        }
    }
    Ok(kept)
}

/// Overwrites the reference with the tensors of a checkpoint. Returns their names there.
pub fn restore(reference: &mut Model, saved: &Weights) -> Result<Vec<String>, Fault> {
    let mut read = Vec::new();
    for unit in 0..reference.unit_count() {
        let _here = reference.residence.gather_unit(unit, None).map_err(crate::error::EngineError::from)?;
        for (name, tensor) in reference.units().swap_remove(unit) {
            let full = format!("{name}.{REFERENCE}");
            let kept = saved.tensor(&full, &tensor.size())?;
            tch::no_grad(|| tensor.data().copy_(&kept));
            read.push(full);
        }
        reference.residence.unit(unit).iter().for_each(|flat| flat.keep());
    }
    Ok(read)
}
