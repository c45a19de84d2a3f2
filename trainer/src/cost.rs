//! What a pair costs to compute, so that ranks can be given equal shares.
//!
//! Floating-point operations of one forward pass: `2 N` per token for the layers' matrix products, `2 H` per scored row for the
//! head, `4 d_q L` per pair of tokens that see each other; the backward pass is the same multiple of each.

use dyad_proto::wire::PairLength;

use crate::batch::Layout;
use crate::model::ModelConfig;

/// Operations of one model, by what they scale with.
#[derive(Clone, Copy, Debug)]
pub struct PassCost {
    token: f64,
    row: f64,
    seen: f64,
    layout: Layout,
}

impl PassCost {
    /// Of a model of this shape.
    #[must_use]
    pub fn new(config: &ModelConfig, layout: Layout) -> Self {
        let (hidden, layers) = (config.hidden_size as f64, config.num_hidden_layers as f64);
        let queries = (config.num_attention_heads * config.head_dim) as f64;
        let keys = (config.num_key_value_heads * config.head_dim) as f64;
        let attention = 2.0 * hidden * queries + 2.0 * hidden * keys;
        let mlp = 3.0 * hidden * config.intermediate_size as f64;
        Self {
            token: 2.0 * layers * (attention + mlp),
            row: 2.0 * hidden * config.vocab_size as f64,
            seen: 4.0 * queries * layers,
            layout,
        }
    }

    /// Thousands of operations of a pair of these lengths.
    #[must_use]
    pub fn of(&self, length: &PairLength) -> u64 {
        let prompt = f64::from(length.prompt_tokens);
        let (chosen, rejected) = (f64::from(length.chosen_tokens), f64::from(length.rejected_tokens));
        let causal = |tokens: f64| tokens * tokens / 2.0;
        let branch = |tokens: f64| tokens * prompt + causal(tokens);
        let (tokens, rows, seen) = match self.layout {
            Layout::ChosenOnly => (prompt + chosen, chosen, causal(prompt + chosen)),
            Layout::SharedPairs => (
                prompt + chosen + rejected,
                chosen + rejected,
                causal(prompt) + branch(chosen) + branch(rejected),
            ),
            Layout::SeparatePairs => (
                2.0 * prompt + chosen + rejected,
                chosen + rejected,
                causal(prompt + chosen) + causal(prompt + rejected),
            ),
        };
        ((tokens * self.token + rows * self.row + seen * self.seen) / 1e3) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let json = r#"{"model_type":"llama","hidden_size":512,"intermediate_size":1408,"num_hidden_layers":8,
            "num_attention_heads":8,"num_key_value_heads":8,"vocab_size":32000,"rms_norm_eps":1e-5,"max_position_embeddings":2048}"#;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        ModelConfig::load(dir.path()).unwrap()
    }

    /// By hand: N = 8 (4·512² + 3·512·1408) = 25.69 M, H = 512·32000 = 16.38 M, 4·512·8 = 16,384 for tokens that see each other.
    #[test]
    fn operations_are_those_of_the_formula() {
        let length = PairLength {
            prompt_tokens: 150,
            chosen_tokens: 65,
            rejected_tokens: 65,
            ..PairLength::default()
        };
        let cost = |layout| PassCost::new(&config(), layout).of(&length) as f64 * 1e3;
        let close = |found: f64, expected: f64| {
            assert!((found / expected - 1.0).abs() < 1e-3, "{found} is not {expected}");
        };
        let head = 130.0 * 2.0 * 16.384e6;
        close(cost(Layout::SharedPairs), 280.0 * 2.0 * 25.69e6 + head + 34_975.0 * 16_384.0);
        close(cost(Layout::SeparatePairs), 430.0 * 2.0 * 25.69e6 + head + 46_225.0 * 16_384.0);
        close(cost(Layout::ChosenOnly), 215.0 * 2.0 * 25.69e6 + head / 2.0 + 23_112.5 * 16_384.0);
    }
}
