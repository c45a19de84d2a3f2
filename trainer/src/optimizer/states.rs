//! Masters and moments of a flat run of parameters.

use std::ops::Range;

use dyad_proto::run_config::Optim;
use tch::{Kind, Tensor};

use super::eight_bit::{self, BLOCK};
use super::update::{Clip, Update};
use crate::zero::unit_weights::part;
use dyad_torch::adamw::{AdamHyper, AdamPass, AdamSlot, adamw_in_one_pass, fused_adamw};
use dyad_torch::backend::on_gpu_path;
use dyad_torch::error::TorchError;

/// Suffix of the float32 weights in checkpoints.
pub const MASTER: &str = "master";

/// Float32 masters and AdamW's two moments.
#[derive(Debug)]
pub struct States {
    /// Weights, float32. `[values]`
    pub master: Tensor,
    /// Weight decay applies to the values before this index.
    decaying: i64,
    moments: StateMoments,
}

#[derive(Debug)]
enum StateMoments {
    Wide { exp_avg: Tensor, exp_avg_sq: Tensor },
    EightBit(eight_bit::Moments),
}

/// One tensor of the states; `per` parameters share each of its values.
#[derive(Debug)]
pub struct StateTensor<'a> {
    /// Its suffix in checkpoints, after the parameter's name.
    pub suffix: &'static str,
    /// `[values / per]`.
    pub values: &'a Tensor,
    /// Parameters that share a value.
    pub per: i64,
}

impl States {
    /// Zero moments for `master`, of which the first `decaying` values get weight decay.
    #[must_use]
    pub fn new(master: Tensor, decaying: i64, optim: Optim) -> Self {
        let moments = match optim {
            Optim::Adamw => {
                StateMoments::Wide { exp_avg: master.zeros_like(), exp_avg_sq: master.zeros_like() }
            }
            Optim::Adamw8bit => {
                StateMoments::EightBit(eight_bit::Moments::zeros(master.numel() as i64, master.device()))
            }
        };
        Self { master, decaying, moments }
    }

    /// Ranges of parameters with their hyperparameters: norms and biases get no weight decay.
    fn ranges(&self, hyper: AdamHyper) -> impl Iterator<Item = (Range<i64>, AdamHyper)> + use<> {
        let len = self.master.numel() as i64;
        let plain = AdamHyper { weight_decay: 0.0, ..hyper };
        let both = [(0..self.decaying, hyper), (self.decaying..len, plain)];
        both.into_iter().filter(|(range, _)| !range.is_empty())
    }

    /// Updates in one pass over memory, if that is possible: on the CPU, with moments of 32 bits. Returns whether it did. Writes the new
    /// parameters to `published` in bfloat16, and zeros the gradient if `clears` is set.
    pub fn update_in_one_pass(
        &self,
        update: &Update<'_>,
        published: Option<&Tensor>,
        clears: bool,
    ) -> Result<bool, TorchError> {
        let (StateMoments::Wide { exp_avg, exp_avg_sq }, &Clip::Known(scale)) = (&self.moments, update.clip)
        else {
            return Ok(false);
        };
        if on_gpu_path(self.master.device()) || on_gpu_path(update.grad.device()) {
            return Ok(false);
        }
        for (range, hyper) in self.ranges(update.hyper) {
            let cut = |tensor: &Tensor| part(tensor, range.clone());
            let slot = AdamSlot {
                parameter: &cut(&self.master),
                gradient: &cut(&update.grad),
                exp_avg: &cut(exp_avg),
                exp_avg_sq: &cut(exp_avg_sq),
            };
            let published = published.map(cut);
            let adam_pass = AdamPass { scale, published: published.as_ref(), clears };
            adamw_in_one_pass(&slot, adam_pass, update.step, hyper)?;
        }
        Ok(true)
    }

    /// One AdamW step, with libtorch's fused operator unless the moments have eight bits.
    pub fn update(&mut self, update: &Update<'_>) -> Result<(), TorchError> {
        // The fused step also applies the divisor; otherwise the division is a separate pass.
        let divides =
            matches!(self.moments, StateMoments::Wide { .. }) && self.master.device() == update.grad.device();
        let mut grad = update.grad.shallow_clone();
        let mut divisor = None;
        match update.clip {
            Clip::Known(scale) if *scale < 1.0 => grad *= *scale,
            Clip::Known(_) => {}
            Clip::OnDevice(by) if divides => divisor = Some(by),
            Clip::OnDevice(by) => grad /= by,
        }
        let grad = grad.to_device(self.master.device());
        let count = Tensor::full([], update.step as f64, (Kind::Float, self.master.device()));
        for (range, hyper) in self.ranges(update.hyper) {
            let (parameter, gradient) = (part(&self.master, range.clone()), part(&grad, range.clone()));
            match &mut self.moments {
                StateMoments::Wide { exp_avg, exp_avg_sq } => {
                    let (exp_avg, exp_avg_sq) = (part(exp_avg, range.clone()), part(exp_avg_sq, range));
                    let slot = AdamSlot {
                        parameter: &parameter,
                        gradient: &gradient,
                        exp_avg: &exp_avg,
                        exp_avg_sq: &exp_avg_sq,
                    };
                    fused_adamw(&[slot], &count, divisor, hyper)?;
                }
                StateMoments::EightBit(moments) => {
                    moments.update(range, &parameter, &gradient, update.step, hyper)?;
                }
            }
        }
        Ok(())
    }

    /// Every tensor, with its suffix in checkpoints.
    #[must_use]
    pub fn state_tensors(&self) -> Vec<StateTensor<'_>> {
        let state_tensor = |suffix, values, per| StateTensor { suffix, values, per };
        let mut state_tensors = vec![state_tensor(MASTER, &self.master, 1)];
        match &self.moments {
            StateMoments::Wide { exp_avg, exp_avg_sq } => {
                state_tensors
                    .extend([state_tensor("exp_avg", exp_avg, 1), state_tensor("exp_avg_sq", exp_avg_sq, 1)]);
            }
            StateMoments::EightBit(eight_bit::Moments { exp_avg, exp_avg_sq }) => state_tensors.extend([
                state_tensor("exp_avg_8bit", &exp_avg.codes, 1),
                state_tensor("exp_avg_absmax", &exp_avg.absmax, BLOCK),
                state_tensor("exp_avg_sq_8bit", &exp_avg_sq.codes, 1),
                state_tensor("exp_avg_sq_absmax", &exp_avg_sq.absmax, BLOCK),
            ]),
        }
        state_tensors
    }
}
