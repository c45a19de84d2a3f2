//! What one update of the weights is made of.

use tch::{Kind, Tensor};

use dyad_torch::adamw::AdamHyper;
use dyad_torch::backend::on_gpu_path;

/// How gradients are scaled to the largest norm that they may have.
#[derive(Debug)]
pub enum Clip {
    /// By a factor that the host knows, at most one: where reading the norm waits for nothing.
    Known(f64),
    /// By a divisor that only the device knows, float32. `[1]`
    OnDevice(Tensor),
}

impl Clip {
    /// By the norm of all gradients. `[1]`
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

/// What an optimizer step is made of.
#[derive(Debug)]
pub struct Update<'a> {
    /// Of this rank's own part, before clipping.
    pub grad: Tensor,
    /// How it is clipped.
    pub clip: &'a Clip,
    /// Counted from 1.
    pub step: u64,
    /// Of the whole step.
    pub hyper: AdamHyper,
}
