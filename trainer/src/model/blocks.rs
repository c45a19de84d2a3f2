//! The parts that decoder families share: linear layers with an optional adapter, RMSNorm, rotary positions, attention
//! over packed segments, the gated MLP.
//!
//! Hidden states are packed: `[tokens, width]` with no batch axis and no padding; [`Segment`]s say which tokens see which.

use tch::{Device, Kind, Tensor};

use super::config::{ModelConfig, RopeScaling};
use crate::batch::Segment;

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
        let y = x.linear(&self.weight, self.bias.as_ref());
        let Some(adapter) = &self.adapter else { return y };
        let low_rank = match pass.training && adapter.dropout > 0.0 {
            true => x.dropout(adapter.dropout, true).linear::<Tensor>(&adapter.a, None),
            false => x.linear::<Tensor>(&adapter.a, None),
        };
        y + low_rank.linear::<Tensor>(&adapter.b, None) * adapter.scale
    }
}

/// `x / sqrt(mean(x²) + eps)`, computed in float32 and cast back before the weight is applied, as Llama does it.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let variance = wide.square().mean_dim(-1i64, true, Kind::Float);
    (wide * (variance + eps).rsqrt()).to_kind(x.kind()) * weight
}

/// Cosines and sines of one packed batch's positions, `[tokens, 1, head_dim]` each.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// For the given positions, in the precision of the passes; frequencies are computed in float32 as transformers does.
    #[must_use]
    pub fn new(config: &ModelConfig, positions: &Tensor, kind: Kind) -> Self {
        let inv_freq = Tensor::from_slice(&inverse_frequencies(config)).to_device(positions.device());
        let angles = positions.to_kind(Kind::Float).unsqueeze(1) * inv_freq.unsqueeze(0);
        let angles = Tensor::cat(&[&angles, &angles], 1).unsqueeze(1);
        Self { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind) }
    }

    /// Rotates `[tokens, heads, head_dim]`.
    fn apply(&self, x: &Tensor) -> Tensor {
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
}

impl Attention {
    /// `[tokens, hidden]` -> `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let split = |projected: Tensor, heads: i64| projected.view([-1, heads, self.head_dim]);
        let q = pass.rotary.apply(&split(self.q_proj.forward(x, pass), self.heads));
        let k = pass.rotary.apply(&split(self.k_proj.forward(x, pass), self.kv_heads));
        let v = split(self.v_proj.forward(x, pass), self.kv_heads);
        let context = segmented_attention(&q, &k, &v, pass.segments);
        self.o_proj.forward(&context.reshape([-1, self.heads * self.head_dim]), pass)
    }
}

/// Causal attention inside each segment: the first branch follows the prompt; every further branch sees the prompt and
/// itself, not its siblings. `[tokens, heads, head_dim]` throughout.
fn segmented_attention(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[Segment]) -> Tensor {
    let mut outputs = Vec::with_capacity(2 * segments.len());
    for segment in segments {
        let trunk = segment.prompt + segment.branches.first().copied().unwrap_or(0);
        let take = |x: &Tensor, start: i64, len: i64| x.narrow(0, segment.start + start, len);
        outputs.push(attend(&take(q, 0, trunk), &take(k, 0, trunk), &take(v, 0, trunk), None));
        let mut start = trunk;
        for &len in segment.branches.iter().skip(1) {
            let seen = |x: &Tensor| Tensor::cat(&[take(x, 0, segment.prompt), take(x, start, len)], 0);
            let mask = branch_mask(segment.prompt, len, q.kind(), q.device());
            outputs.push(attend(&take(q, start, len), &seen(k), &seen(v), Some(&mask)));
            start += len;
        }
    }
    Tensor::cat(&outputs, 0)
}

/// 0 where query i may see key j (all of the prompt, its own prefix), -inf elsewhere: `[len, prompt + len]`.
fn branch_mask(prompt: i64, len: i64, kind: Kind, device: Device) -> Tensor {
    Tensor::full([len, prompt + len], f64::NEG_INFINITY, (kind, device)).triu(prompt + 1)
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

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub struct Mlp {
    /// Gate projection.
    pub gate_proj: Linear,
    /// Up projection.
    pub up_proj: Linear,
    /// Down projection.
    pub down_proj: Linear,
}

impl Mlp {
    /// `[tokens, hidden]` -> `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let gated = self.gate_proj.forward(x, pass).silu() * self.up_proj.forward(x, pass);
        self.down_proj.forward(&gated, pass)
    }
}
