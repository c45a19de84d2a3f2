//! Hinge loss, Zhao et al. 2023 (SLiC, arXiv 2305.10425) in the form of Liu et al. 2023 (RSO, arXiv 2309.06657), eq. 12:
//! `max(0, 1 - beta m)` with the margin `m = s(c - c') - s(r - r')`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    (pairs.margin(options) * -options.beta + 1.0).relu()
}
