//! DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: `-log sigmoid(beta m)` with the margin `m = s(c - c') - s(r - r')`.
//!
//! With `label_smoothing = e` it is conservative DPO (Mitchell 2023, <https://ericmitchell.ai/cdpo.pdf>, eq. 3):
//! `-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)`.

use tch::Tensor;

use super::smoothing::smoothed;
use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    smoothed(&(pairs.margin(options) * options.beta), options.label_smoothing)
}
