//! Parameters of the losses.

use dyad_proto::RunConfig;

use super::divergence::Divergence;

/// Parameters of the losses, from the configuration.
#[derive(Clone, Copy, Debug)]
pub struct LossOptions {
    /// `dpo_beta`: strength of the pull towards the reference; IPO's tau.
    pub beta: f64,
    /// `label_smoothing`: share of pairs whose outputs are in the wrong order.
    pub label_smoothing: f64,
    /// `dpo_normalize_logratios_by_length`.
    pub normalize: bool,
    /// `f_divergence_type`.
    pub divergence: Divergence,
    /// `simpo_gamma`: SimPO's target margin.
    pub simpo_gamma: f64,
    /// `discopop_tau`: DiscoPOP's temperature.
    pub discopop_tau: f64,
    /// `desirable_weight`: factor of the losses of desirable answers.
    pub desirable_weight: f64,
    /// `undesirable_weight`: factor of the losses of undesirable answers.
    pub undesirable_weight: f64,
}

impl LossOptions {
    /// The parameters that the configuration has.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        Self {
            beta: config.dpo_beta,
            label_smoothing: config.label_smoothing,
            normalize: config.dpo_normalize_logratios_by_length,
            divergence: Divergence::of(config),
            simpo_gamma: config.simpo_gamma(),
            discopop_tau: config.discopop_tau(),
            desirable_weight: config.desirable_weight.unwrap_or(1.0),
            undesirable_weight: config.undesirable_weight.unwrap_or(1.0),
        }
    }
}
