//! One optimizer step: global gradient norm, clipping, AdamW on float32 masters.
//!
//! [`learning_rate`] is the schedule, [`update`] the inputs of a step, [`states`] masters and moments, and [`eight_bit`] moments of eight
//! bits.

pub mod eight_bit;
pub mod learning_rate;
pub mod states;
pub mod update;

use dyad_proto::RunConfig;
use tch::Tensor;

use self::update::{Clip, Update};
use crate::error::EngineError;
use crate::observe::progress;
use crate::zero::parameters::Parameters;
use dyad_torch::adamw::AdamHyper;

/// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with betas 0.9 and 0.999, eps 1e-8.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    weight_decay: f64,
    max_grad_norm: f64,
}

impl Optimizer {
    /// Takes its settings from the run's configuration.
    #[must_use]
    pub fn new(config: &RunConfig) -> Self {
        Self { weight_decay: config.weight_decay, max_grad_norm: config.max_grad_norm }
    }

    /// Clips the reduced gradients and applies them as the `step`-th step, counted from 1. Returns the norm before clipping, on the
    /// gradients' device. `[1]`
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
        // Begins with the units that the next pass needs first.
        for index in (0..parameters.buckets.len()).rev() {
            progress::advance();
            let grad = parameters.own_grad(&parameters.buckets[index]);
            parameters.buckets[index].step(&Update { grad, clip: &clip, step, hyper })?;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::run_config::Optim;
    use tch::{Device, Kind};

    use super::*;
    use crate::zero::parameters::{Keeping, tests::keeping};
    use dyad_torch::backend::as_on_gpu;

    fn parameters(keeping: Keeping) -> (Tensor, Parameters) {
        let mut tensor = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let parameters = Parameters::adopt(vec![vec![("a".into(), &mut tensor)]], keeping);
        (tensor, parameters)
    }

    fn first_moment(parameters: &Parameters) -> f64 {
        let state_tensors = parameters.buckets[0].states.state_tensors();
        state_tensors
            .iter()
            .find(|state_tensor| state_tensor.suffix == "exp_avg")
            .unwrap()
            .values
            .double_value(&[0])
    }

    /// The fused step and libtorch's operators give the same masters, moments and weights, in both precisions. No gradient is left when
    /// the next step begins.
    #[test]
    fn the_fused_step_equals_its_composition() {
        let values = || Tensor::arange(70_000, (Kind::Float, Device::Cpu)).remainder(101.0) * 0.01 - 0.3;
        for (kind, optim) in
            [(Kind::Float, Optim::Adamw), (Kind::BFloat16, Optim::Adamw), (Kind::BFloat16, Optim::Adamw8bit)]
        {
            let stepped = || {
                let mut tensor = values();
                let keeping = Keeping { optim, ..keeping(kind) };
                let mut parameters = Parameters::adopt(vec![vec![("a".into(), &mut tensor)]], keeping);
                let optimizer = Optimizer { weight_decay: 0.1, max_grad_norm: 1.0 };
                for step in 1..4 {
                    parameters.begin_step();
                    let mut grad = parameters.units[0][0].grad.shallow_clone();
                    assert_eq!(grad.abs().max().double_value(&[]), 0.0);
                    grad += values() * (step as f64 - 2.5);
                    let _ = optimizer.step(&mut parameters, step, 0.01).unwrap();
                }
                let state_tensors = parameters.buckets[0].states.state_tensors();
                let mut all = vec![tensor.to_kind(Kind::Float)];
                all.extend(state_tensors.iter().map(|state_tensor| state_tensor.values.to_kind(Kind::Float)));
                all
            };
            for (ours, theirs) in stepped().iter().zip(as_on_gpu(stepped)) {
                let worst = (ours - theirs).abs().max().double_value(&[]);
                assert!(worst < 1e-6, "{kind:?} {optim:?}: differs by {worst}");
            }
        }
    }

    #[test]
    fn norm_is_reported_before_clipping() {
        let (tensor, mut parameters) = parameters(keeping(Kind::Float));
        let _ = parameters.units[0][0].grad.fill_(10.0);
        let optimizer = Optimizer { weight_decay: 0.0, max_grad_norm: 1.0 };
        let norm = optimizer.step(&mut parameters, 1, 0.1).unwrap().double_value(&[0]);
        assert!((norm - 20.0).abs() < 1e-5);
        assert!((tensor.double_value(&[0, 0]) - 0.9).abs() < 1e-5);
        // Clipped from 10 to 0.5; the first moment holds a tenth of that.
        assert!((first_moment(&parameters) - 0.05).abs() < 1e-6);
    }

    /// A clip factor on the device gives the same result as one that the host reads, also if nothing is clipped.
    #[test]
    fn clipping_on_the_device_equals_clipping_on_the_host() {
        for (optim, largest) in [(Optim::Adamw, 1.0), (Optim::Adamw, 1e6), (Optim::Adamw8bit, 1.0)] {
            let stepped = || {
                let keeping = Keeping { optim, ..keeping(Kind::Float) };
                let (tensor, mut parameters) = parameters(keeping);
                let grad = Tensor::from_slice(&[1.0f32, -20.0, 3.0, 4e-3]).view([2, 2]);
                let optimizer = Optimizer { weight_decay: 0.1, max_grad_norm: largest };
                for step in 1..4 {
                    parameters.units[0][0].grad.copy_(&grad);
                    let _ = optimizer.step(&mut parameters, step, 0.1).unwrap();
                }
                tensor
            };
            let worst = (stepped() - as_on_gpu(stepped)).abs().max().double_value(&[]);
            assert!(worst < 1e-5, "{optim:?}, at most {largest}: differs by {worst}");
        }
    }

    #[test]
    fn zero_max_grad_norm_disables_clipping() {
        let (_tensor, mut parameters) = parameters(keeping(Kind::Float));
        let _ = parameters.units[0][0].grad.fill_(10.0);
        let _ = Optimizer { weight_decay: 0.0, max_grad_norm: 0.0 }.step(&mut parameters, 1, 0.1).unwrap();
        assert!((first_moment(&parameters) - 1.0).abs() < 1e-6);
    }

    /// Norms and biases get no weight decay, wherever they stand among the other parameters.
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
