//! Log-probabilities in the form that losses read.

use tch::{Device, Kind, Tensor};

use super::options::LossOptions;

/// Log-probabilities of the sequences of some pairs. Preference losses take chosen and rejected outputs in turn.
#[derive(Clone, Copy, Debug)]
pub struct SequenceLogps<'a> {
    /// Under the policy. `[sequences]`, float64, nats
    pub policy: &'a Tensor,
    /// Under the policy, every token with weight 1. The same tensor as `policy` without `ld_alpha`. `[sequences]`, float64, nats
    pub likelihood: &'a Tensor,
    /// Under the reference model; `None` counts as zeros. `[sequences]`, float64, nats
    pub reference: Option<&'a Tensor>,
    /// Completion tokens. `[sequences]`, int64
    pub lengths: &'a Tensor,
    /// Factor of each pair's loss. `[pairs]`, float64
    pub weights: &'a Tensor,
    /// 1 for pairs whose first output is preferred or desirable, 0 for the others. `[pairs]`, float64
    pub desirable: &'a Tensor,
    /// Mean over the tokens of `log p(y_t) - log(sum over v of p(v)²)`: WPO's logarithm of a sequence's weight, eq. 2 of Zhou et al.
    /// 2024 (arXiv 2406.11827). `None` without `use_weighting`. `[sequences]`, float64
    pub alignment: Option<&'a Tensor>,
}

impl SequenceLogps<'_> {
    /// Factor of each pair's loss, from its record and from WPO. `[pairs]`
    pub(super) fn pair_weights(&self) -> Tensor {
        match self.alignment {
            None => self.weights.shallow_clone(),
            Some(alignment) => self.weights * (of_output(alignment, 0) + of_output(alignment, 1)).exp(),
        }
    }
}

/// [`SequenceLogps`] that owns its tensors. A missing reference is zeros.
#[derive(Debug)]
pub struct OwnedLogps {
    pub(crate) policy: Tensor,
    pub(crate) likelihood: Tensor,
    pub(crate) reference: Tensor,
    pub(crate) lengths: Tensor,
    pub(crate) weights: Tensor,
    pub(crate) desirable: Tensor,
    pub(crate) alignment: Option<Tensor>,
}

impl OwnedLogps {
    /// The log-probabilities as losses read them.
    #[must_use]
    pub fn read(&self) -> SequenceLogps<'_> {
        SequenceLogps {
            policy: &self.policy,
            likelihood: &self.likelihood,
            reference: Some(&self.reference),
            lengths: &self.lengths,
            weights: &self.weights,
            desirable: &self.desirable,
            alignment: self.alignment.as_ref(),
        }
    }

    /// The sequences of several parts, in order.
    pub(crate) fn joined(parts: &[Self], device: Device) -> Self {
        let join = |of: fn(&Self) -> &Tensor, kind: Kind| match parts {
            [] => Tensor::zeros([0], (kind, device)),
            parts => Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0),
        };
        let aligned: Option<Vec<&Tensor>> = parts.iter().map(|part| part.alignment.as_ref()).collect();
        Self {
            policy: join(|part| &part.policy, Kind::Double),
            likelihood: join(|part| &part.likelihood, Kind::Double),
            reference: join(|part| &part.reference, Kind::Double),
            lengths: join(|part| &part.lengths, Kind::Int64),
            weights: join(|part| &part.weights, Kind::Double),
            desirable: join(|part| &part.desirable, Kind::Double),
            alignment: aligned.filter(|parts| !parts.is_empty()).map(|parts| Tensor::cat(&parts, 0)),
        }
    }

    /// Pairs of two sequences.
    pub(crate) fn pairs(&self) -> i64 {
        self.weights.size()[0]
    }
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
            let select = |interleaved: &Tensor| of_output(interleaved, which);
            OutputLogps {
                policy: select(leaf),
                reference: sequences.reference.map(select),
                lengths: select(sequences.lengths),
            }
        };
        Self { chosen: output(0), rejected: output(1) }
    }

    /// `s(c - c') - s(r - r')`: how much better the policy likes the chosen output, compared with the reference.
    pub(super) fn margin(&self, options: LossOptions) -> Tensor {
        self.chosen.score(options) - self.rejected.score(options)
    }
}

/// The values of the chosen (0) or rejected (1) outputs. `[pairs]`
pub(super) fn of_output(interleaved: &Tensor, which: i64) -> Tensor {
    interleaved.view([-1, 2]).select(1, which)
}

/// Log-probabilities of one output of each pair. `[pairs]`
#[derive(Debug)]
pub(super) struct OutputLogps {
    /// `log p(y | x)` under the policy.
    pub(super) policy: Tensor,
    /// `log p'(y | x)` under the reference; `None` counts as zeros.
    pub(super) reference: Option<Tensor>,
    lengths: Tensor,
}

impl OutputLogps {
    /// `log p(y | x) - log p'(y | x)`.
    pub(super) fn log_ratio(&self) -> Tensor {
        self.reference
            .as_ref()
            .map_or_else(|| self.policy.shallow_clone(), |reference| &self.policy - reference)
    }

    /// The log-ratio, per token if `dpo_normalize_logratios_by_length` is set.
    pub(super) fn ratio(&self, options: LossOptions) -> Tensor {
        self.normalized(self.log_ratio(), options)
    }

    /// What the f-divergence makes of the log-ratio, per token if `dpo_normalize_logratios_by_length` is set.
    pub(super) fn score(&self, options: LossOptions) -> Tensor {
        self.normalized(options.divergence.score(&self.log_ratio()), options)
    }

    /// The score divided by the number of tokens.
    pub(super) fn score_per_token(&self, options: LossOptions) -> Tensor {
        options.divergence.score(&self.log_ratio()) / self.tokens()
    }

    /// `log p(y | x) / |y|`.
    pub(super) fn per_token(&self) -> Tensor {
        &self.policy / self.tokens()
    }

    fn normalized(&self, values: Tensor, options: LossOptions) -> Tensor {
        if options.normalize { values / self.tokens() } else { values }
    }

    /// Completion tokens; at least 1, as in TRL.
    fn tokens(&self) -> Tensor {
        self.lengths.to_kind(Kind::Double).clamp_min(1.0)
    }
}
