//! ORPO, Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7: the likelihood term (`nll_weight`) plus `-beta log sigmoid(o)`, where `o` is the
//! difference of the log-odds `log(p / (1 - p))` of both outputs and `log p` the mean log-probability per token. It has no reference
//! model. `beta` is the paper's lambda.

use tch::Tensor;

use crate::objective::logps::{OutputLogps, PairLogps};
use crate::objective::options::LossOptions;

/// Largest mean log-probability, so that the odds of a certain output stay finite.
const MOST: f64 = -1e-9;

/// The loss of each pair, without the likelihood term.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    (log_odds(&pairs.chosen) - log_odds(&pairs.rejected)).log_sigmoid() * -options.beta
}

fn log_odds(output: &OutputLogps) -> Tensor {
    let logp = output.per_token().clamp_max(MOST);
    &logp - (-logp.expm1()).log()
}
