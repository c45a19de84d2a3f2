//! DiscoPOP, Lu et al. 2024 (arXiv 2406.08414), eq. 5: `(1 - k) (-log sigmoid(x)) + k e^-x` with `k = sigmoid(x / tau)`, `x = beta m` and
//! the margin `m = s(c - c') - s(r - r')`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let x = pairs.margin(options) * options.beta;
    let blend = (&x / options.discopop_tau).sigmoid();
    &blend * (-&x).exp() - (-&blend + 1.0) * x.log_sigmoid()
}
