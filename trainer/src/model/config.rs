//! `config.json` of a Hugging Face model: the fields that change the mathematics.

use std::path::Path;

use dyad_proto::Fault;
use serde::Deserialize;
use serde_json::Value;

/// How positions turn into rotation frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `inv_freq[i] = theta^(-2i/d)`.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by a factor, short ones kept, a blend between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
}

/// Shape of a decoder-only language model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`, which names the family.
    pub model_type: String,
    /// Rows of the embedding and of the LM head.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads.
    pub num_key_value_heads: i64,
    /// Width of one head; not always `hidden_size / num_attention_heads`.
    pub head_dim: i64,
    /// Added to the variance in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotation frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotation frequencies.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: i64,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on the attention projections (Llama's switch; Qwen2 has its own rule).
    pub attention_bias: bool,
    /// Biases on the MLP projections.
    pub mlp_bias: bool,
    /// Precision that the weights are stored in, e.g. `bfloat16`.
    pub torch_dtype: String,
}

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    hidden_act: Option<String>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    max_position_embeddings: i64,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Fault::input(format!("cannot read {}: {error}", path.display()))
                .hint("`model` must name a Hugging Face model folder with config.json, or a hub id")
        })?;
        Self::parse(&text)
            .map_err(|fault| Fault { message: format!("{}: {}", path.display(), fault.message), ..fault })
    }

    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let raw: Raw = serde_json::from_str(text).map_err(|error| Fault::input(error.to_string()))?;
        if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Fault::input(format!("hidden_act \"{act}\" is not supported (expected \"silu\")")));
        }
        if raw.use_sliding_window == Some(true) {
            return Err(Fault::input("use_sliding_window = true is not supported")
                .hint("set it to false if your sequences are shorter than the window"));
        }
        // New-style `rope_parameters` holds theta and scaling in one object; old-style files split them.
        let rope =
            raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).filter(|value| !value.is_null());
        let theta = rope.and_then(|value| value.get("rope_theta")).and_then(Value::as_f64).or(raw.rope_theta);
        Ok(Self {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1)),
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: rope.map_or(Ok(RopeScaling::Default), rope_scaling)?,
            max_position_embeddings: raw.max_position_embeddings,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            attention_bias: raw.attention_bias.unwrap_or(false),
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            torch_dtype: raw.dtype.or(raw.torch_dtype).unwrap_or_else(|| "float32".into()),
            model_type: raw.model_type,
        })
    }
}

fn rope_scaling(value: &Value) -> Result<RopeScaling, Fault> {
    let kind =
        value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str).unwrap_or("default");
    let number = |key: &str| {
        value
            .get(key)
            .and_then(Value::as_f64)
            .ok_or_else(|| Fault::input(format!("rope scaling \"{kind}\": no number `{key}`")))
    };
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")?,
        }),
        other => Err(Fault::input(format!("rope scaling \"{other}\" is not supported"))
            .hint("supported: default, linear, llama3")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type":"llama","vocab_size":512,"hidden_size":64,"intermediate_size":128,
        "num_hidden_layers":2,"num_attention_heads":4,"rms_norm_eps":1e-5,"max_position_embeddings":256,"hidden_act":"silu"}"#;

    #[test]
    fn absent_fields_take_transformers_defaults() {
        let config = ModelConfig::parse(LLAMA).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.rope_theta), (4, 16, 10_000.0));
        assert!(!config.tie_word_embeddings);
        assert_eq!(config.torch_dtype, "float32");
    }

    #[test]
    fn both_spellings_of_llama3_rope_mean_the_same() {
        let parameters = r#""rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64"#;
        let tail = |extra: &str| format!("{},{extra}}}", LLAMA.trim_end_matches('}'));
        let new = tail(&format!(r#""rope_parameters":{{{parameters},"rope_theta":500000.0}}"#));
        let old = tail(&format!(r#""rope_scaling":{{{parameters}}},"rope_theta":500000.0"#));
        assert_eq!(ModelConfig::parse(&new).unwrap(), ModelConfig::parse(&old).unwrap());
    }

    #[test]
    fn what_is_not_supported_says_so() {
        let yarn =
            LLAMA.replace("\"hidden_act\"", "\"rope_scaling\":{\"rope_type\":\"yarn\"},\"hidden_act\"");
        assert_eq!(ModelConfig::parse(&yarn).unwrap_err().message, "rope scaling \"yarn\" is not supported");
        let gelu = LLAMA.replace("silu", "gelu");
        assert!(ModelConfig::parse(&gelu).unwrap_err().message.contains("hidden_act \"gelu\""));
        assert!(ModelConfig::parse("{}").unwrap_err().message.contains("model_type"));
    }
}
