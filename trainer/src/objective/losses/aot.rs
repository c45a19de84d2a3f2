//! Alignment via optimal transport, Melnyk et al. 2024 (arXiv 2406.05882). The pairs of a step are sorted, so each loss depends on all.
//!
//! With `d` the difference of two sorted lists, the loss is `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)`,
//! `e = label_smoothing`.

use tch::Tensor;

use super::smoothing::smoothed;
use crate::objective::logps::{OutputLogps, PairLogps};
use crate::objective::options::LossOptions;

/// Paired form: compares the sorted `c - r` with the sorted `c' - r'`.
pub(super) fn paired(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let reference = |output: &OutputLogps| {
        output.reference.as_ref().map_or_else(|| output.policy.zeros_like(), Tensor::shallow_clone)
    };
    let policy = &pairs.chosen.policy - &pairs.rejected.policy;
    transported(&policy, &(reference(&pairs.chosen) - reference(&pairs.rejected)), options)
}

/// Unpaired form: compares the sorted `c - c'` with the sorted `r - r'`.
pub(super) fn unpaired(pairs: &PairLogps, options: LossOptions) -> Tensor {
    transported(&pairs.chosen.log_ratio(), &pairs.rejected.log_ratio(), options)
}

fn transported(above: &Tensor, below: &Tensor, options: LossOptions) -> Tensor {
    let sorted = |values: &Tensor| values.sort_stable(true, 0, false).0;
    smoothed(&((sorted(above) - sorted(below)) * options.beta), options.label_smoothing)
}
