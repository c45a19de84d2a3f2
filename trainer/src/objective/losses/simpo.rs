//! SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6: `-log sigmoid(x)` with `x = beta (c / |c| - r / |r|) - gamma`. It has no reference
//! model. With `label_smoothing = e` it is `-(1 - e) log sigmoid(x) - e log sigmoid(-x)`, as in TRL's `CPOTrainer`.

use tch::Tensor;

use super::smoothing::smoothed;
use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let margin = pairs.chosen.per_token() - pairs.rejected.per_token();
    smoothed(&(margin * options.beta - options.simpo_gamma), options.label_smoothing)
}
