//! Inputs of one update of the weights.

use tch::{Kind, Tensor};

use dyad_torch::adamw::AdamHyper;
use dyad_torch::backend::on_gpu_path;

/// Scales gradients down to the largest allowed norm.
#[derive(Debug)]
pub enum Clip {
    /// A factor of at most 1. Used where reading the norm waits for nothing.
    Known(f64),
    /// A divisor that stays on the device, float32. `[1]`
    OnDevice(Tensor),
}

impl Clip {
    /// Scales by the norm of all gradients, `[1]`. Does not scale if `largest` is 0 or less.
    #[must_use]
    pub fn new(norm: &Tensor, largest: f64) -> Self {
        // The same guard against division by zero as torch's clip_grad_norm_.
        const GUARD: f64 = 1e-6;
        if largest <= 0.0 {
            Self::Known(1.0)
        } else if on_gpu_path(norm.device()) {
            Self::OnDevice(((norm + GUARD) / largest).clamp_min(1.0).to_kind(Kind::Float))
        } else {
            Self::Known((largest / (norm.double_value(&[0]) + GUARD)).min(1.0))
        }
    }
}

/// Inputs of one optimizer step.
#[derive(Debug)]
pub struct Update<'a> {
    /// Gradient of this rank's own part, before clipping.
    pub grad: Tensor,
    /// How to clip it.
    pub clip: &'a Clip,
    /// Number of the step, from 1.
    pub step: u64,
    /// Hyperparameters of the step.
    pub hyper: AdamHyper,
}
