//! CPO, Xu et al. 2024 (arXiv 2401.08417), eq. 3 without its likelihood term, which `cpo_alpha` adds: `-log sigmoid(beta (c - r))`. It has
//! no reference model. With `label_smoothing = e` it is `-(1 - e) log sigmoid(x) - e log sigmoid(-x)`, as in TRL's `CPOTrainer`.

use tch::Tensor;

use super::smoothing::smoothed;
use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    smoothed(&((&pairs.chosen.policy - &pairs.rejected.policy) * options.beta), options.label_smoothing)
}
