//! Anchored preference optimisation, D'Oosterlinck et al. 2024 (arXiv 2408.06266).

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// APO-zero, eq. 7: `1 - sigmoid(beta (c - c')) + sigmoid(beta (r - r'))`. For chosen outputs better than the model's own.
pub(super) fn zero(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let share = |ratio: Tensor| (ratio * options.beta).sigmoid();
    share(pairs.rejected.ratio(options)) - share(pairs.chosen.ratio(options)) + 1.0
}

/// APO-down, eq. 8: `sigmoid(beta (c - c')) + 1 - sigmoid(beta ((c - c') - (r - r')))`. For chosen outputs worse than the model's own.
pub(super) fn down(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let share = |ratio: Tensor| (ratio * options.beta).sigmoid();
    let (chosen, rejected) = (pairs.chosen.ratio(options), pairs.rejected.ratio(options));
    share(chosen.shallow_clone()) - share(chosen - rejected) + 1.0
}
