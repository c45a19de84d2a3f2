//! Families of models. Reads the fields of a Hugging Face model's `config.json` that change its mathematics, as transformers does, and
//! counts weights, operations and memory of a model ([`shape`]). Trainer and launcher share this crate; it does not use libtorch.
//!
//! - FAM-C1: a field that changes the computation is supported, or refused by name with its value.

mod fields;
mod layer;
mod refused;
mod report;
mod rope;
pub mod shape;

use std::path::Path;

use dyad_proto::{Fault, counted, lfs};
use serde::{Deserialize, Serialize};

use self::fields::Fields;
pub use self::layer::{Activation, AttentionSpan};
pub use self::report::{FirstPairs, ModelFindings};
pub use self::rope::RopeScaling;

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
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on the attention projections (Llama's switch; Qwen2 has its own rule).
    pub attention_bias: bool,
    /// Biases on the MLP projections.
    pub mlp_bias: bool,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Attention span of each layer.
    pub spans: Vec<AttentionSpan>,
    /// Dropout of attention weights that transformers applies when it trains.
    pub attention_dropout: f64,
    /// Precision that the weights are stored in, e.g. `bfloat16`.
    pub torch_dtype: String,
    /// Warnings, such as fields that transformers ignores; print them once.
    pub warnings: Vec<String>,
}

/// Sizes that determine memory and speed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Sizes {
    /// `model_type`, which names the family.
    pub model_type: String,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Width of all query heads together.
    pub query: i64,
    /// Width of all key heads together; values have the same width.
    pub key: i64,
    /// Width inside the MLP.
    pub ffn: i64,
    /// Rows of the embedding.
    pub vocab: i64,
    /// Whether embedding and head are one matrix.
    pub tied: bool,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: i64,
}

impl From<&ModelConfig> for Sizes {
    fn from(config: &ModelConfig) -> Self {
        Self {
            model_type: config.model_type.clone(),
            layers: config.num_hidden_layers,
            hidden: config.hidden_size,
            query: config.num_attention_heads * config.head_dim,
            key: config.num_key_value_heads * config.head_dim,
            ffn: config.intermediate_size,
            vocab: config.vocab_size,
            tied: config.tie_word_embeddings,
            max_position_embeddings: config.max_position_embeddings,
        }
    }
}

/// Values of a family for fields that `config.json` omits: the defaults of its class in transformers.
struct FamilyDefaults {
    name: &'static str,
    vocab_size: i64,
    intermediate_size: i64,
    /// `None`: as many as query heads.
    num_key_value_heads: Option<i64>,
    max_position_embeddings: i64,
    /// Whether the number of heads must divide `hidden_size`.
    divides: bool,
    /// Whether its class in transformers has attention windows.
    windows: bool,
}

const FAMILIES: &[FamilyDefaults] = &[
    FamilyDefaults {
        name: "llama",
        vocab_size: 32_000,
        intermediate_size: 11_008,
        num_key_value_heads: None,
        max_position_embeddings: 2_048,
        divides: true,
        windows: false,
    },
    FamilyDefaults {
        name: "qwen2",
        vocab_size: 151_936,
        intermediate_size: 22_016,
        num_key_value_heads: Some(32),
        max_position_embeddings: 32_768,
        divides: false,
        windows: true,
    },
];
/// Every supported `model_type`.
#[must_use]
pub fn names() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.name).collect()
}

/// Defaults of both families.
const HIDDEN_SIZE: i64 = 4_096;
const LAYERS: i64 = 32;
const MOST_LAYERS: i64 = 10_000;
const HEADS: i64 = 32;
const RMS_NORM_EPS: f64 = 1e-6;

/// Precisions that weights can be stored in.
const DTYPES: [&str; 4] = ["float32", "float16", "bfloat16", "float64"];

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join("config.json");
        let text = dyad_proto::files::read_to_string(&path).map_err(|error| {
            let hint = dyad_proto::run_folder::model_hint(dir).unwrap_or_else(|| {
                "`model` must name a Hugging Face model folder with config.json, or a hub id".into()
            });
            Fault::input(format!("cannot read {}: {error}", path.display())).hint(hint)
        })?;
        lfs::refuse_pointer(&path, text.as_bytes())?;
        Self::parse(&text)
            .map_err(|fault| Fault { message: format!("{}: {}", path.display(), fault.message), ..fault })
    }

    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let json = serde_json::from_str(text).map_err(|error| {
            Fault::input(error.to_string())
                .hint("expected the JSON object that transformers' save_pretrained writes")
        })?;
        let fields = Fields(&json);
        let family = family(fields)?;
        let mut warnings = refused::check(fields, family.name, family.windows)?;
        let hidden_size = fields.size("hidden_size", HIDDEN_SIZE)?;
        let heads = fields.size("num_attention_heads", HEADS)?;
        let max_position_embeddings =
            fields.size("max_position_embeddings", family.max_position_embeddings)?;
        let rope = rope::read(fields, max_position_embeddings, &mut warnings)?;
        let spans = spans(fields, family, layers(fields)?)?;
        warnings.extend(slower(&spans));
        let config = Self {
            vocab_size: fields.size("vocab_size", family.vocab_size)?,
            intermediate_size: fields.size("intermediate_size", family.intermediate_size)?,
            num_hidden_layers: layers(fields)?,
            num_key_value_heads: kv_heads(fields, family, heads)?,
            head_dim: fields.size("head_dim", hidden_size / heads)?,
            rms_norm_eps: fields.part("rms_norm_eps", RMS_NORM_EPS)?,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            activation: fields.0.get("hidden_act").map_or(Ok(Activation::Silu), Activation::parse)?,
            spans,
            attention_dropout: fields.part("attention_dropout", 0.0)?,
            torch_dtype: dtype(fields)?,
            model_type: family.name.to_owned(),
            num_attention_heads: heads,
            hidden_size,
            max_position_embeddings,
            warnings,
        };
        check_heads(&config, family)?;
        Ok(config)
    }
}

impl ModelConfig {
    /// Fails if the model has attention dropout: transformers applies it in training, but the kernels here cannot.
    pub fn refuse_dropout(&self) -> Result<(), Fault> {
        if self.attention_dropout == 0.0 {
            return Ok(());
        }
        Err(Fault::input(format!(
            "attention_dropout = {} is not supported in training",
            self.attention_dropout
        ))
        .hint("set attention_dropout to 0 in the model's config.json"))
    }
}

fn family(fields: Fields<'_>) -> Result<&'static FamilyDefaults, Fault> {
    let name = fields.text("model_type")?.ok_or_else(|| {
        Fault::input("no `model_type`").hint("expected the config.json of a Hugging Face language model")
    })?;
    FAMILIES.iter().find(|family| family.name == name).ok_or_else(|| {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        Fault::input(format!("model_type \"{name}\" is not supported"))
            .hint(format!("supported: {}", names.join(", ")))
    })
}

fn layers(fields: Fields<'_>) -> Result<usize, Fault> {
    let layers = fields.size("num_hidden_layers", LAYERS)?;
    if layers > MOST_LAYERS {
        return Err(Fault::input(format!("num_hidden_layers = {layers}: expected at most {MOST_LAYERS}"))
            .hint("config.json is damaged, or not of this model"));
    }
    Ok(layers as usize)
}

/// A null means as many as query heads in every family; an absent field means the family's default.
fn kv_heads(fields: Fields<'_>, family: &FamilyDefaults, heads: i64) -> Result<i64, Fault> {
    let absent = family.num_key_value_heads.filter(|_| !fields.mentions("num_key_value_heads"));
    fields.size("num_key_value_heads", absent.unwrap_or(heads))
}

fn check_heads(config: &ModelConfig, family: &FamilyDefaults) -> Result<(), Fault> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let wrong = if heads % kv_heads != 0 {
        format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    } else if family.divides && config.hidden_size % heads != 0 {
        format!("hidden_size {} is not a multiple of num_attention_heads {heads}", config.hidden_size)
    } else if config.head_dim % 2 != 0 {
        format!("head_dim {} is odd; rotary positions need pairs", config.head_dim)
    } else {
        return Ok(());
    };
    Err(Fault::input(wrong).hint("config.json is damaged, or not of this model"))
}

/// Attention span of each layer. In Qwen2, windows are set per layer or from a layer on. In transformers, llama has no windows and ignores
/// the field; a warning names it.
fn spans(fields: Fields<'_>, family: &FamilyDefaults, layers: usize) -> Result<Vec<AttentionSpan>, Fault> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    let refused = |what: String, hint: &str| Fault::input(what).hint(hint);
    let window = match fields.flag("use_sliding_window")? && family.windows {
        true if !fields.is_null("sliding_window") => Some(fields.size("sliding_window", 4096)?),
        _ => None,
    };
    let Some(types) = fields.list("layer_types")? else {
        let begin = fields.integer("max_window_layers")?.unwrap_or(28);
        let span = |layer: usize| match window {
            Some(window) if layer as i64 >= begin => AttentionSpan::Window(window),
            _ => AttentionSpan::Full,
        };
        return Ok((0..layers).map(span).collect());
    };
    if types.len() != layers {
        return Err(refused(
            format!("layer_types names {}, num_hidden_layers {layers}", counted(types.len(), "layer")),
            "config.json is damaged, or not of this model",
        ));
    }
    let span = |kind: &serde_json::Value| match (kind.as_str(), window) {
        (Some(FULL), _) => Ok(AttentionSpan::Full),
        (Some(SLIDING), Some(window)) => Ok(AttentionSpan::Window(window)),
        (Some(SLIDING), None) => Err(refused(
            format!("layer_types {kind}, but {} has no window here", family.name),
            "qwen2 takes one from sliding_window, with use_sliding_window = true; llama has none in transformers",
        )),
        _ => Err(refused(
            format!("layer_types {kind} is not supported"),
            "supported: full_attention, and sliding_attention in qwen2",
        )),
    };
    types.iter().map(span).collect()
}

/// Warns about attention windows: a sequence longer than its window gets no fused kernel, but a mask of length × length.
fn slower(spans: &[AttentionSpan]) -> Option<String> {
    let windows = spans.iter().filter_map(|span| match span {
        AttentionSpan::Window(window) => Some(*window),
        AttentionSpan::Full => None,
    });
    windows.min().map(|window| {
        format!(
            "config.json: layers with attention windows (sliding_window = {window}) are exact, but slower and larger in memory \
             than full attention for sequences longer than that"
        )
    })
}

fn dtype(fields: Fields<'_>) -> Result<String, Fault> {
    let name = match fields.text("dtype")? {
        Some(name) => Some(name),
        None => fields.text("torch_dtype")?,
    };
    match name {
        None => Ok(DTYPES[0].to_owned()),
        Some(name) if DTYPES.contains(&name.as_str()) => Ok(name),
        Some(name) => Err(Fault::input(format!("dtype \"{name}\" is not supported"))
            .hint(format!("config.json must name one of {}", DTYPES.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type":"llama","vocab_size":512,"hidden_size":64,"intermediate_size":128,
        "num_hidden_layers":2,"num_attention_heads":4,"rms_norm_eps":1e-5,"max_position_embeddings":256,"hidden_act":"silu"}"#;

    /// Parses `LLAMA` with more fields; a later field overrides an earlier one.
    fn with(extra: &str) -> Result<ModelConfig, Fault> {
        ModelConfig::parse(&format!("{},{extra}}}", LLAMA.trim_end_matches('}')))
    }

    fn refused(extra: &str) -> String {
        let fault = with(extra).unwrap_err();
        assert!(!fault.hint.is_empty(), "{fault}");
        fault.message
    }

    #[test]
    fn absent_fields_take_transformers_defaults() {
        let config = ModelConfig::parse(LLAMA).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.rope_theta), (4, 16, 10_000.0));
        assert!(!config.tie_word_embeddings && config.warnings.is_empty());
        assert_eq!(config.torch_dtype, "float32");
        let bare = ModelConfig::parse(r#"{"model_type":"llama"}"#).unwrap();
        assert_eq!((bare.rms_norm_eps, bare.max_position_embeddings, bare.vocab_size), (1e-6, 2048, 32_000));
        let bare = ModelConfig::parse(r#"{"model_type":"qwen2","num_attention_heads":64,"hidden_size":128}"#)
            .unwrap();
        assert_eq!((bare.num_key_value_heads, bare.max_position_embeddings), (32, 32_768));
        let null =
            r#"{"model_type":"qwen2","num_attention_heads":64,"hidden_size":128,"num_key_value_heads":null}"#;
        assert_eq!(ModelConfig::parse(null).unwrap().num_key_value_heads, 64);
    }

    #[test]
    fn sizes_that_no_model_has_are_refused_by_name() {
        for (extra, message) in [
            ("\"num_hidden_layers\":0", "num_hidden_layers = 0: expected a whole number of at least 1"),
            ("\"num_hidden_layers\":20000", "num_hidden_layers = 20000: expected at most"),
            ("\"num_attention_heads\":0", "num_attention_heads = 0"),
            ("\"num_key_value_heads\":0", "num_key_value_heads = 0"),
            ("\"num_key_value_heads\":3", "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
            ("\"num_attention_heads\":5", "hidden_size 64 is not a multiple"),
            ("\"head_dim\":15", "head_dim 15 is odd"),
            ("\"vocab_size\":-5", "vocab_size = -5"),
            ("\"vocab_size\":64.0", "vocab_size = 64.0"),
            ("\"hidden_size\":\"64\"", "hidden_size = \"64\""),
            ("\"intermediate_size\":99999999999999", "intermediate_size = 99999999999999"),
            ("\"max_position_embeddings\":0", "max_position_embeddings = 0"),
            ("\"rms_norm_eps\":-1", "rms_norm_eps = -1"),
            ("\"rms_norm_eps\":1e10", "rms_norm_eps = 10000000000.0: expected a number from 0.0 to 1.0"),
            ("\"attention_dropout\":2", "attention_dropout = 2"),
            ("\"rope_theta\":1e-300", "rope_theta = 1e-300: expected a number from"),
            ("\"rope_theta\":1e300", "rope_theta = 1e+300"),
            ("\"rope_scaling\":{\"type\":\"linear\",\"factor\":1e-300}", "factor = 1e-300"),
            ("\"rope_scaling\":{\"type\":\"linear\",\"factor\":1e30}", "factor = 1e+30"),
            ("\"rms_norm_eps\":\"1e-5\"", "rms_norm_eps = \"1e-5\""),
        ] {
            assert!(refused(extra).starts_with(message), "{extra}: {}", refused(extra));
        }
    }

    #[test]
    fn attention_windows_match_transformers() {
        use AttentionSpan::{Full, Window};
        let qwen = |extra: &str| with(&format!("\"model_type\":\"qwen2\",\"num_key_value_heads\":4,{extra}"));
        for (extra, spans) in [
            ("\"use_sliding_window\":false,\"sliding_window\":8,\"max_window_layers\":0", [Full, Full]),
            ("\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":2", [Full, Full]),
            ("\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":1", [Full, Window(8)]),
            ("\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":0", [Full, Full]),
            ("\"layer_types\":[\"full_attention\",\"full_attention\"]", [Full, Full]),
            (
                "\"layer_types\":[\"sliding_attention\",\"full_attention\"],\"use_sliding_window\":true,\"sliding_window\":5",
                [Window(5), Full],
            ),
        ] {
            let found = qwen(extra).unwrap();
            assert_eq!(found.spans, spans, "{extra}");
            let warns = found.warnings.iter().any(|warning| warning.contains("attention windows"));
            assert_eq!(warns, spans != [Full, Full], "{extra}");
        }
        for extra in [
            "\"layer_types\":[\"full_attention\",\"sliding_attention\"],\"use_sliding_window\":false,\"sliding_window\":8",
            "\"layer_types\":[\"full_attention\"]",
            "\"layer_types\":[\"full_attention\",\"linear_attention\"]",
            "\"use_sliding_window\":true,\"sliding_window\":0,\"max_window_layers\":0",
        ] {
            let fault = qwen(extra).unwrap_err();
            assert!(fault.message.contains("sliding") || fault.message.contains("layer_types"), "{fault}");
        }
        // llama has no windows in transformers.
        let ignored = with("\"sliding_window\":8").unwrap().warnings;
        assert_eq!(ignored, ["config.json: fields that llama does not know are ignored: sliding_window"]);
        assert!(with("\"sliding_window\":null").unwrap().warnings.is_empty());
        assert!(
            refused("\"layer_types\":[\"full_attention\",\"sliding_attention\"]")
                .contains("llama has no window")
        );
    }

    #[test]
    fn precisions_are_known_by_name() {
        let dtype = |extra: &str| with(extra).map(|config| config.torch_dtype);
        assert_eq!(dtype("\"dtype\":null,\"torch_dtype\":\"float16\"").unwrap(), "float16");
        assert_eq!(dtype("\"dtype\":\"bfloat16\",\"torch_dtype\":\"float16\"").unwrap(), "bfloat16");
        assert_eq!(dtype("\"dtype\":null").unwrap(), "float32");
        for odd in ["auto", "torch.float16", "float8_e4m3fn", "int8"] {
            assert_eq!(refused(&format!("\"dtype\":\"{odd}\"")), format!("dtype \"{odd}\" is not supported"));
        }
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        assert_eq!(refused("\"hidden_act\":\"mish\""), "hidden_act = \"mish\" is not supported");
        assert_eq!(with("\"hidden_act\":\"gelu_pytorch_tanh\"").unwrap().activation, Activation::GeluTanh);
        with("\"hidden_act\":\"swish\"").unwrap();
        assert_eq!(refused("\"model_type\":\"mistral\""), "model_type \"mistral\" is not supported");
        assert!(ModelConfig::parse("{}").unwrap_err().message.contains("model_type"));
    }
}
