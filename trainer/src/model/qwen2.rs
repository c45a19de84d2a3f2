//! Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's block with biases on q, k and v, always, whatever config.json says.

use dyad_proto::Fault;

use super::llama::{Biases, LlamaLayer};
use super::{DecoderLayer, LayerSource, ModelConfig};

/// Qwen2's rule.
pub const BIASES: Biases = Biases { qkv: true, output: false, mlp: false };

/// Loads a layer by Qwen2's rules.
pub fn load_layer(config: &ModelConfig, source: &LayerSource<'_>) -> Result<Box<dyn DecoderLayer>, Fault> {
    Ok(Box::new(LlamaLayer::load(config, source, BIASES)?))
}
