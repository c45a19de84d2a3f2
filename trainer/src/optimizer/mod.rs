//! One optimizer step: global gradient norm, clipping, AdamW on float32 masters.

pub mod eight_bit;
pub mod states;

use dyad_proto::RunConfig;
use tch::{Kind, Tensor};

use crate::engine::EngineError;
use crate::ext::AdamHyper;
use crate::model::fused::elsewhere;
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

    /// Clips and applies the reduced gradients as the `step`-th step, counted from 1. Returns the norm before clipping, where
    /// the gradients are. `[1]`
    pub fn step(
        &self,
        parameters: &mut Parameters,
        step: u64,
        learning_rate: f64,
    ) -> Result<Tensor, EngineError> {
        let norm = parameters.grad_norm()?;
        let clip = Clip::new(&norm, self.max_grad_norm);
        let hyper =
            AdamHyper { learning_rate, beta1: 0.9, beta2: 0.999, weight_decay: self.weight_decay, eps: 1e-8 };
        // The units that the next pass needs first come first.
        for index in (0..parameters.buckets.len()).rev() {
            let mut grad = parameters.own_grad(&parameters.buckets[index]);
            if let Clip::Known(scale) = clip
                && scale < 1.0
            {
                grad *= scale;
            }
            let bucket = &mut parameters.buckets[index];
            bucket.weights.arrive()?;
            bucket.states.update(&grad, clip.divisor(), step, hyper)?;
            bucket.publish()?;
        }
        Ok(norm)
    }
}

/// How gradients are scaled to the largest norm that they may have.
#[derive(Debug)]
enum Clip {
    /// By a factor that the host knows: where reading the norm waits for nothing.
    Known(f64),
    /// By a divisor that only the device knows, float32. `[1]`
    OnDevice(Tensor),
}

impl Clip {
    fn new(norm: &Tensor, largest: f64) -> Self {
        // The same guard against division by zero as torch's clip_grad_norm_.
        const GUARD: f64 = 1e-6;
        if largest <= 0.0 {
            Self::Known(1.0)
        } else if elsewhere(norm.device()) {
            Self::OnDevice(((norm + GUARD) / largest).clamp_min(1.0).to_kind(Kind::Float))
        } else {
            Self::Known(largest / (norm.double_value(&[0]) + GUARD))
        }
    }

    fn divisor(&self) -> Option<&Tensor> {
        match self {
            Self::Known(_) => None,
            Self::OnDevice(divisor) => Some(divisor),
        }
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::run_config::Optim;
    use tch::Device;

    use super::*;
    use crate::model::fused::as_elsewhere;
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
        let norm = optimizer.step(&mut parameters, 1, 0.1).unwrap().double_value(&[0]);
        assert!((norm - 20.0).abs() < 1e-5);
        assert!((parameters.buckets[0].grad.double_value(&[0]) - 0.5).abs() < 1e-6);
        assert!((tensor.double_value(&[0, 0]) - 0.9).abs() < 1e-5);
    }

    /// The factor that stays on the device gives what the one that the host knows gives, also where nothing is clipped.
    #[test]
    fn clipping_without_reading_the_norm_changes_nothing() {
        for (optim, largest) in [(Optim::Adamw, 1.0), (Optim::Adamw, 1e6), (Optim::Adamw8bit, 1.0)] {
            let stepped = || {
                let keeping = Keeping { optim, ..keeping(Kind::Float) };
                let (tensor, mut parameters) = parameters(keeping);
                let grad = &parameters.units[0][0].grad;
                grad.shallow_clone().copy_(&Tensor::from_slice(&[1.0f32, -20.0, 3.0, 4e-3]).view([2, 2]));
                let optimizer = Optimizer { weight_decay: 0.1, max_grad_norm: largest };
                for step in 1..4 {
                    let _ = optimizer.step(&mut parameters, step, 0.1).unwrap();
                }
                tensor
            };
            let worst = (stepped() - as_elsewhere(stepped)).abs().max().double_value(&[]);
            assert!(worst < 1e-5, "{optim:?}, at most {largest}: differs by {worst}");
        }
    }

    #[test]
    fn zero_max_grad_norm_disables_clipping() {
        let (_tensor, mut parameters) = parameters(keeping(Kind::Float));
        let _ = parameters.units[0][0].grad.fill_(10.0);
        let _ = Optimizer { weight_decay: 0.0, max_grad_norm: 0.0 }.step(&mut parameters, 1, 0.1).unwrap();
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
            let _ =
                Optimizer { weight_decay: 0.5, max_grad_norm: 0.0 }.step(&mut parameters, 1, 0.1).unwrap();
            assert_eq!(norm.double_value(&[2]), 1.0);
            assert!((matrix.double_value(&[1, 1]) - 0.95).abs() < 1e-6);
        }
    }
}
