//! PEFT adapter folders: reads `adapter_config.json` and finds the adapted layers with their ranks and scales.
//!
//! - DAT-A1: a field that changes PEFT's result is supported, or refused by name.
//! - DAT-A2: patterns and names choose the layers that PEFT chooses. A regular expression that Rust and Python read differently is
//!   refused.

pub mod base;
mod fields;
pub mod python_regex;
pub mod targets;

use std::path::Path;

use dyad_proto::Fault;
use serde_json::{Map, Value};

use self::targets::{Exclude, Layers, Patterns, Targets};
use crate::files;

/// Configuration file of a PEFT adapter; a folder with it is an adapter.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Weight file of a PEFT adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// PEFT's `LoraConfig`, without the fields that must have their neutral value.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// Rank of layers that match no pattern.
    pub r: i64,
    /// Scale numerator of layers that match no pattern.
    pub lora_alpha: f64,
    /// Dropout probability on the input.
    pub lora_dropout: f64,
    /// The scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// The weight is stretched to a trained magnitude per output (DoRA).
    pub use_dora: bool,
    /// B has a bias.
    pub lora_bias: bool,
    /// Ranks of layers whose names match.
    pub rank_pattern: Patterns,
    /// Scale numerators of layers whose names match.
    pub alpha_pattern: Patterns,
    /// The adapted layers.
    pub targets: Targets,
    /// Exceptions from `targets`.
    pub exclude: Exclude,
    /// Modules that are trained whole and saved with the adapter, by the ends of their names: PEFT's `modules_to_save`.
    pub modules_to_save: Vec<String>,
    /// Decoder layers that `targets` is limited to; `None` for all.
    pub layers: Option<Layers>,
    /// Name of the base model.
    pub base: Option<String>,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// How new adapters begin.
    pub init: Init,
    /// Warnings about fields that PEFT ignores; print them once.
    pub warnings: Vec<String>,
}

/// How a new adapter begins: PEFT's `init_lora_weights`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// A uniform within `1 / sqrt(inputs)`, B zero.
    Uniform,
    /// A normal with standard deviation `1 / rank`, B zero.
    Gaussian,
    /// As a new linear layer of PyTorch: A uniform within `1 / sqrt(inputs)`, B within `1 / sqrt(rank)`.
    NotZero,
    /// Another way, which has already been used in an adapter that is loaded.
    Past(String),
}

impl AdapterConfig {
    /// Reads an adapter folder.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join(ADAPTER_CONFIG);
        let fields = read(&path)?;
        fields::parse(&fields)
            .map_err(|fault| Fault { message: format!("{}: {}", path.display(), fault.message), ..fault })
    }

    /// A new adapter on `targets`; `keys` are the other fields, as a run's configuration sets them.
    pub fn of_run(mut keys: Map<String, Value>, targets: Targets) -> Result<Self, Fault> {
        keys.insert("peft_type".into(), "LORA".into());
        let config = fields::parse_with(&keys, Some(targets))?;
        match &config.init {
            Init::Past(way) => Err(Fault::input(format!("init_lora_weights = {way:?} is not supported"))
                .hint("a new adapter begins with true, false or \"gaussian\"")),
            Init::Uniform | Init::Gaussian | Init::NotZero => Ok(config),
        }
    }

    /// The `adapter_config.json` of this adapter over `base`. PEFT loads it with the same layers, ranks and scales.
    #[must_use]
    pub fn to_json(&self, base: &str, target_modules: Vec<String>) -> Value {
        let mut json = serde_json::json!({
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": target_modules,
            "base_model_name_or_path": base,
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "inference_mode": true,
        });
        for (name, patterns) in [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)]
        {
            if !patterns.is_empty() {
                json[name] = patterns.to_json();
            }
        }
        if !self.modules_to_save.is_empty() {
            json["modules_to_save"] = self.modules_to_save.as_slice().into();
        }
        json
    }
}

/// The base model that an adapter was trained over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Folder or hub id.
    pub name: String,
    /// Branch, tag or commit, if the adapter names one.
    pub revision: Option<String>,
}

impl Base {
    /// Reads the base from an adapter folder; `None` if it names no base.
    pub fn of(dir: &Path) -> Result<Option<Self>, Fault> {
        let fields = read(&dir.join(ADAPTER_CONFIG))?;
        let text = |name: &str| {
            let text = fields.get(name).and_then(Value::as_str).map(str::trim);
            text.filter(|text| !text.is_empty()).map(str::to_owned)
        };
        Ok(text("base_model_name_or_path").map(|name| Self { name, revision: text("revision") }))
    }

    /// Like [`Self::of`], but fails if the folder names no base.
    pub fn required(dir: &Path) -> Result<Self, Fault> {
        Self::of(dir)?.ok_or_else(|| {
            Fault::input(format!("{} names no base model", dir.join(ADAPTER_CONFIG).display()))
                .hint("name the base model in `model`, or in base_model_name_or_path of that file")
        })
    }
}

/// Whether a folder holds an adapter.
#[must_use]
pub fn is_adapter(dir: &Path) -> bool {
    files::is_there(&dir.join(ADAPTER_CONFIG))
}

fn read(path: &Path) -> Result<Map<String, Value>, Fault> {
    let text = dyad_proto::files::read_to_string(path).map_err(|error| {
        Fault::input(format!("cannot read {}: {error}", path.display()))
            .hint("make it a file that this user may read")
    })?;
    dyad_proto::lfs::refuse_pointer(path, text.as_bytes())?;
    serde_json::from_str(&text).map_err(|error| {
        Fault::input(format!("{}: {error}", path.display())).hint("expected a PEFT adapter's JSON object")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_read_from_the_adapter_config() {
        let dir = tempfile::tempdir().unwrap();
        let base = |text: &str| {
            std::fs::write(dir.path().join(ADAPTER_CONFIG), text).unwrap();
            Base::of(dir.path()).map_err(|fault| fault.message)
        };
        let named = |name: &str, revision: Option<&str>| {
            Ok(Some(Base { name: name.to_owned(), revision: revision.map(str::to_owned) }))
        };
        assert_eq!(base(r#"{"base_model_name_or_path": "org/name"}"#), named("org/name", None));
        assert_eq!(base(r#"{"base_model_name_or_path": "a", "revision": "b"}"#), named("a", Some("b")));
        for nothing in [r#"{"base_model_name_or_path": null}"#, r#"{"base_model_name_or_path": " "}"#, "{}"] {
            assert_eq!(base(nothing), Ok(None), "{nothing}");
        }
        // An unreadable file is an error, not an adapter without a base.
        assert!(base("[").unwrap_err().contains("adapter_config.json: "));
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
        assert!(base(pointer).unwrap_err().contains("is a Git LFS pointer"));
        assert!(Base::of(&dir.path().join("elsewhere")).unwrap_err().message.starts_with("cannot read "));
        std::fs::write(dir.path().join(ADAPTER_CONFIG), "{}").unwrap();
        assert!(Base::required(dir.path()).unwrap_err().message.ends_with("names no base model"));
    }
}
