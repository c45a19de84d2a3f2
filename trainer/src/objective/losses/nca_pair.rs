//! NCA with two outputs, Chen et al. 2024 (arXiv 2402.05369), eq. 12 for K = 2, with `a = beta (c - c')` and `b = beta (r - r')`:
//! `-log sigmoid(a) - log sigmoid(-a) / 2 - log sigmoid(-b) / 2`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let (a, b) = (pairs.chosen.ratio(options) * options.beta, pairs.rejected.ratio(options) * options.beta);
    -a.log_sigmoid() - ((-&a).log_sigmoid() + (-b).log_sigmoid()) * 0.5
}
