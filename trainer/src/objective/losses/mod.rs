//! The losses, one file each: a pure function from the log-probabilities of pairs to the loss of each pair.
//!
//! In the formulas, `c` and `r` are the log-probabilities of the chosen and the rejected output under the policy, `c'` and `r'` those
//! under the reference model: sums over completion tokens, in nats. `|c|` and `|r|` are numbers of completion tokens. `s` is the identity,
//! or the score of another divergence ([`super::divergence`]). `beta` is `dpo_beta`.

mod aot;
mod apo;
mod bco_pair;
mod cpo;
mod discopop;
mod exo_pair;
mod hinge;
mod ipo;
pub(super) mod kto;
mod nca_pair;
mod orpo;
mod robust;
mod sigmoid;
mod sigmoid_norm;
mod simpo;
mod smoothing;
mod sppo_hard;

use dyad_proto::run_config::LossType;
use tch::Tensor;

use super::logps::PairLogps;
use super::options::LossOptions;

/// The loss of each pair. `[pairs]`, float64
pub(super) fn of_pairs(loss: LossType, pairs: &PairLogps, options: LossOptions) -> Tensor {
    let losses = match loss {
        LossType::Sigmoid => sigmoid::losses,
        LossType::SigmoidNorm => sigmoid_norm::losses,
        LossType::Hinge => hinge::losses,
        LossType::Ipo => ipo::losses,
        LossType::ExoPair => exo_pair::losses,
        LossType::NcaPair => nca_pair::losses,
        LossType::Robust => robust::losses,
        LossType::BcoPair => bco_pair::losses,
        LossType::SppoHard => sppo_hard::losses,
        LossType::Aot => aot::paired,
        LossType::AotUnpaired => aot::unpaired,
        LossType::ApoZero => apo::zero,
        LossType::ApoDown => apo::down,
        LossType::Discopop => discopop::losses,
        LossType::Simpo => simpo::losses,
        LossType::Cpo => cpo::losses,
        LossType::Orpo => orpo::losses,
        // Losses of labelled answers, which have no pair (`StepObjective::labelled`).
        LossType::Kto | LossType::ApoZeroUnpaired => |pairs: &PairLogps, _| pairs.chosen.policy.zeros_like(),
        // The likelihood term, a mean over tokens, is `StepObjective`'s; this is a function of pairs whose derivative is 0.
        LossType::Sft => |pairs: &PairLogps, _| pairs.chosen.policy.clamp(0.0, 0.0),
    };
    losses(pairs, options)
}
