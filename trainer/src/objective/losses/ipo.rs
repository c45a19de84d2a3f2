//! IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17: `(h - 1 / (2 beta))²` with `h = s(c - c') / |c| - s(r - r') / |r|`.
//!
//! The log-ratios are divided by the number of completion tokens, as in TRL; the paper's eq. 17 has sums. `beta` is the paper's tau.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let margin = pairs.chosen.score_per_token(options) - pairs.rejected.score_per_token(options);
    (margin - 1.0 / (2.0 * options.beta)).square()
}
