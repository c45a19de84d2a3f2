//! The gated MLP and its activations.

use dyad_families::Activation;
use dyad_torch::ops::layer;
use tch::Tensor;

use super::linear::Linear;
use super::pass::Pass;

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Mlp {
    /// Gate projection.
    pub gate_proj: Linear,
    /// Up projection.
    pub up_proj: Linear,
    /// Down projection.
    pub down_proj: Linear,
    /// Activation of the gate.
    pub activation: Activation,
}

/// `activation(gate) * up`; only SwiGLU has a fused kernel.
fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => layer::swiglu(gate, up),
        Activation::Gelu => gate.gelu("none") * up,
        Activation::GeluTanh => gate.gelu("tanh") * up,
        Activation::Relu => gate.relu() * up,
    }
}

impl Mlp {
    /// `hidden + mlp(x)`, where `x` is the normed `hidden`. All are `[tokens, hidden]`.
    pub fn forward_onto(&self, hidden: &Tensor, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let [gate, up] = Linear::forward_all([&self.gate_proj, &self.up_proj], x, pass);
        self.down_proj.forward_onto(hidden, &gated(self.activation, &gate, &up), pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels_agree::{KINDS, agree, leaf};

    #[test]
    fn fused_swiglu_equals_its_composition() {
        tch::manual_seed(3);
        for kind in KINDS {
            let inputs = [leaf(&[23, 41], kind), leaf(&[23, 41], kind)];
            let [gate, up] = &inputs;
            agree(&inputs, || layer::swiglu(gate, up), || gate.silu() * up);
        }
        // Large values, for which the exponential would overflow.
        let far = Tensor::from_slice(&[-200.0f32, -90.0, 90.0, 200.0, f32::NAN]);
        let values: Vec<f32> = layer::swiglu(&far, &far.ones_like()).try_into().unwrap();
        assert!(values[0].abs() < 1e-30 && values[1].abs() < 1e-30 && values[2..4] == [90.0, 200.0]);
        assert!(values[4].is_nan());
    }

    #[test]
    fn activations_match_their_definitions() {
        let gate = Tensor::from_slice(&[-2.0, -0.5, 0.0, 1.5]);
        let up = Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0]);
        let values = |activation| -> Vec<f64> { gated(activation, &gate, &up).try_into().unwrap() };
        // python3 -c 'import torch; x=torch.tensor([-2,-.5,0,1.5],dtype=torch.double); print(torch.nn.functional.gelu(x)*torch.tensor([1,2,3,4]))'
        let close = |found: Vec<f64>, expected: [f64; 4]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}");
        };
        close(values(Activation::Silu), [-0.238_406, -0.377_541, 0.0, 4.905_447]);
        close(values(Activation::Gelu), [-0.045_500, -0.308_538, 0.0, 5.599_157]);
        close(values(Activation::GeluTanh), [-0.045_402, -0.308_572, 0.0, 5.598_290]);
        close(values(Activation::Relu), [0.0, 0.0, 0.0, 6.0]);
    }
}
