//! Shapes of decoder-only models: what their sizes come from.

use std::path::Path;

use dyad_proto::Fault;
use serde_json::Value;

/// Sizes of a Llama-like model. All counts are `f64`: they only ever enter products.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// What the user called it.
    pub name: String,
    /// Decoder layers.
    pub layers: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Width of all query heads together.
    pub query: f64,
    /// Width of all key heads together; values are as wide.
    pub key: f64,
    /// Width inside the gated MLP.
    pub ffn: f64,
    /// Entries of the vocabulary.
    pub vocab: f64,
    /// Embedding and head are one matrix.
    pub tied: bool,
}

/// A row of [`TABLE`].
struct Known {
    name: &'static str,
    layers: u32,
    hidden: u32,
    heads: u32,
    key_heads: u32,
    head_dim: u32,
    ffn: u32,
    vocab: u32,
    tied: bool,
}

#[rustfmt::skip]
/// Published `config.json` files: SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and -3B, Llama-3.1-8B, Qwen2.5-14B, Llama-3.1-70B.
const TABLE: [Known; 7] = [
    Known { name: "135M", layers: 30, hidden:  576, heads:  9, key_heads: 3, head_dim:  64, ffn:  1536, vocab:  49152, tied: true },
    Known { name: "0.5B", layers: 24, hidden:  896, heads: 14, key_heads: 2, head_dim:  64, ffn:  4864, vocab: 151936, tied: true },
    Known { name: "1B",   layers: 16, hidden: 2048, heads: 32, key_heads: 8, head_dim:  64, ffn:  8192, vocab: 128256, tied: true },
    Known { name: "3B",   layers: 28, hidden: 3072, heads: 24, key_heads: 8, head_dim: 128, ffn:  8192, vocab: 128256, tied: true },
    Known { name: "8B",   layers: 32, hidden: 4096, heads: 32, key_heads: 8, head_dim: 128, ffn: 14336, vocab: 128256, tied: false },
    Known { name: "14B",  layers: 48, hidden: 5120, heads: 40, key_heads: 8, head_dim: 128, ffn: 13824, vocab: 152064, tied: false },
    Known { name: "70B",  layers: 80, hidden: 8192, heads: 64, key_heads: 8, head_dim: 128, ffn: 28672, vocab: 128256, tied: false },
];

impl Shape {
    /// A size of the table, or the `config.json` of a model folder.
    pub fn find(model: &str) -> Result<Self, Fault> {
        if let Some(known) = TABLE.iter().find(|known| known.name.eq_ignore_ascii_case(model)) {
            return Ok(Self::known(known));
        }
        let path = Path::new(model).join("config.json");
        let text = dyad_proto::files::read_to_string(&path).map_err(|error| {
            let names: Vec<&str> = TABLE.iter().map(|known| known.name).collect();
            Fault::input(format!("--model {model}: cannot read {}: {error}", path.display()))
                .hint(format!("give a Hugging Face model folder or one of {}", names.join(", ")))
        })?;
        Self::parse(model, &text).map_err(|message| {
            Fault::input(format!("{}: {message}", path.display()))
                .hint("expected the config.json of a dense Llama-like model")
        })
    }

    fn known(known: &Known) -> Self {
        let width = |count: u32| f64::from(count * known.head_dim);
        Self {
            name: known.name.into(),
            layers: known.layers.into(),
            hidden: known.hidden.into(),
            query: width(known.heads),
            key: width(known.key_heads),
            ffn: known.ffn.into(),
            vocab: known.vocab.into(),
            tied: known.tied,
        }
    }

    /// Reads the text of a `config.json`.
    fn parse(name: &str, text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if ["num_local_experts", "num_experts", "n_routed_experts"].iter().any(|key| json[*key].is_number()) {
            return Err("mixture-of-experts models are not modelled".into());
        }
        let optional = |key: &str| match json[key].as_u64() {
            None if json[key].is_null() => Ok(None),
            Some(value @ 1..=100_000_000) => Ok(Some(value as f64)),
            _ => Err(format!("`{key}` must be a whole number above 0, found {}", json[key])),
        };
        let required = |key: &str| optional(key)?.ok_or_else(|| format!("`{key}` is missing"));
        let (hidden, heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let head_dim = optional("head_dim")?.unwrap_or(hidden / heads);
        Ok(Self {
            name: name.into(),
            layers: required("num_hidden_layers")?,
            hidden,
            query: heads * head_dim,
            key: optional("num_key_value_heads")?.unwrap_or(heads) * head_dim,
            ffn: required("intermediate_size")?,
            vocab: required("vocab_size")?,
            tied: json["tie_word_embeddings"].as_bool().unwrap_or(false),
        })
    }

    /// Weights of one layer's seven projections; norms and biases are below a thousandth and left out.
    #[must_use]
    pub fn layer(&self) -> f64 {
        2.0 * self.hidden * self.query + 2.0 * self.hidden * self.key + 3.0 * self.hidden * self.ffn
    }

    /// Weights of all layers, the `N_l` of the FLOP formulas.
    #[must_use]
    pub fn blocks(&self) -> f64 {
        self.layers * self.layer()
    }

    /// Weights of the head, the `H` of the FLOP formulas; the embedding is as large.
    #[must_use]
    pub fn head(&self) -> f64 {
        self.hidden * self.vocab
    }

    /// All weights.
    #[must_use]
    pub fn parameters(&self) -> f64 {
        self.blocks() + self.head() * if self.tied { 1.0 } else { 2.0 }
    }

    /// Weights of rank-`r` adapters on the seven projections of every layer.
    #[must_use]
    pub fn adapters(&self, r: f64) -> f64 {
        let sides = [
            (self.hidden, self.query),
            (self.hidden, self.key),
            (self.hidden, self.key),
            (self.query, self.hidden),
            (self.hidden, self.ffn),
            (self.hidden, self.ffn),
            (self.ffn, self.hidden),
        ];
        self.layers * r * sides.iter().map(|(inputs, outputs)| inputs + outputs).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts by hand from the published configurations; 1 % because they are quoted to three digits.
    #[test]
    fn parameter_counts_match_published_models() {
        for (name, blocks, head, adapters) in [
            ("135M", 0.106e9, 0.028e9, 4.9e6),
            ("0.5B", 0.358e9, 0.136e9, 8.8e6),
            ("1B", 0.973e9, 0.263e9, 11.3e6),
            ("8B", 6.98e9, 0.525e9, 41.9e6),
            ("70B", 68.5e9, 1.05e9, 207e6),
        ] {
            let shape = Shape::find(name).unwrap();
            for (found, expected) in
                [(shape.blocks(), blocks), (shape.head(), head), (shape.adapters(16.0), adapters)]
            {
                assert!((found / expected - 1.0).abs() < 0.015, "{name}: {found:e} against {expected:e}");
            }
        }
        for (name, parameters) in [("3B", 3.21e9), ("8B", 8.03e9), ("14B", 14.77e9), ("70B", 70.55e9)] {
            let found = Shape::find(name).unwrap().parameters();
            assert!((found / parameters - 1.0).abs() < 0.001, "{name}: {found:e} against {parameters:e}");
        }
    }

    #[test]
    fn a_model_folder_is_read_and_a_broken_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().to_str().unwrap();
        let write = |text: &str| std::fs::write(dir.path().join("config.json"), text).unwrap();
        write(
            r#"{"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                "vocab_size": 32000}"#,
        );
        let shape = Shape::find(model).unwrap();
        assert_eq!((shape.key, shape.tied, shape.parameters()), (512.0, false, 58_458_112.0));
        write(r#"{"hidden_size": 512}"#);
        assert!(Shape::find(model).unwrap_err().message.ends_with("`num_attention_heads` is missing"));
        write(r#"{"hidden_size": 0}"#);
        assert!(Shape::find(model).unwrap_err().message.contains("`hidden_size` must be a whole number"));
        write(r#"{"num_local_experts": 8}"#);
        assert!(Shape::find(model).unwrap_err().message.contains("mixture-of-experts"));
        let fault = Shape::find("9B").unwrap_err();
        assert!(fault.message.contains("9B") && fault.hint.contains("135M"), "{fault:?}");
    }
}
