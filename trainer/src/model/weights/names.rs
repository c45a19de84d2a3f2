//! Names of a model's tensors in a Hugging Face folder.

/// Name of the embedding in a Hugging Face folder.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the final norm.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Name of the untied head.
pub const HEAD: &str = "lm_head.weight";
/// What PEFT puts before the names of the base's tensors.
pub const ADAPTER_PREFIX: &str = "base_model.model.";
/// Last part of the name of DoRA's magnitudes in an adapter.
pub const MAGNITUDE: &str = ".lora_magnitude_vector";
