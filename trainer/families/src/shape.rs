//! Size of a model: weights, floating-point operations of a pass, and values that are kept for the backward pass. These formulas are used
//! to share pairs among trainers, by `launcher plan` and by benchmarks.
//!
//! Counts are `f64`, because they are only multiplied and added.

use crate::{ModelConfig, Sizes};

/// Sizes of a decoder with a gated MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Name of the model for output.
    pub name: String,
    /// Decoder layers.
    pub layers: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Width of all query heads together.
    pub query: f64,
    /// Width of all key heads together; values have the same width.
    pub key: f64,
    /// Width inside the gated MLP.
    pub ffn: f64,
    /// Entries of the vocabulary.
    pub vocab: f64,
    /// Whether embedding and head are one matrix.
    pub tied: bool,
}

impl Shape {
    /// Converts the sizes of a model.
    #[must_use]
    pub fn of(name: &str, sizes: &Sizes) -> Self {
        let count = |count: i64| count as f64;
        Self {
            name: name.into(),
            layers: sizes.layers as f64,
            hidden: count(sizes.hidden),
            query: count(sizes.query),
            key: count(sizes.key),
            ffn: count(sizes.ffn),
            vocab: count(sizes.vocab),
            tied: sizes.tied,
        }
    }

    /// Weights of one layer's seven projections. Norms and biases are ignored: they are below a thousandth.
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

    /// FLOPs of one forward pass: `2 N_l t + 2 H h + 4 d_q L a`, for `t` tokens, `h` rows of the head and `a` pairs of tokens that attend
    /// to each other. The backward pass multiplies each term by the same factor.
    #[must_use]
    pub fn forward(&self, work: PassWork) -> Flops {
        Flops {
            layers: work.tokens * (2.0 * self.blocks()),
            head: work.rows * (2.0 * self.head()),
            attention: work.seen * (4.0 * self.query * self.layers),
        }
    }

    /// Values that one layer keeps for each token until its backward pass: input and output of both norms, queries and attention output,
    /// keys and values, gate, up and their product. `copied_keys` adds a copy of keys and values; without a fused activation, its output
    /// is kept too.
    #[must_use]
    pub fn kept_values(&self, copied_keys: bool, fused_activation: bool) -> f64 {
        let copies = if copied_keys { 2.0 * self.key } else { 0.0 };
        let activation = if fused_activation { 0.0 } else { self.ffn };
        4.0 * self.hidden + 2.0 * self.query + 2.0 * self.key + 3.0 * self.ffn + activation + copies
    }

    /// Values for each token at the widest moment of a layer's backward pass: gradients of gate, up, their product and its input.
    #[must_use]
    pub fn transient_values(&self) -> f64 {
        4.0 * self.ffn
    }
}

impl From<&ModelConfig> for Shape {
    fn from(config: &ModelConfig) -> Self {
        Self::of(&config.model_type, &Sizes::from(config))
    }
}

/// Work of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassWork {
    /// Tokens that go through the layers.
    pub tokens: f64,
    /// Rows that reach the head: completion tokens.
    pub rows: f64,
    /// Pairs of tokens that attend to each other.
    pub seen: f64,
}

/// Tokens of a pair; `rejected` is zero if the run does not use it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairTokens {
    /// Tokens of the prompt.
    pub prompt: f64,
    /// Tokens of the preferred output.
    pub chosen: f64,
    /// Tokens of the rejected output.
    pub rejected: f64,
}

impl PairTokens {
    /// Completion tokens of both outputs.
    #[must_use]
    pub fn rows(&self) -> f64 {
        self.chosen + self.rejected
    }

    /// Work if the prompt is computed once for both outputs.
    #[must_use]
    pub fn shared(&self) -> PassWork {
        let Self { prompt, chosen, rejected } = *self;
        let branch = |tokens: f64| tokens * prompt + causal(tokens);
        PassWork {
            tokens: prompt + chosen + rejected,
            rows: self.rows(),
            seen: causal(prompt) + branch(chosen) + branch(rejected),
        }
    }

    /// Work if the prompt is computed for each output.
    #[must_use]
    pub fn separate(&self) -> PassWork {
        let Self { prompt, chosen, rejected } = *self;
        PassWork {
            tokens: 2.0 * prompt + chosen + rejected,
            rows: self.rows(),
            seen: causal(prompt + chosen) + causal(prompt + rejected),
        }
    }

    /// Work for the prompt and the preferred output alone.
    #[must_use]
    pub fn chosen_only(&self) -> PassWork {
        let Self { prompt, chosen, .. } = *self;
        PassWork { tokens: prompt + chosen, rows: chosen, seen: causal(prompt + chosen) }
    }
}

fn causal(tokens: f64) -> f64 {
    tokens * tokens / 2.0
}

/// FLOPs by kind.
#[derive(Clone, Copy, Debug)]
pub struct Flops {
    /// The layers' matrix products.
    pub layers: f64,
    /// The head's matrix products.
    pub head: f64,
    /// Attention scores and weighted values.
    pub attention: f64,
}

impl Flops {
    /// The sum of all kinds.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.layers + self.head + self.attention
    }
}

/// Largest tile of logits on a CPU, in bytes. Two tiles live at once; without a kernel, up to [`MOST_TILES`].
pub const TILE_BYTES: u64 = 96 << 20;
/// Largest tile of logits on a GPU, in bytes: a GPU needs a thousand rows of a large vocabulary to be busy.
pub const GPU_TILE_BYTES: u64 = 256 << 20;
/// Most tiles of logits that live at once.
pub const MOST_TILES: u64 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        let json = r#"{"model_type":"llama","hidden_size":512,"intermediate_size":1408,"num_hidden_layers":8,
            "num_attention_heads":8,"num_key_value_heads":8,"vocab_size":32000}"#;
        Shape::from(&ModelConfig::parse(json).unwrap())
    }

    /// Computed by hand: N = 8 (4·512² + 3·512·1408) = 25.69 M, H = 512·32000 = 16.38 M, 4·512·8 = 16,384 per pair of such tokens.
    #[test]
    fn flops_match_the_formula() {
        let pair = PairTokens { prompt: 150.0, chosen: 65.0, rejected: 65.0 };
        let close = |work: PassWork, expected: f64| {
            let found = shape().forward(work).total();
            assert!((found / expected - 1.0).abs() < 1e-3, "{found} is not {expected}");
        };
        let head = 130.0 * 2.0 * 16.384e6;
        close(pair.shared(), 280.0 * 2.0 * 25.69e6 + head + 34_975.0 * 16_384.0);
        close(pair.separate(), 430.0 * 2.0 * 25.69e6 + head + 46_225.0 * 16_384.0);
        close(pair.chosen_only(), 215.0 * 2.0 * 25.69e6 + head / 2.0 + 23_112.5 * 16_384.0);
    }

    #[test]
    fn kept_values_are_counted_once_each() {
        let shape = shape();
        let fused = 4.0 * 512.0 + 2.0 * 512.0 + 2.0 * 512.0 + 3.0 * 1408.0;
        assert_eq!(shape.kept_values(false, true), fused);
        assert_eq!(shape.kept_values(true, false), fused + 1408.0 + 2.0 * 512.0);
    }
}
