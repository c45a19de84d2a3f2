//! Settings of a decoder layer: the activation of its MLP, and its attention span.

use dyad_proto::Fault;

/// Activation of a gated MLP, by transformers' names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`: `silu`, `swish`.
    #[default]
    Silu,
    /// `x Phi(x)` with the error function: `gelu`.
    Gelu,
    /// The same with a hyperbolic tangent: `gelu_pytorch_tanh`, `gelu_new`.
    GeluTanh,
    /// `max(x, 0)`: `relu`.
    Relu,
}

impl Activation {
    /// Names in `config.json`.
    const NAMES: [(&'static str, Self); 6] = [
        ("silu", Self::Silu),
        ("swish", Self::Silu),
        ("gelu", Self::Gelu),
        ("gelu_pytorch_tanh", Self::GeluTanh),
        ("gelu_new", Self::GeluTanh),
        ("relu", Self::Relu),
    ];

    /// Reads the name in `config.json`.
    pub(crate) fn parse(value: &serde_json::Value) -> Result<Self, Fault> {
        let found = value.as_str().and_then(|name| Self::NAMES.iter().find(|(known, _)| *known == name));
        found.map(|(_, activation)| *activation).ok_or_else(|| {
            let names: Vec<&str> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            Fault::input(format!("hidden_act = {value} is not supported"))
                .hint(format!("supported: {}", names.join(", ")))
        })
    }
}

/// Which earlier tokens a token attends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionSpan {
    /// All of them.
    #[default]
    Full,
    /// At most this many of the latest tokens, itself included: `sliding_window` of transformers.
    Window(i64),
}
