//! Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's block, always with biases on q, k and v, whatever config.json says. Upper layers may
//! attend within a window.

use super::layer::Family;
use super::llama::{Biases, LlamaLayer, tensor_names};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    tensor_names: |_| tensor_names(BIASES),
    load_layer: |config, source| Ok(Box::new(LlamaLayer::load(config, source, BIASES)?)),
};

/// Qwen2's rule for biases.
const BIASES: Biases = Biases { qkv: true, output: false, mlp: false };
