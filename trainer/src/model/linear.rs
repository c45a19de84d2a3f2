//! Linear layers with an optional LoRA adapter.

use dyad_torch::backend::on_gpu_path;
use dyad_torch::ops::{layer, product};
use tch::Tensor;

use super::pass::Pass;

/// A low-rank update `scale * B(A(x))` of a frozen linear layer's output (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug)]
pub struct Adapter {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// `lora_alpha / lora_r`.
    pub scale: f64,
    /// Dropout probability on the input, in training passes only.
    pub dropout: f64,
}

/// `y = x Wᵀ + b`, plus the adapter's update if there is an adapter.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// The trainable update in LoRA runs.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// Another handle to the same tensors, without the adapter.
    #[must_use]
    pub fn share(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Self { weight: self.weight.shallow_clone(), bias, adapter: None }
    }

    /// `[tokens, in]` -> `[tokens, out]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let [y] = Self::forward_all([self], x, pass);
        y
    }

    /// Applies several layers to one input: `[tokens, in]` -> `[tokens, out]` each.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor, pass: &Pass<'_>) -> [Tensor; N] {
        let own_products = layers.iter().all(|layer| layer.takes_own_products(x));
        match (own_products || on_gpu_path(x.device())) && !layers.iter().any(|layer| layer.drops(pass)) {
            true => layer::linears(x, layers.map(Self::args), None, own_products),
            false => layers.map(|layer| layer.composed(x, pass)),
        }
    }

    /// `hidden + forward(x)`: `[tokens, out]` and `[tokens, in]` -> `[tokens, out]`.
    pub fn forward_onto(&self, hidden: &Tensor, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        if self.bias.is_some() || self.drops(pass) || !self.takes_own_products(x) {
            return hidden + self.forward(x, pass);
        }
        let [sum] = layer::linears(x, [self.args()], Some(hidden), true);
        sum
    }

    fn args(&self) -> layer::LinearArgs<'_> {
        let adapter = self.adapter.as_ref();
        let adapter = adapter.map(|one| layer::AdapterArgs { a: &one.a, b: &one.b, scale: one.scale });
        layer::LinearArgs { weight: &self.weight, bias: self.bias.as_ref(), adapter }
    }

    fn takes_own_products(&self, x: &Tensor) -> bool {
        let adapter = self.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]);
        adapter.chain([&self.weight]).all(|weight| product::projects(x, weight, self.bias.as_ref()))
    }

    /// True if dropout makes the adapter's input differ from the layer's.
    fn drops(&self, pass: &Pass<'_>) -> bool {
        pass.training && self.adapter.as_ref().is_some_and(|adapter| adapter.dropout > 0.0)
    }

    fn composed(&self, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let y = product::project(x, &self.weight, self.bias.as_ref());
        let Some(adapter) = &self.adapter else { return y };
        let low_rank = match self.drops(pass) {
            true => product::project(&x.dropout(adapter.dropout, true), &adapter.a, None),
            false => product::project(x, &adapter.a, None),
        };
        y + product::project(&(low_rank * adapter.scale), &adapter.b, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels_agree::{KINDS, agree, leaf};
    use crate::model::rotary::Rotary;
    use tch::{Device, Kind};

    /// With and without adapter and bias: compares the fused node of several layers with the composition of libtorch's operators.
    #[test]
    fn fused_layers_of_one_input_equal_their_composition() {
        tch::manual_seed(8);
        let segments = [];
        let rotary = Rotary::of_angles(&Tensor::zeros([1, 1, 2], (Kind::Float, Device::Cpu)), Kind::Float);
        let pass = Pass { segments: &segments, varlen: None, rotary: &rotary, training: true };
        for (kind, (rank, biased)) in KINDS
            .into_iter()
            .flat_map(|kind| [(0, false), (0, true), (4, false), (3, true)].map(|case| (kind, case)))
        {
            let mut inputs = vec![leaf(&[37, 48], kind), leaf(&[37, 96], kind)];
            let mut layer = |out: i64| {
                let mut own = |size: &[i64]| {
                    let tensor = leaf(size, kind);
                    inputs.push(tensor.shallow_clone());
                    tensor
                };
                let weight = own(&[out, 48]);
                let bias = biased.then(|| own(&[out]));
                let adapter = (rank > 0).then(|| Adapter {
                    a: own(&[rank, 48]),
                    b: own(&[out, rank]),
                    scale: 0.5,
                    dropout: 0.0,
                });
                Linear { weight, bias, adapter }
            };
            let layers = [layer(96), layer(32), layer(96)];
            let together = || {
                let [a, b] = Linear::forward_all([&layers[0], &layers[1]], &inputs[0], &pass);
                let onto = layers[2].forward_onto(&inputs[1], &inputs[0], &pass);
                Tensor::cat(&[a, b, onto], 1)
            };
            let alone = || {
                let [a, b, c] = [0, 1, 2].map(|i| plain_layer(&layers[i], &inputs[0]));
                Tensor::cat(&[a, b, &inputs[1] + c], 1)
            };
            agree(&inputs, together, alone);
        }
    }

    fn plain_layer(layer: &Linear, x: &Tensor) -> Tensor {
        let y = x.linear(&layer.weight, layer.bias.as_ref());
        match &layer.adapter {
            Some(adapter) => y + x.matmul(&adapter.a.tr()).matmul(&adapter.b.tr()) * adapter.scale,
            None => y,
        }
    }
}
