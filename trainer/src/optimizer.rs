//! One optimizer step: global gradient norm, clipping, AdamW on float32 masters.

use dyad_proto::RunConfig;
use tch::{Kind, Tensor};

use crate::ext::{AdamHyper, AdamSlot, TorchError, fused_adamw};
use crate::parameters::{Parameter, Parameters};

/// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with betas 0.9 and 0.999, eps 1e-8.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    weight_decay: f64,
    max_grad_norm: f64,
}

impl Optimizer {
    /// By the run's configuration.
    #[must_use]
    pub fn new(config: &RunConfig) -> Self {
        Self { weight_decay: config.weight_decay, max_grad_norm: config.max_grad_norm }
    }

    /// Clips and applies the reduced gradients as the `step`-th step, counted from 1. Returns the norm before clipping.
    pub fn step(
        &self,
        parameters: &mut Parameters,
        step: u64,
        learning_rate: f64,
    ) -> Result<f64, TorchError> {
        let norm = global_norm(parameters);
        if self.max_grad_norm > 0.0 {
            // The same guard against division by zero as torch's clip_grad_norm_.
            let scale = self.max_grad_norm / (norm + 1e-6);
            if scale < 1.0 {
                for bucket in &mut parameters.buckets {
                    bucket.grad *= scale;
                }
            }
        }
        for (decay, weight_decay) in [(true, self.weight_decay), (false, 0.0)] {
            let slots: Vec<AdamSlot<'_>> =
                parameters.iter().filter(|parameter| parameter.decays() == decay).map(slot).collect();
            let Some(first) = slots.first() else { continue };
            let count = Tensor::full([], step as f64, (Kind::Float, first.parameter.device()));
            let hyper = AdamHyper { learning_rate, beta1: 0.9, beta2: 0.999, weight_decay, eps: 1e-8 };
            fused_adamw(&slots, &count, hyper)?;
        }
        parameters.publish();
        Ok(norm)
    }
}

fn slot(parameter: &Parameter) -> AdamSlot<'_> {
    AdamSlot {
        parameter: &parameter.master,
        gradient: &parameter.grad,
        exp_avg: &parameter.exp_avg,
        exp_avg_sq: &parameter.exp_avg_sq,
    }
}

/// L2 norm over all buckets.
fn global_norm(parameters: &Parameters) -> f64 {
    let squares: Vec<Tensor> =
        parameters.buckets.iter().map(|bucket| bucket.grad.dot(&bucket.grad).to_kind(Kind::Double)).collect();
    if squares.is_empty() {
        0.0
    } else {
        Tensor::stack(&squares, 0).sum(Kind::Double).sqrt().double_value(&[])
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn parameters() -> (Tensor, Parameters) {
        let mut tensor = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let parameters = Parameters::adopt(vec![vec![("a".into(), &mut tensor)]], Kind::Float);
        (tensor, parameters)
    }

    #[test]
    fn norm_is_reported_before_clipping() {
        let (tensor, mut parameters) = parameters();
        let _ = parameters.buckets[0].grad.fill_(10.0);
        let optimizer = Optimizer { weight_decay: 0.0, max_grad_norm: 1.0 };
        let norm = optimizer.step(&mut parameters, 1, 0.1).unwrap();
        assert!((norm - 20.0).abs() < 1e-5);
        assert!((parameters.buckets[0].grad.double_value(&[0]) - 0.5).abs() < 1e-6);
        assert!((tensor.double_value(&[0, 0]) - 0.9).abs() < 1e-5);
    }

    #[test]
    fn zero_max_grad_norm_disables_clipping() {
        let (_tensor, mut parameters) = parameters();
        let _ = parameters.buckets[0].grad.fill_(10.0);
        Optimizer { weight_decay: 0.0, max_grad_norm: 0.0 }.step(&mut parameters, 1, 0.1).unwrap();
        assert_eq!(parameters.buckets[0].grad.double_value(&[0]), 10.0);
    }
}
