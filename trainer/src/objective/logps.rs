//! Log-probabilities in the form that losses read.

use tch::{Kind, Tensor};

/// Log-probabilities of the sequences of some pairs. Preference losses take chosen and rejected outputs in turn.
#[derive(Clone, Copy, Debug)]
pub struct SequenceLogps<'a> {
    /// Under the policy. `[sequences]`, float64, nats
    pub policy: &'a Tensor,
    /// Under the reference model; `None` counts as zeros. `[sequences]`, float64, nats
    pub reference: Option<&'a Tensor>,
    /// Completion tokens. `[sequences]`, int64
    pub lengths: &'a Tensor,
}

/// The same by output, with the graph that leads back to the policy's log-probabilities.
#[derive(Debug)]
pub(super) struct PairLogps {
    /// The preferred outputs.
    pub(super) chosen: OutputLogps,
    /// The other outputs.
    pub(super) rejected: OutputLogps,
}

impl PairLogps {
    /// `leaf` stands for the policy's log-probabilities in the graph.
    pub(super) fn of(leaf: &Tensor, sequences: &SequenceLogps<'_>) -> Self {
        let output = |which: i64| {
            let select = |interleaved: &Tensor| interleaved.view([-1, 2]).select(1, which);
            OutputLogps {
                policy: select(leaf),
                reference: sequences.reference.map(select),
                lengths: select(sequences.lengths),
            }
        };
        Self { chosen: output(0), rejected: output(1) }
    }
}

/// Log-probabilities of one output of each pair. `[pairs]`
#[derive(Debug)]
pub(super) struct OutputLogps {
    /// `log p(y | x)` under the policy.
    pub(super) policy: Tensor,
    reference: Option<Tensor>,
    lengths: Tensor,
}

impl OutputLogps {
    /// `log p(y | x) - log p'(y | x)`; a missing reference counts as zero.
    pub(super) fn log_ratio(&self) -> Tensor {
        self.reference
            .as_ref()
            .map_or_else(|| self.policy.shallow_clone(), |reference| &self.policy - reference)
    }

    /// Completion tokens; at least 1, as in TRL.
    pub(super) fn tokens(&self) -> Tensor {
        self.lengths.to_kind(Kind::Double).clamp_min(1.0)
    }
}
