//! Masters and moments of a flat run of parameters.

use dyad_proto::run_config::Optim;
use tch::{Kind, Tensor};

use super::eight_bit::{self, BLOCK};
use crate::ext::{AdamHyper, AdamSlot, TorchError, fused_adamw};
use crate::flat::part;
use crate::parameters::MASTER;

/// Float32 masters and AdamW's two moments.
#[derive(Debug)]
pub struct States {
    /// Weights, float32. `[values]`
    pub master: Tensor,
    /// Weight decay applies to the values before this one.
    decaying: i64,
    moments: Moments,
}

#[derive(Debug)]
enum Moments {
    Wide { exp_avg: Tensor, exp_avg_sq: Tensor },
    EightBit(eight_bit::Moments),
}

/// One tensor of the states, `per` parameters to a value.
#[derive(Debug)]
pub struct Plane<'a> {
    /// Its name in checkpoints, after the parameter's.
    pub suffix: &'static str,
    /// `[values / per]`.
    pub values: &'a Tensor,
    /// Parameters that share a value.
    pub per: i64,
}

impl States {
    /// Moments of zero beside masters, of which the first `decaying` decay.
    #[must_use]
    pub fn new(master: Tensor, decaying: i64, optim: Optim) -> Self {
        let moments = match optim {
            Optim::Adamw => Moments::Wide { exp_avg: master.zeros_like(), exp_avg_sq: master.zeros_like() },
            Optim::Adamw8bit => {
                Moments::EightBit(eight_bit::Moments::zeros(master.numel() as i64, master.device()))
            }
        };
        Self { master, decaying, moments }
    }

    /// One AdamW step from this gradient, divided by `divisor` where there is one; `step` counts from 1.
    pub fn update(
        &mut self,
        grad: &Tensor,
        divisor: Option<&Tensor>,
        step: u64,
        hyper: AdamHyper,
    ) -> Result<(), TorchError> {
        // The fused step divides on its way; elsewhere that is a pass of its own.
        let divides = matches!(self.moments, Moments::Wide { .. }) && self.master.device() == grad.device();
        let grad = match divisor {
            Some(divisor) if !divides => grad / divisor,
            _ => grad.shallow_clone(),
        };
        let divisor = divisor.filter(|_| divides);
        let grad = grad.to_device(self.master.device());
        let len = self.master.numel() as i64;
        let count = Tensor::full([], step as f64, (Kind::Float, self.master.device()));
        let plain = AdamHyper { weight_decay: 0.0, ..hyper };
        for (range, hyper) in [(0..self.decaying, hyper), (self.decaying..len, plain)] {
            if range.is_empty() {
                continue;
            }
            let (parameter, gradient) = (part(&self.master, range.clone()), part(&grad, range.clone()));
            match &mut self.moments {
                Moments::Wide { exp_avg, exp_avg_sq } => {
                    let (exp_avg, exp_avg_sq) = (part(exp_avg, range.clone()), part(exp_avg_sq, range));
                    let slot = AdamSlot {
                        parameter: &parameter,
                        gradient: &gradient,
                        exp_avg: &exp_avg,
                        exp_avg_sq: &exp_avg_sq,
                    };
                    fused_adamw(&[slot], &count, divisor, hyper)?;
                }
                Moments::EightBit(moments) => {
                    moments.update(range, (&parameter, &gradient), (step, hyper))?;
                }
            }
        }
        Ok(())
    }

    /// Every tensor, as checkpoints name them.
    #[must_use]
    pub fn planes(&self) -> Vec<Plane<'_>> {
        let plane = |suffix, values, per| Plane { suffix, values, per };
        let mut planes = vec![plane(MASTER, &self.master, 1)];
        match &self.moments {
            Moments::Wide { exp_avg, exp_avg_sq } => {
                planes.extend([plane("exp_avg", exp_avg, 1), plane("exp_avg_sq", exp_avg_sq, 1)]);
            }
            Moments::EightBit(eight_bit::Moments { exp_avg, exp_avg_sq }) => planes.extend([
                plane("exp_avg_8bit", &exp_avg.codes, 1),
                plane("exp_avg_absmax", &exp_avg.absmax, BLOCK),
                plane("exp_avg_sq_8bit", &exp_avg_sq.codes, 1),
                plane("exp_avg_sq_absmax", &exp_avg_sq.absmax, BLOCK),
            ]),
        }
        planes
    }
}
