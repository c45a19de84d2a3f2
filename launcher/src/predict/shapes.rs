//! Finds the shape of a model: from its folder, the hub, or a table of published sizes.

use std::path::Path;

use dyad_families::shape::Shape;
use dyad_families::{ModelConfig, Sizes};
use dyad_proto::Fault;

use crate::process::trainer_check;

/// A row of [`TABLE`].
struct PublishedShape {
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
const TABLE: [PublishedShape; 7] = [
    PublishedShape { name: "135M", layers: 30, hidden:  576, heads:  9, key_heads: 3, head_dim:  64, ffn:  1536, vocab:  49152, tied: true },
    PublishedShape { name: "0.5B", layers: 24, hidden:  896, heads: 14, key_heads: 2, head_dim:  64, ffn:  4864, vocab: 151936, tied: true },
    PublishedShape { name: "1B",   layers: 16, hidden: 2048, heads: 32, key_heads: 8, head_dim:  64, ffn:  8192, vocab: 128256, tied: true },
    PublishedShape { name: "3B",   layers: 28, hidden: 3072, heads: 24, key_heads: 8, head_dim: 128, ffn:  8192, vocab: 128256, tied: true },
    PublishedShape { name: "8B",   layers: 32, hidden: 4096, heads: 32, key_heads: 8, head_dim: 128, ffn: 14336, vocab: 128256, tied: false },
    PublishedShape { name: "14B",  layers: 48, hidden: 5120, heads: 40, key_heads: 8, head_dim: 128, ffn: 13824, vocab: 152064, tied: false },
    PublishedShape { name: "70B",  layers: 80, hidden: 8192, heads: 64, key_heads: 8, head_dim: 128, ffn: 28672, vocab: 128256, tied: false },
];

/// Returns the shape for a size such as `8B`, a model folder or a hub id. Fails like a run if the model cannot be trained.
pub fn find(model: &str) -> Result<Shape, Fault> {
    let dir = Path::new(model);
    if let Some(parameters) = size(model).filter(|_| !dir.exists()) {
        let known = TABLE.iter().find(|known| known.name.eq_ignore_ascii_case(model));
        return Ok(known.map_or_else(|| scaled(model, parameters), published));
    }
    let found = match dir.is_dir() {
        true => ModelConfig::load(dir).map(|config| Sizes::from(&config)),
        false => trainer_check::model(model),
    };
    let found = found.map_err(|fault| {
        let sizes = "--model also takes a size, such as 8B";
        let hint = if fault.hint.is_empty() { sizes.to_owned() } else { format!("{}; {sizes}", fault.hint) };
        fault.hint(hint)
    })?;
    Ok(Shape::of(model, &found))
}

/// Whether `model` is a size rather than a folder or hub id.
#[must_use]
pub fn is_size(model: &str) -> bool {
    size(model).is_some() && !Path::new(model).exists()
}

/// A model with `parameters` weights, with the proportions of the published model that is nearest in size.
fn scaled(name: &str, parameters: f64) -> Shape {
    let ratio = |known: &Shape| (known.parameters() / parameters).ln().abs();
    let known = TABLE.iter().map(published);
    let nearest = known.min_by(|a, b| ratio(a).total_cmp(&ratio(b))).unwrap_or_else(|| published(&TABLE[0]));
    let by = |factor: f64| Shape {
        name: name.into(),
        layers: nearest.layers * factor,
        hidden: nearest.hidden * factor,
        query: nearest.query * factor,
        key: nearest.key * factor,
        ffn: nearest.ffn * factor,
        ..nearest.clone()
    };
    // Bisection: the number of parameters grows with the factor, which lies between these bounds.
    let (mut low, mut high) = (1e-3, 1e3);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        if by(middle).parameters() < parameters { low = middle } else { high = middle }
    }
    by(low)
}

fn published(known: &PublishedShape) -> Shape {
    let width = |count: u32| f64::from(count * known.head_dim);
    Shape {
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

/// Parameters of a size such as `7B` or `350M`.
fn size(text: &str) -> Option<f64> {
    let unit = match text.chars().last()? {
        'b' | 'B' => 1e9,
        'm' | 'M' => 1e6,
        't' | 'T' => 1e12,
        _ => return None,
    };
    let number = &text[..text.len() - 1];
    let plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
    let number: f64 = number.parse().ok().filter(|_| plain)?;
    Some(number * unit).filter(|parameters| (1e6..=1e13).contains(parameters))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_size_has_a_shape_with_that_many_parameters() {
        for (name, parameters) in
            [("7B", 7e9), ("32b", 32e9), ("350M", 350e6), ("1.5B", 1.5e9), ("405B", 405e9)]
        {
            let shape = find(name).unwrap();
            assert!((shape.parameters() / parameters - 1.0).abs() < 1e-6, "{name}: {}", shape.parameters());
            assert!(shape.layers > 1.0 && shape.hidden > 64.0, "{shape:?}");
        }
        for name in ["8", "B", "-7B", "1e3B", "7 B", "infB"] {
            assert!(!is_size(name), "{name}");
        }
    }

    #[test]
    fn a_model_folder_is_read_as_a_run_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().to_str().unwrap();
        let write = |text: &str| std::fs::write(dir.path().join("config.json"), text).unwrap();
        write(
            r#"{"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
                "num_attention_heads": 8, "vocab_size": 32000}"#,
        );
        let shape = find(model).unwrap();
        assert_eq!((shape.key, shape.tied, shape.parameters()), (512.0, false, 58_458_112.0));
        write(r#"{"model_type": "mixtral", "hidden_size": 512}"#);
        let fault = find(model).unwrap_err();
        assert!(fault.message.contains("mixtral") && fault.hint.contains("supported: llama"), "{fault:?}");
    }

    /// Counts by hand from the published configurations, rounded to three digits. Tolerance 1.5 % for the parts, 0.1 % for the totals.
    #[test]
    fn parameter_counts_match_published_models() {
        for (name, blocks, head, adapters) in [
            ("135M", 0.106e9, 0.028e9, 4.9e6),
            ("0.5B", 0.358e9, 0.136e9, 8.8e6),
            ("1B", 0.973e9, 0.263e9, 11.3e6),
            ("8B", 6.98e9, 0.525e9, 41.9e6),
            ("70B", 68.5e9, 1.05e9, 207e6),
        ] {
            let shape = find(name).unwrap();
            for (found, expected) in
                [(shape.blocks(), blocks), (shape.head(), head), (shape.adapters(16.0), adapters)]
            {
                assert!((found / expected - 1.0).abs() < 0.015, "{name}: {found:e} against {expected:e}");
            }
        }
        for (name, parameters) in [("3B", 3.21e9), ("8B", 8.03e9), ("14B", 14.77e9), ("70B", 70.55e9)] {
            let found = find(name).unwrap().parameters();
            assert!((found / parameters - 1.0).abs() < 0.001, "{name}: {found:e} against {parameters:e}");
        }
    }
}
