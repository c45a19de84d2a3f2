//! KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8, of labelled answers `y` to prompts `x`.
//!
//! With the log-ratio `l = log p(y | x) - log p'(y | x)` in nats, the loss of a desirable answer is `1 - sigmoid(beta (l - z))`, that of an
//! undesirable one is `1 - sigmoid(beta (z - l))`, each times its weight. `z` estimates the KL divergence of policy and reference: the mean
//! over the step's records of the log-ratio of another record's answer to the same prompt, at least 0, taken as a constant.
//!
//! APO-zero of labelled answers, D'Oosterlinck et al. 2024 (arXiv 2408.06266), is the same with `z = 0`.

use tch::{Kind, Tensor};

use crate::objective::options::LossOptions;

/// The loss of each answer. `desirable` is 1 or 0. `[records]`, float64
pub(in crate::objective) fn losses(
    log_ratio: &Tensor,
    z: &Tensor,
    desirable: &Tensor,
    options: LossOptions,
) -> Tensor {
    let sign = desirable * 2.0 - 1.0;
    let weight =
        desirable * (options.desirable_weight - options.undesirable_weight) + options.undesirable_weight;
    let share = ((log_ratio - z) * sign * options.beta).sigmoid();
    (share.neg() + 1.0) * weight
}

/// The estimate `z` from the log-ratios of the partners' answers. A number, float64
pub(in crate::objective) fn kl_estimate(log_ratios_of_partners: &Tensor) -> Tensor {
    log_ratios_of_partners.detach().mean(Kind::Double).clamp_min(0.0)
}
