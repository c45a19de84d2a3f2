//! DPO of scores per token, as in Tülu 3 (Lambert et al. 2024, arXiv 2411.15124): `-log sigmoid(beta (s(c - c') / |c| - s(r - r') / |r|))`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let margin = pairs.chosen.score_per_token(options) - pairs.rejected.score_per_token(options);
    -(margin * options.beta).log_sigmoid()
}
