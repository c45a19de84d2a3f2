//! BCO with two outputs, Jung et al. 2024 (arXiv 2404.04656), eq. 8 without the reward shift, as in TRL:
//! `-log sigmoid(beta (c - c')) - log sigmoid(-beta (r - r'))`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let (a, b) = (pairs.chosen.ratio(options) * options.beta, pairs.rejected.ratio(options) * options.beta);
    -a.log_sigmoid() - (-b).log_sigmoid()
}
