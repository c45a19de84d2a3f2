//! SPPO with hard labels, Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with a winning probability of 1 and 0:
//! `(c - c' - 1 / (2 beta))² + (r - r' + 1 / (2 beta))²`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let target = 0.5 / options.beta;
    (pairs.chosen.ratio(options) - target).square() + (pairs.rejected.ratio(options) + target).square()
}
