//! Linear layers with an optional LoRA adapter.

use dyad_torch::backend::on_gpu_path;
use dyad_torch::ops::{layer, product};
use tch::{Kind, Tensor};

use super::dora::{Adapted, Dora};
use super::pass::Pass;

/// A low-rank update `scale * B(A(x))` of a frozen linear layer's output (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug)]
pub struct Adapter {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// Added to what B returns, before the scale: PEFT's `lora_bias`. `[out]`
    pub bias: Option<Tensor>,
    /// DoRA's magnitudes.
    pub dora: Option<Dora>,
    /// `lora_alpha / lora_r`.
    pub scale: f64,
    /// Dropout probability on the input, in training passes only.
    pub dropout: f64,
}

impl Adapter {
    /// A frozen copy for passes in this precision.
    #[must_use]
    pub fn frozen(&self, kind: Kind) -> Self {
        let copied = |tensor: &Tensor| tensor.detach().copy().to_kind(kind);
        Self {
            a: copied(&self.a),
            b: copied(&self.b),
            bias: self.bias.as_ref().map(copied),
            dora: self.dora.as_ref().map(Dora::frozen),
            ..*self
        }
    }
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
            true => {
                let mut with = layers.iter();
                let products = layer::linears(x, layers.map(Self::args), None, own_products);
                products.map(|y| match with.next() {
                    Some(layer) => layer.completed(y),
                    None => y,
                })
            }
            false => layers.map(|layer| layer.composed(x, pass)),
        }
    }

    /// `hidden + forward(x)`: `[tokens, out]` and `[tokens, in]` -> `[tokens, out]`.
    pub fn forward_onto(&self, hidden: &Tensor, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        if self.bias.is_some() || self.is_completed() || self.drops(pass) || !self.takes_own_products(x) {
            return hidden + self.forward(x, pass);
        }
        let [sum] = layer::linears(x, [self.args()], Some(hidden), true);
        sum
    }

    fn args(&self) -> layer::LinearArgs<'_> {
        let adapter = self.adapter.as_ref();
        let adapter = adapter.map(|one| layer::AdapterArgs { a: &one.a, b: &one.b, scale: one.scale });
        layer::LinearArgs { weight: &self.weight, bias: self.early_bias(), adapter }
    }

    fn dora(&self) -> Option<(&Dora, Adapted<'_>)> {
        let adapter = self.adapter.as_ref()?;
        let adapted = Adapted { weight: &self.weight, a: &adapter.a, b: &adapter.b, scale: adapter.scale };
        Some((adapter.dora.as_ref()?, adapted))
    }

    /// The bias, unless DoRA stretches the products first.
    fn early_bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().filter(|_| self.dora().is_none())
    }

    /// Whether [`Self::completed`] changes anything.
    fn is_completed(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| adapter.dora.is_some() || adapter.bias.is_some())
    }

    /// What the fused products of layer and adapter lack: the adapter's bias, or DoRA's stretch and then the layer's bias.
    fn completed(&self, y: Tensor) -> Tensor {
        if let Some((dora, adapted)) = self.dora() {
            let stretched = &y + &y * dora.stretch(adapted, y.kind());
            return match &self.bias {
                Some(bias) => stretched + bias,
                None => stretched,
            };
        }
        match self.adapter.as_ref().and_then(|adapter| Some((adapter.bias.as_ref()?, adapter.scale))) {
            Some((bias, scale)) => y + bias * scale,
            None => y,
        }
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
        let y = product::project(x, &self.weight, self.early_bias());
        let Some(adapter) = &self.adapter else { return y };
        let dropped = self.drops(pass).then(|| x.dropout(adapter.dropout, true));
        let low_rank = product::project(dropped.as_ref().unwrap_or(x), &adapter.a, None);
        let update = product::project(&(low_rank * adapter.scale), &adapter.b, None);
        match (self.dora(), dropped) {
            // As in PEFT, DoRA then stretches the layer's product with the dropped input.
            (Some((dora, adapted)), Some(dropped)) => {
                let stretched = product::project(&dropped, &self.weight, None) + &update;
                let y = y + update + stretched * dora.stretch(adapted, x.kind());
                self.bias.as_ref().map_or_else(|| y.shallow_clone(), |bias| &y + bias)
            }
            _ => self.completed(y + update),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels_agree::{KINDS, agree, leaf};
    use crate::model::rotary::Rotary;
    use tch::Device;

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Extra {
        None,
        Bias,
        Dora,
    }

    /// With and without adapter and bias: compares the fused node of several layers with the composition of libtorch's operators.
    #[test]
    fn fused_layers_of_one_input_equal_their_composition() {
        tch::manual_seed(8);
        let segments = [];
        let rotary = Rotary::of_angles(&Tensor::zeros([1, 1, 2], (Kind::Float, Device::Cpu)), Kind::Float);
        let pass = Pass { segments: &segments, varlen: None, rotary: &rotary, training: true };
        let cases = [
            (0, false, Extra::None),
            (0, true, Extra::None),
            (4, false, Extra::None),
            (3, true, Extra::None),
            (4, true, Extra::Bias),
            (3, false, Extra::Bias),
            (4, false, Extra::Dora),
            (3, true, Extra::Dora),
        ];
        for (kind, (rank, biased, extra)) in KINDS.into_iter().flat_map(|kind| cases.map(|case| (kind, case)))
        {
            let mut inputs = vec![leaf(&[37, 48], kind), leaf(&[37, 96], kind)];
            let mut layer = |out: i64| {
                let mut keep = |tensor: Tensor| {
                    inputs.push(tensor.shallow_clone());
                    tensor
                };
                let magnitude = (extra == Extra::Dora).then(|| {
                    // Float32 in every precision, and near the norms of the rows.
                    keep((leaf(&[out], Kind::Float).detach() + 7.0).set_requires_grad(true))
                });
                let mut own = |size: &[i64]| keep(leaf(size, kind));
                let weight = own(&[out, 48]);
                let bias = biased.then(|| own(&[out]));
                let adapter = (rank > 0).then(|| Adapter {
                    a: own(&[rank, 48]),
                    b: own(&[out, rank]),
                    bias: (extra == Extra::Bias).then(|| own(&[out])),
                    dora: magnitude.map(Dora::new),
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
        let Some(adapter) = &layer.adapter else { return y };
        let update = x.matmul(&adapter.a.tr()).matmul(&adapter.b.tr()) * adapter.scale;
        if let Some(dora) = &adapter.dora {
            let whole = (&layer.weight + adapter.b.matmul(&adapter.a) * adapter.scale).to_kind(Kind::Float);
            let norms = whole.square().sum_dim_intlist([1i64].as_slice(), false, Kind::Float).sqrt().detach();
            let stretch = (&dora.magnitude / norms - 1.0).to_kind(x.kind());
            return &y + &update + (x.linear(&layer.weight, None::<Tensor>) + update) * stretch;
        }
        match &adapter.bias {
            Some(bias) => y + update + bias * adapter.scale,
            None => y + update,
        }
    }
}
