//! EXO with two outputs, Ji et al. 2024 (arXiv 2402.00856), eq. 16: `KL(p || q)` with `p = (sigmoid(beta m), sigmoid(-beta m))`, the
//! labels `q = (1 - e, e)`, `e = label_smoothing` and the margin `m = s(c - c') - s(r - r')`.

use tch::Tensor;

use crate::objective::logps::PairLogps;
use crate::objective::options::LossOptions;

/// The loss of each pair.
pub(super) fn losses(pairs: &PairLogps, options: LossOptions) -> Tensor {
    let x = pairs.margin(options) * options.beta;
    let term = |x: &Tensor, label: f64| x.sigmoid() * (x.log_sigmoid() - label.ln());
    term(&x, 1.0 - options.label_smoothing) + term(&-&x, options.label_smoothing)
}
