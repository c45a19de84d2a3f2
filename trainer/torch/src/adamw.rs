//! AdamW in place: libtorch's fused step, and CPU steps that pass over memory once.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::autograd::pointers;
use crate::error::{TorchError, check};
use crate::ffi::{dyad_adamw, dyad_adamw_8bit, dyad_fused_adamw};

/// The tensors of one parameter that an optimizer step reads and writes.
#[derive(Debug)]
pub struct AdamSlot<'a> {
    /// Master weights, float32, updated in place.
    pub parameter: &'a Tensor,
    /// Gradient, float32. A divisor or [`AdamPass::clears`] changes it in place.
    pub gradient: &'a Tensor,
    /// Running mean of the gradient.
    pub exp_avg: &'a Tensor,
    /// Running mean of the squared gradient.
    pub exp_avg_sq: &'a Tensor,
}

/// Hyper-parameters of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamHyper {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// One AdamW step in place; `step` is a float32 scalar tensor that counts from 1. If there is a `divisor` (float32 scalar), the
/// gradients are divided by it first.
pub fn fused_adamw(
    slots: &[AdamSlot<'_>],
    step: &Tensor,
    divisor: Option<&Tensor>,
    hyper: AdamHyper,
) -> Result<(), TorchError> {
    let list = |pick: fn(&AdamSlot<'_>) -> *const C_tensor| -> Vec<*const C_tensor> {
        slots.iter().map(pick).collect()
    };
    let steps = vec![step.as_ptr(); slots.len()];
    let values = [hyper.learning_rate, hyper.beta1, hyper.beta2, hyper.weight_decay, hyper.eps];
    // SAFETY: five arrays of `slots.len()` live tensors each, a live tensor or null, and five doubles.
    unsafe {
        check(dyad_fused_adamw(
            list(|slot| slot.parameter.as_ptr()).as_ptr(),
            list(|slot| slot.gradient.as_ptr()).as_ptr(),
            list(|slot| slot.exp_avg.as_ptr()).as_ptr(),
            list(|slot| slot.exp_avg_sq.as_ptr()).as_ptr(),
            steps.as_ptr(),
            slots.len(),
            divisor.map_or(std::ptr::null(), |divisor| divisor.as_ptr()),
            values.as_ptr(),
        ))
    }
}

/// Extra work of a CPU step, done while the values are in cache.
#[derive(Clone, Copy, Debug)]
pub struct AdamPass<'a> {
    /// Gradients are multiplied by this first.
    pub scale: f64,
    /// Receives the new parameters in bfloat16.
    pub published: Option<&'a Tensor>,
    /// Sets the gradient to zero after the step.
    pub clears: bool,
}

/// One AdamW step in place on the CPU, in one pass over memory; `step` counts from 1.
pub fn adamw_in_one_pass(
    slot: &AdamSlot<'_>,
    adam_pass: AdamPass<'_>,
    step: u64,
    hyper: AdamHyper,
) -> Result<(), TorchError> {
    let wide = [slot.parameter, slot.gradient, slot.exp_avg, slot.exp_avg_sq];
    let fits = |tensor: &Tensor, kind| {
        let here = tensor.device() == Device::Cpu && tensor.is_contiguous();
        here && tensor.kind() == kind && tensor.numel() == slot.parameter.numel()
    };
    assert!(wide.into_iter().all(|tensor| fits(tensor, Kind::Float)));
    assert!(adam_pass.published.is_none_or(|tensor| fits(tensor, Kind::BFloat16)));
    let AdamHyper { learning_rate, beta1, beta2, weight_decay, eps } = hyper;
    let values = [learning_rate, beta1, beta2, weight_decay, eps, step as f64, adam_pass.scale];
    // SAFETY: live, contiguous CPU tensors of the same length and of the kinds that the bridge expects, and seven doubles.
    unsafe {
        check(dyad_adamw(
            slot.parameter.as_ptr(),
            slot.gradient.as_ptr(),
            slot.exp_avg.as_ptr(),
            slot.exp_avg_sq.as_ptr(),
            adam_pass.published.map_or(std::ptr::null(), |tensor| tensor.as_ptr()),
            adam_pass.clears,
            values.as_ptr(),
        ))
    }
}

/// One AdamW step with 8-bit moments, on the CPU. `moments` holds five tensors for the first moment, then five for the second:
/// codes, largest magnitudes of blocks, fractions, midpoints between fractions, starts of cells. `step` counts from 1.
pub fn adamw_8bit(
    parameter: &Tensor,
    gradient: &Tensor,
    moments: &[&Tensor],
    step: u64,
    hyper: AdamHyper,
) -> Result<(), TorchError> {
    assert_eq!(moments.len(), 10, "five tensors per moment");
    assert!(moments.iter().chain([&parameter, &gradient]).all(|tensor| tensor.is_contiguous()));
    let AdamHyper { learning_rate, beta1, beta2, weight_decay, eps } = hyper;
    let values = [learning_rate, beta1, beta2, weight_decay, eps, step as f64];
    // SAFETY: live, contiguous CPU tensors of the sizes that blocks of 256 values need, and six doubles.
    unsafe {
        check(dyad_adamw_8bit(
            parameter.as_ptr(),
            gradient.as_ptr(),
            pointers(moments).as_ptr(),
            values.as_ptr(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From zero state the first AdamW step moves by lr * sign(g), after a decay by lr * weight_decay.
    #[test]
    fn adamw_first_step_is_the_sign_of_the_gradient() {
        let options = (Kind::Float, Device::Cpu);
        let parameter = Tensor::ones([2], options);
        let gradient = Tensor::from_slice(&[0.5f32, -3.0]);
        let (exp_avg, exp_avg_sq) = (Tensor::zeros([2], options), Tensor::zeros([2], options));
        let slot = AdamSlot {
            parameter: &parameter,
            gradient: &gradient,
            exp_avg: &exp_avg,
            exp_avg_sq: &exp_avg_sq,
        };
        let hyper = AdamHyper { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, weight_decay: 0.5, eps: 1e-8 };
        fused_adamw(&[slot], &Tensor::ones([], options), None, hyper).unwrap();
        let values: Vec<f32> = (&parameter).try_into().unwrap();
        assert!((values[0] - 0.85).abs() < 1e-6 && (values[1] - 1.05).abs() < 1e-6, "{values:?}");
    }
}
