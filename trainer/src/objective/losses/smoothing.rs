//! The logistic loss with `label_smoothing`.

use tch::Tensor;

/// `-(1 - e) log sigmoid(x) - e log sigmoid(-x)`.
pub(super) fn smoothed(x: &Tensor, e: f64) -> Tensor {
    let loss = -x.log_sigmoid();
    if e == 0.0 { loss } else { loss * (1.0 - e) - (-x).log_sigmoid() * e }
}
