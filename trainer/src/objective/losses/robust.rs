//! Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12, for labels that are flipped with probability `e = label_smoothing`:
//! `(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)` with the margin `m = s(c - c') - s(r - r')`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let (x, flipped) = (pairs.margin(options) * options.beta, options.label_smoothing);
    ((-&x).log_sigmoid() * flipped - x.log_sigmoid() * (1.0 - flipped)) / (1.0 - 2.0 * flipped)
}
