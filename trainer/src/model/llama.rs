//! Llama 1-3.x and everything saved as `model_type: "llama"` (Touvron et al. 2023, arXiv 2302.13971; Llama 3 herd,
//! arXiv 2407.21783): pre-norm blocks, rotary positions, grouped key/value heads, SwiGLU.
//!
//! [`LlamaLayer`] also serves families that differ from Llama only in which projections have a bias.

use dyad_proto::Fault;
use dyad_torch::ops::layer::rms_norm_with_residual;
use tch::Tensor;

use dyad_families::ModelConfig;

use super::attention::Attention;
use super::layer::{DecoderLayer, Family, LayerOutput, LayerSource, Part};
use super::linear::Linear;
use super::mlp::Mlp;
use super::pass::Pass;

/// Which projections carry a bias.
#[derive(Clone, Copy, Debug)]
pub struct Biases {
    /// On q, k and v.
    pub qkv: bool,
    /// On the attention output.
    pub output: bool,
    /// On gate, up and down.
    pub mlp: bool,
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
pub struct LlamaLayer {
    input_layernorm: Tensor,
    self_attn: Attention,
    post_attention_layernorm: Tensor,
    mlp: Mlp,
    rms_norm_eps: f64,
}

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    tensor_names: |config| tensor_names(biases(config)),
    load_layer: |config, source| Ok(Box::new(LlamaLayer::load(config, source, biases(config))?)),
};

/// Llama's rule: `config.json` says which projections have a bias.
fn biases(config: &ModelConfig) -> Biases {
    Biases { qkv: config.attention_bias, output: config.attention_bias, mlp: config.mlp_bias }
}

/// Names of a layer's tensors below the layer.
#[must_use]
pub fn tensor_names(biases: Biases) -> Vec<String> {
    let projections = [
        ("self_attn.q_proj", biases.qkv),
        ("self_attn.k_proj", biases.qkv),
        ("self_attn.v_proj", biases.qkv),
        ("self_attn.o_proj", biases.output),
        ("mlp.gate_proj", biases.mlp),
        ("mlp.up_proj", biases.mlp),
        ("mlp.down_proj", biases.mlp),
    ];
    let mut names = vec!["input_layernorm.weight".to_owned(), "post_attention_layernorm.weight".to_owned()];
    for (name, has_bias) in projections {
        names.push(format!("{name}.weight"));
        names.extend(has_bias.then(|| format!("{name}.bias")));
    }
    names
}

impl LlamaLayer {
    /// Loads a layer with the given biases.
    pub fn load(config: &ModelConfig, source: &LayerSource<'_>, biases: Biases) -> Result<Self, Fault> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            input_layernorm: source.tensor("input_layernorm.weight", &[hidden])?,
            self_attn: Attention {
                q_proj: source.linear("self_attn.q_proj", queries, hidden, biases.qkv)?,
                k_proj: source.linear("self_attn.k_proj", keys, hidden, biases.qkv)?,
                v_proj: source.linear("self_attn.v_proj", keys, hidden, biases.qkv)?,
                o_proj: source.linear("self_attn.o_proj", hidden, queries, biases.output)?,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                span: config.spans.get(source.index).copied().unwrap_or_default(),
            },
            post_attention_layernorm: source.tensor("post_attention_layernorm.weight", &[hidden])?,
            mlp: Mlp {
                gate_proj: source.linear("mlp.gate_proj", inner, hidden, biases.mlp)?,
                up_proj: source.linear("mlp.up_proj", inner, hidden, biases.mlp)?,
                down_proj: source.linear("mlp.down_proj", hidden, inner, biases.mlp)?,
                activation: config.activation,
            },
            rms_norm_eps: config.rms_norm_eps,
        })
    }
}

impl DecoderLayer for LlamaLayer {
    fn forward(&self, hidden: &Tensor, pass: &Pass<'_>) -> LayerOutput {
        let (normed, hidden) = rms_norm_with_residual(hidden, &self.input_layernorm, self.rms_norm_eps);
        let hidden = self.self_attn.forward_onto(&hidden, &normed, pass);
        let (normed, hidden) =
            rms_norm_with_residual(&hidden, &self.post_attention_layernorm, self.rms_norm_eps);
        self.mlp.forward_onto(&hidden, &normed, pass).into()
    }

    fn parts(&mut self) -> Vec<(&'static str, Part<'_>)> {
        vec![
            ("input_layernorm", Part::Norm(&mut self.input_layernorm)),
            ("self_attn.q_proj", Part::Linear(&mut self.self_attn.q_proj)),
            ("self_attn.k_proj", Part::Linear(&mut self.self_attn.k_proj)),
            ("self_attn.v_proj", Part::Linear(&mut self.self_attn.v_proj)),
            ("self_attn.o_proj", Part::Linear(&mut self.self_attn.o_proj)),
            ("post_attention_layernorm", Part::Norm(&mut self.post_attention_layernorm)),
            ("mlp.gate_proj", Part::Linear(&mut self.mlp.gate_proj)),
            ("mlp.up_proj", Part::Linear(&mut self.mlp.up_proj)),
            ("mlp.down_proj", Part::Linear(&mut self.mlp.down_proj)),
        ]
    }

    fn share(&self) -> Box<dyn DecoderLayer> {
        let linear = Linear::share;
        let attention = &self.self_attn;
        Box::new(Self {
            input_layernorm: self.input_layernorm.shallow_clone(),
            self_attn: Attention {
                q_proj: linear(&attention.q_proj),
                k_proj: linear(&attention.k_proj),
                v_proj: linear(&attention.v_proj),
                o_proj: linear(&attention.o_proj),
                ..*attention
            },
            post_attention_layernorm: self.post_attention_layernorm.shallow_clone(),
            mlp: Mlp {
                gate_proj: linear(&self.mlp.gate_proj),
                up_proj: linear(&self.mlp.up_proj),
                down_proj: linear(&self.mlp.down_proj),
                activation: self.mlp.activation,
            },
            rms_norm_eps: self.rms_norm_eps,
        })
    }
}
