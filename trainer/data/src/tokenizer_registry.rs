//! Which tokenizer class transformers 5.23 registers for a model family (`TOKENIZER_MAPPING_NAMES` without the package mistral-common).
//! Families that are not listed have no registered class: what tokenizer_config.json declares counts.

/// The class that takes tokenizer.json as it is.
pub(crate) const BACKEND: &str = "TokenizersBackend";

/// Class and families (`model_type` of config.json), of models that write text.
pub(crate) const REGISTERED: &[(&str, &[&str])] = &[
    (
        BACKEND,
        &[
            "flex_olmo",
            "glm",
            "glm4",
            "glm4_moe",
            "glm4_moe_lite",
            "gpt_bigcode",
            "granite",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "internlm3",
            "jamba",
            "kimi_linear",
            "mimo_v2_flash",
            "minimax_m2",
            "ministral",
            "ministral3",
            "mistral",
            "mistral3",
            "mistral_large4",
            "mixtral",
            "nemotron",
            "olmo2",
            "olmo3",
            "olmo_hybrid",
            "persimmon",
            "phi3",
            "phimoe",
            "stablelm",
        ],
    ),
    ("CohereTokenizer", &["cohere", "cohere2"]),
    ("GPT2Tokenizer", &["codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "jais2", "opt", "phi", "starcoder2"]),
    (
        "GPTNeoXTokenizer",
        &["falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv", "xlstm"],
    ),
    (
        "GemmaTokenizer",
        &["gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma"],
    ),
    ("Qwen2Tokenizer", &["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"]),
    ("Qwen3_5Tokenizer", &["qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"]),
];

/// Families whose files declare wrong classes, so that the registered class counts (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`).
pub(crate) const OVERRIDES: &[&str] = &[
    "internlm3",
    "jamba",
    "minimax_m2",
    "nemotron",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
];

/// Families whose tokenizers transformers would rather build with mistral-common.
pub(crate) const MISTRAL: &[&str] =
    &["ministral", "ministral3", "mistral", "mistral3", "mistral_large4", "mixtral"];

/// What transformers knows about the tokenizers of a model family.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Family {
    pub(crate) registered: Option<&'static str>,
    /// Whether the registered class replaces every declared class.
    pub(crate) overrides: bool,
    pub(crate) is_mistral: bool,
}

impl Family {
    pub(crate) fn of(model_type: &str) -> Self {
        let registered = REGISTERED.iter().find(|(_, families)| families.contains(&model_type));
        Self {
            registered: registered.map(|(class, _)| *class),
            overrides: OVERRIDES.contains(&model_type),
            is_mistral: MISTRAL.contains(&model_type),
        }
    }
}
