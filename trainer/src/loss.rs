//! What a step minimises, as a function of sequence log-probabilities alone. Knows no model.
//!
//! Per pair with policy log-probabilities `c`, `r` and reference ones `c'`, `r'` (sums over completion tokens, nats):
//! rewards are `beta (c - c')` and `beta (r - r')`, the margin their difference.

use dyad_proto::run_config::LossType;
use tch::{Kind, Tensor};

/// Objective of one step, with its global divisor.
#[derive(Clone, Copy, Debug)]
pub enum Objective {
    /// Preference loss, mean over the pairs of all ranks.
    Preference {
        /// Which loss.
        loss_type: LossType,
        /// Strength of the pull towards the reference.
        beta: f64,
        /// Pairs over all ranks and micro-batches.
        global_pairs: f64,
    },
    /// Negative log-likelihood of the chosen side, mean over its tokens on all ranks.
    Likelihood {
        /// Chosen completion tokens over all ranks and micro-batches.
        global_tokens: f64,
    },
}

/// Sums that a step reports, in the order of [`Scored::statistics`]; the last one, kl, is the head's to fill.
pub const STATISTICS: usize = 8;

/// Sums over some sequences, on the device, in float64.
#[derive(Debug)]
pub struct Scored {
    /// `dL/d(log-probability)` of each sequence, already divided by the global count. `[sequences]`
    pub gradient: Tensor,
    /// loss, rewards chosen, rewards rejected, rewards correct, logps chosen, logps rejected, logps correct, (kl). `[8]`
    pub statistics: Tensor,
}

/// Applies the objective to sequence log-probabilities: `[2 * pairs]` interleaved for preference losses, `[pairs]` else.
#[must_use]
pub fn score(objective: Objective, logps: &Tensor, reference: Option<&Tensor>) -> Scored {
    match objective {
        Objective::Preference { loss_type, beta, global_pairs } => {
            let reference = reference.map_or_else(|| logps.zeros_like(), Tensor::shallow_clone);
            preference(loss_type, beta, global_pairs, &Sides { logps, reference: &reference })
        }
        Objective::Likelihood { global_tokens } => {
            let total = logps.sum(Kind::Double);
            let zero = total.zeros_like();
            let statistics = Tensor::stack(&[&-&total, &zero, &zero, &zero, &total, &zero, &zero, &zero], 0);
            Scored { gradient: logps.full_like(-1.0 / global_tokens), statistics }
        }
    }
}

struct Sides<'a> {
    logps: &'a Tensor,
    reference: &'a Tensor,
}

fn preference(loss_type: LossType, beta: f64, global_pairs: f64, sides: &Sides<'_>) -> Scored {
    let leaf = sides.logps.detach().set_requires_grad(true);
    let rewards = (&leaf - sides.reference) * beta;
    let per_pair = pair_loss(loss_type, &chosen(&rewards), &rejected(&rewards));
    let gradient =
        Tensor::run_backward(&[per_pair.sum(Kind::Double)], &[&leaf], false, false).remove(0) / global_pairs;
    let rewards = rewards.detach();
    let greater = |x: &Tensor| chosen(x).gt_tensor(&rejected(x)).sum(Kind::Double);
    let sum = |x: &Tensor| x.sum(Kind::Double);
    let statistics = [
        sum(&per_pair.detach()),
        sum(&chosen(&rewards)),
        sum(&rejected(&rewards)),
        greater(&rewards),
        sum(&chosen(sides.logps)),
        sum(&rejected(sides.logps)),
        greater(sides.logps),
        Tensor::zeros([], (Kind::Double, sides.logps.device())),
    ];
    Scored { gradient, statistics: Tensor::stack(&statistics, 0) }
}

fn chosen(interleaved: &Tensor) -> Tensor {
    interleaved.view([-1, 2]).select(1, 0)
}

fn rejected(interleaved: &Tensor) -> Tensor {
    interleaved.view([-1, 2]).select(1, 1)
}

/// Loss of each pair from its rewards. `[pairs]`
fn pair_loss(loss_type: LossType, chosen: &Tensor, rejected: &Tensor) -> Tensor {
    match loss_type {
        // -log sigmoid(margin), Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
        LossType::Sigmoid => -(chosen - rejected).log_sigmoid(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(beta: f64) -> Objective {
        Objective::Preference { loss_type: LossType::Sigmoid, beta, global_pairs: 4.0 }
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        tensor.to_kind(Kind::Double).try_into().unwrap()
    }

    #[test]
    fn equal_models_lose_ln_2_and_have_no_reward() {
        let logps = Tensor::from_slice(&[-3.0f32, -5.0, -7.0, -2.0]);
        let scored = score(objective(0.1), &logps, Some(&logps));
        let statistics = values(&scored.statistics);
        assert!((statistics[0] - 2.0 * std::f64::consts::LN_2).abs() < 1e-6);
        assert_eq!(statistics[1..4], [0.0, 0.0, 0.0]);
        assert_eq!(statistics[4..7], [-10.0, -7.0, 1.0]);
    }

    /// dL/dc = -beta sigmoid(-margin) / pairs, dL/dr its negative.
    #[test]
    fn gradient_has_the_closed_form() {
        let logps = Tensor::from_slice(&[-3.0f32, -5.0]);
        let reference = Tensor::from_slice(&[-4.0f32, -4.5]);
        let scored = score(objective(0.5), &logps, Some(&reference));
        let expected = -0.5 / (1.0 + 0.75f64.exp()) / 4.0;
        let gradient = values(&scored.gradient);
        assert!(
            (gradient[0] - expected).abs() < 1e-7 && (gradient[1] + expected).abs() < 1e-7,
            "{gradient:?}"
        );
    }

    #[test]
    fn likelihood_is_a_token_mean() {
        let scored =
            score(Objective::Likelihood { global_tokens: 8.0 }, &Tensor::from_slice(&[-3.0f32, -5.0]), None);
        assert_eq!(values(&scored.statistics)[0], 8.0);
        assert_eq!(values(&scored.gradient), [-0.125, -0.125]);
    }
}
