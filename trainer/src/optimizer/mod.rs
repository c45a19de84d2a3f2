//! One optimizer step: global gradient norm, clipping, AdamW on float32 masters.

pub mod eight_bit;
pub mod states;

use dyad_proto::RunConfig;

use crate::engine::EngineError;
use crate::ext::AdamHyper;
use crate::parameters::Parameters;

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
    ) -> Result<f64, EngineError> {
        let norm = parameters.grad_norm()?;
        // The same guard against division by zero as torch's clip_grad_norm_.
        let scale = if self.max_grad_norm > 0.0 { self.max_grad_norm / (norm + 1e-6) } else { 1.0 };
        let hyper =
            AdamHyper { learning_rate, beta1: 0.9, beta2: 0.999, weight_decay: self.weight_decay, eps: 1e-8 };
        // The units that the next pass needs first come first.
        for index in (0..parameters.buckets.len()).rev() {
            let mut grad = parameters.own_grad(&parameters.buckets[index]);
            if scale < 1.0 {
                grad *= scale;
            }
            let bucket = &mut parameters.buckets[index];
            bucket.weights.arrive()?;
            bucket.states.update(&grad, step, hyper)?;
            bucket.publish()?;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::run_config::Optim;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::parameters::{Keeping, tests::keeping};

    fn parameters(keeping: Keeping) -> (Tensor, Parameters) {
        let mut tensor = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let parameters = Parameters::adopt(vec![vec![("a".into(), &mut tensor)]], keeping);
        (tensor, parameters)
    }

    #[test]
    fn norm_is_reported_before_clipping() {
        let (tensor, mut parameters) = parameters(keeping(Kind::Float));
        let _ = parameters.units[0][0].grad.fill_(10.0);
        let optimizer = Optimizer { weight_decay: 0.0, max_grad_norm: 1.0 };
        let norm = optimizer.step(&mut parameters, 1, 0.1).unwrap();
        assert!((norm - 20.0).abs() < 1e-5);
        assert!((parameters.buckets[0].grad.double_value(&[0]) - 0.5).abs() < 1e-6);
        assert!((tensor.double_value(&[0, 0]) - 0.9).abs() < 1e-5);
    }

    #[test]
    fn zero_max_grad_norm_disables_clipping() {
        let (_tensor, mut parameters) = parameters(keeping(Kind::Float));
        let _ = parameters.units[0][0].grad.fill_(10.0);
        Optimizer { weight_decay: 0.0, max_grad_norm: 0.0 }.step(&mut parameters, 1, 0.1).unwrap();
        assert_eq!(parameters.buckets[0].grad.double_value(&[0]), 10.0);
    }

    /// Norms and biases are spared by the decay, wherever they stand among the others.
    #[test]
    fn weight_decay_spares_vectors() {
        for optim in [Optim::Adamw, Optim::Adamw8bit] {
            let options = (Kind::Float, Device::Cpu);
            let (mut norm, mut matrix) = (Tensor::ones([3], options), Tensor::ones([2, 2], options));
            let units = vec![vec![("norm".into(), &mut norm), ("matrix".into(), &mut matrix)]];
            let mut parameters = Parameters::adopt(units, Keeping { optim, ..keeping(Kind::Float) });
            Optimizer { weight_decay: 0.5, max_grad_norm: 0.0 }.step(&mut parameters, 1, 0.1).unwrap();
            assert_eq!(norm.double_value(&[2]), 1.0);
            assert!((matrix.double_value(&[1, 1]) - 0.95).abs() < 1e-6);
        }
    }
}
