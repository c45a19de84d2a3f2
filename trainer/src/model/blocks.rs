//! The parts that decoder families share: linear layers with an optional adapter, RMSNorm, rotary positions, attention
//! over packed segments, the gated MLP.
//!
//! Hidden states are packed: `[tokens, width]` with no batch axis and no padding; [`Segment`]s say which tokens see which.

use dyad_torch::ops::attention_kernel::kernel_on;
use dyad_torch::ops::flash_attention::Varlen;
use dyad_torch::ops::segment::Segment;
use dyad_torch::ops::{layer, product};
use tch::{Device, Kind, Tensor};

use dyad_families::{Activation, AttentionSpan, ModelConfig, RopeScaling};
use dyad_torch::backend::{Backend, on_gpu_path};
use dyad_torch::transfer::upload;

/// A low-rank update `scale * B(A(x))` beside a frozen linear layer (Hu et al. 2021, arXiv 2106.09685).
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

/// `y = x Wᵀ + b`, plus the adapter's update where there is one.
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

    /// Layers of one input: `[tokens, in]` -> `[tokens, out]` each.
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

    /// Whether the adapter sees another input than the layer.
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

/// What both kernels are held against: cast back before the weight is applied, as Llama does it.
#[cfg(test)]
fn composed_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let variance = wide.square().mean_dim(-1i64, true, Kind::Float);
    (wide * (variance + eps).rsqrt()).to_kind(x.kind()) * weight
}

/// Cosines and sines of one packed batch's positions, `[tokens, 1, head_dim]` each: made once a micro-batch, for every layer
/// of policy and reference.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
    /// Sines are negative in their first half, as [`layer::rotate_signed`] takes them: on GPUs.
    signed: bool,
}

impl Rotary {
    /// For the given positions, in the precision of the passes; frequencies are computed in float32 as transformers does.
    #[must_use]
    pub fn new(config: &ModelConfig, positions: &Tensor, kind: Kind) -> Self {
        let inv_freq = upload(&inverse_frequencies(config), positions.device());
        let half = positions.to_kind(Kind::Float).unsqueeze(1) * inv_freq.unsqueeze(0);
        let signed = on_gpu_path(positions.device());
        // Sines are odd, cosines even: angles turned round give the first half its sign.
        let first = if signed { -&half } else { half.shallow_clone() };
        let angles = Tensor::cat(&[&first, &half], 1).unsqueeze(1);
        Self { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind), signed }
    }

    /// Rotates `[tokens, heads, head_dim]`.
    fn apply(&self, x: &Tensor) -> Tensor {
        if !self.signed {
            return layer::rotate(x, &self.cos, &self.sin);
        }
        layer::rotate_signed(x, &self.cos, &self.sin)
    }

    #[cfg(test)]
    fn composed(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let rotated = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        x * &self.cos + rotated * &self.sin
    }
}

/// `theta^(-2i/d)` for each pair of dimensions, after scaling.
fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let half = config.head_dim / 2;
    (0..half)
        .map(|i| {
            let base = 1.0 / config.rope_theta.powf(2.0 * i as f64 / config.head_dim as f64);
            scaled(base, &config.rope_scaling) as f32
        })
        .collect()
}

fn scaled(inv_freq: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Default => inv_freq,
        RopeScaling::Linear { factor } => inv_freq / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let wavelength = 2.0 * std::f64::consts::PI / inv_freq;
            let original = original_max_position_embeddings;
            if wavelength < original / high_freq_factor {
                inv_freq
            } else if wavelength > original / low_freq_factor {
                inv_freq / factor
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
            }
        }
    }
}

/// What every layer of one pass needs beside its input.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Who sees whom.
    pub segments: &'a [Segment],
    /// The same as the variable-length kernels want it, where they serve.
    pub varlen: Option<&'a Varlen>,
    /// Rotary positions of the packed tokens.
    pub rotary: &'a Rotary,
    /// Dropout is on.
    pub training: bool,
}

/// Self-attention with rotary positions and grouped key/value heads.
#[derive(Debug)]
pub struct Attention {
    /// Query projection.
    pub q_proj: Linear,
    /// Key projection.
    pub k_proj: Linear,
    /// Value projection.
    pub v_proj: Linear,
    /// Output projection.
    pub o_proj: Linear,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Width of one head.
    pub head_dim: i64,
    /// Which tokens before it a token sees.
    pub span: AttentionSpan,
}

impl Attention {
    /// Attention of the normed `x`, added to what it was normed from: `[tokens, hidden]` throughout.
    pub fn forward_onto(&self, hidden: &Tensor, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let split = |projected: Tensor, heads: i64| projected.view([-1, heads, self.head_dim]);
        let [q, k, v] = Linear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], x, pass);
        let q = pass.rotary.apply(&split(q, self.heads));
        let k = pass.rotary.apply(&split(k, self.kv_heads));
        let v = split(v, self.kv_heads);
        let context = segmented_attention(&q, &k, &v, pass, self.span);
        self.o_proj.forward_onto(hidden, &context.reshape([-1, self.heads * self.head_dim]), pass)
    }
}

/// Causal attention inside each segment: the first branch follows the prompt; every further branch sees the prompt and
/// itself, not its siblings. `[tokens, heads, head_dim]` throughout.
fn segmented_attention(q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass<'_>, span: AttentionSpan) -> Tensor {
    // A window that is as long as the longest sequence hides nothing, and the kernels serve.
    if let AttentionSpan::Window(window) = span
        && pass.segments.iter().any(|segment| segment.longest() > window)
    {
        return composed_attention(q, k, v, pass.segments, Some(window));
    }
    if Backend::of(&[q, k, v], 1) == Backend::Cpu {
        return layer::segmented_attention(q, k, v, pass.segments);
    }
    let kernel = || kernel_on(q.device(), q.kind(), q.size()[2]);
    let in_one_call = pass.varlen.and_then(|varlen| varlen.attention(q, k, v, kernel()));
    in_one_call.unwrap_or_else(|| composed_attention(q, k, v, pass.segments, None))
}

/// The same segment by segment: what every kernel is held against, and what serves where none does. With a window, a token sees the last
/// so many tokens by position, itself included.
pub fn composed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    window: Option<i64>,
) -> Tensor {
    let mut outputs = Vec::with_capacity(2 * segments.len());
    for segment in segments {
        let trunk = segment.prompt + segment.branches.first().copied().unwrap_or(0);
        let take = |x: &Tensor, start: i64, len: i64| x.narrow(0, segment.start + start, len);
        let windowed = window.filter(|window| *window < trunk).map(|_| {
            let mask = Mask { before: 0, len: trunk, window };
            mask.tensor(q.kind(), q.device())
        });
        outputs.push(attend(&take(q, 0, trunk), &take(k, 0, trunk), &take(v, 0, trunk), windowed.as_ref()));
        let mut start = trunk;
        for &len in segment.branches.iter().skip(1) {
            let seen = |x: &Tensor| Tensor::cat(&[take(x, 0, segment.prompt), take(x, start, len)], 0);
            let mask = Mask { before: segment.prompt, len, window }.tensor(q.kind(), q.device());
            outputs.push(attend(&take(q, start, len), &seen(k), &seen(v), Some(&mask)));
            start += len;
        }
    }
    Tensor::cat(&outputs, 0)
}

/// Who sees whom among `before` keys, then as many keys as there are queries.
#[derive(Clone, Copy, Debug)]
struct Mask {
    before: i64,
    len: i64,
    window: Option<i64>,
}

impl Mask {
    /// 0 where query i may see key j, which is at position j as query i is at `before + i`; -inf elsewhere: `[len, before + len]`.
    fn tensor(self, kind: Kind, device: Device) -> Tensor {
        let hidden =
            |kind| Tensor::full([self.len, self.before + self.len], f64::NEG_INFINITY, (kind, device));
        let later = hidden(kind).triu(self.before + 1);
        match self.window {
            // Either is -inf or 0: their sum is, too.
            Some(window) => later + hidden(kind).tril(self.before - window),
            None => later,
        }
    }
}

/// Softmax attention of one segment, causal unless a mask is given.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let heads_first = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    let groups = q.size()[1] / k.size()[1];
    let widen = |x: &Tensor| {
        if groups == 1 { x.shallow_clone() } else { x.repeat_interleave_self_int(groups, 1, None) }
    };
    let (q, k, v) = (heads_first(q), heads_first(&widen(k)), heads_first(&widen(v)));
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, mask.is_none(), None, false)
        .squeeze_dim(0)
        .transpose(0, 1)
}

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Mlp {
    /// Gate projection.
    pub gate_proj: Linear,
    /// Up projection.
    pub up_proj: Linear,
    /// Down projection.
    pub down_proj: Linear,
    /// What the gate goes through.
    pub activation: Activation,
}

/// `activation(gate) * up`; only SwiGLU is one kernel.
fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => layer::swiglu(gate, up),
        Activation::Gelu => gate.gelu("none") * up,
        Activation::GeluTanh => gate.gelu("tanh") * up,
        Activation::Relu => gate.relu() * up,
    }
}

impl Mlp {
    /// The MLP of the normed `x`, added to what it was normed from: `[tokens, hidden]` throughout.
    pub fn forward_onto(&self, hidden: &Tensor, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let [gate, up] = Linear::forward_all([&self.gate_proj, &self.up_proj], x, pass);
        self.down_proj.forward_onto(hidden, &gated(self.activation, &gate, &up), pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dyad_torch::autograd::grad;

    fn leaf(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
    }

    /// Largest difference, relative to the largest value.
    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        ((&a - &b).abs().max() / b.abs().max()).double_value(&[])
    }

    /// A fused kernel and its composition give the same values and gradients: to rounding in float32, to a few units in the
    /// last of bfloat16's eight bits there.
    fn agree(inputs: &[Tensor], fused: impl Fn() -> Tensor, composed: impl Fn() -> Tensor) {
        let tolerance = if inputs[0].kind() == Kind::Float { 2e-6 } else { 2e-2 };
        let (ours, theirs) = (fused(), composed());
        assert_eq!((ours.kind(), ours.size()), (theirs.kind(), theirs.size()));
        assert!(difference(&ours, &theirs) < tolerance, "values differ by {}", difference(&ours, &theirs));
        let output_grad = Tensor::randn_like(&ours);
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let ours = grad(&[&ours], &[&output_grad], &inputs).unwrap();
        let theirs = grad(&[&theirs], &[&output_grad], &inputs).unwrap();
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let worst = difference(ours.as_ref().unwrap(), theirs.as_ref().unwrap());
            assert!(worst < tolerance, "gradient {index} differs by {worst}");
        }
    }

    const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

    #[test]
    fn fused_rms_norm_equals_its_composition() {
        tch::manual_seed(1);
        for (kind, columns) in KINDS.into_iter().flat_map(|kind| [(kind, 7), (kind, 64), (kind, 100)]) {
            let inputs = [leaf(&[37, columns], kind), leaf(&[columns], kind)];
            let [x, weight] = &inputs;
            agree(&inputs, || layer::rms_norm(x, weight, 1e-5), || composed_rms_norm(x, weight, 1e-5));
            let beside = || {
                let (normed, x) = layer::rms_norm_with_residual(x, weight, 1e-5);
                normed * 3 + x
            };
            agree(&inputs, beside, || composed_rms_norm(x, weight, 1e-5) * 3 + x);
        }
    }

    #[test]
    fn fused_rotation_equals_its_composition() {
        tch::manual_seed(2);
        for kind in KINDS {
            let angles = Tensor::randn([19, 6], (Kind::Float, Device::Cpu));
            let angles = Tensor::cat(&[&angles, &angles], 1).unsqueeze(1);
            let (cos, sin) = (angles.cos().to_kind(kind), angles.sin().to_kind(kind));
            let rotary = Rotary { cos, sin, signed: false };
            let inputs = [leaf(&[19, 3, 12], kind)];
            agree(&inputs, || rotary.apply(&inputs[0]), || rotary.composed(&inputs[0]));
        }
    }

    #[test]
    fn fused_swiglu_equals_its_composition() {
        tch::manual_seed(3);
        for kind in KINDS {
            let inputs = [leaf(&[23, 41], kind), leaf(&[23, 41], kind)];
            let [gate, up] = &inputs;
            agree(&inputs, || layer::swiglu(gate, up), || gate.silu() * up);
        }
        // Far out, where the exponential would overflow.
        let far = Tensor::from_slice(&[-200.0f32, -90.0, 90.0, 200.0, f32::NAN]);
        let values: Vec<f32> = layer::swiglu(&far, &far.ones_like()).try_into().unwrap();
        assert!(values[0].abs() < 1e-30 && values[1].abs() < 1e-30 && values[2..4] == [90.0, 200.0]);
        assert!(values[4].is_nan());
    }

    /// With and without an adapter or a bias: one node that adds in its products, against the composition of libtorch's operators.
    #[test]
    fn fused_layers_of_one_input_equal_their_composition() {
        tch::manual_seed(8);
        let segments = [];
        let angles = Tensor::zeros([1, 1, 2], (Kind::Float, Device::Cpu));
        let rotary = Rotary { cos: angles.cos(), sin: angles.sin(), signed: false };
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

    #[test]
    fn a_query_that_is_no_number_is_not_hidden() {
        let segments = [Segment { start: 0, prompt: 60, branches: [10, 20].into() }];
        for (kind, none) in KINDS.into_iter().flat_map(|kind| [(kind, f64::NAN), (kind, -f64::NAN)]) {
            let tensor = || Tensor::randn([90, 2, 16], (Kind::Float, Device::Cpu)).to_kind(kind);
            let (q, k, v) = (tensor(), tensor(), tensor());
            let _ = q.narrow(0, 65, 1).fill_(none);
            let out =
                layer::segmented_attention(&q, &k, &v, &segments).flatten(1, -1).isnan().any_dim(1, false);
            let rows: Vec<i64> = out.nonzero().view([-1]).try_into().unwrap();
            assert_eq!(rows, [65], "{kind:?}");
        }
    }

    /// One, two and three branches, no prompt, no branch, an empty branch, several tiles; keys shared by groups of queries; heads that fill no
    /// panel, and more than one.
    #[test]
    fn fused_attention_equals_its_composition() {
        tch::manual_seed(4);
        let segment = |start, prompt, branches: &[i64]| Segment { start, prompt, branches: branches.into() };
        let segments = [
            segment(0, 40, &[7, 50]),
            segment(97, 5, &[1]),
            segment(103, 3, &[2, 1, 4]),
            segment(113, 0, &[3, 2]),
            segment(118, 6, &[]),
            segment(124, 130, &[70, 100]),
            segment(424, 4, &[0, 3]),
            segment(431, 4, &[3, 0]),
        ];
        let heads = [(4, 16), (2, 16), (1, 16), (2, 7), (4, 80), (2, 128)];
        for (kind, (kv_heads, width)) in KINDS.into_iter().flat_map(|kind| heads.map(|heads| (kind, heads))) {
            let inputs = [
                leaf(&[438, 4, width], kind),
                leaf(&[438, kv_heads, width], kind),
                leaf(&[438, kv_heads, width], kind),
            ];
            let [q, k, v] = &inputs;
            agree(
                &inputs,
                || layer::segmented_attention(q, k, v, &segments),
                || composed_attention(q, k, v, &segments, None),
            );
        }
    }

    /// Position by position: what a window hides, in shared prompts too.
    #[test]
    fn a_window_hides_what_is_too_far_by_position() {
        let segments = [
            Segment { start: 0, prompt: 5, branches: vec![4, 3] },
            Segment { start: 12, prompt: 2, branches: vec![6] },
        ];
        let options = (Kind::Double, Device::Cpu);
        let [q, k, v] = [2, 1, 1].map(|heads| Tensor::randn([20, heads, 4], options));
        // Position of each token, and the branch that it is in; prompts are in none.
        let mut places: Vec<(usize, i64, Option<usize>)> = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            places.extend((0..segment.prompt).map(|position| (index, position, None)));
            for (branch, &len) in segment.branches.iter().enumerate() {
                places.extend((0..len).map(|offset| (index, segment.prompt + offset, Some(branch))));
            }
        }
        for window in [1, 3, 6, 100] {
            let sees = |query: usize, key: usize| {
                let ((a, at, branch), (b, before, other)) = (places[query], places[key]);
                let together = a == b && (other.is_none() || other == branch);
                together && before <= at && at - before < window
            };
            let mask: Vec<f64> = (0..400)
                .map(|index| if sees(index / 20, index % 20) { 0.0 } else { f64::NEG_INFINITY })
                .collect();
            let mask = Tensor::from_slice(&mask).view([20, 20]);
            let expected = attend(&q, &k, &v, Some(&mask));
            let found = composed_attention(&q, &k, &v, &segments, Some(window));
            assert!(difference(&found, &expected) < 1e-12, "window {window}");
        }
    }

    #[test]
    fn activations_are_those_of_their_definitions() {
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
