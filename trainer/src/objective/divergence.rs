//! The key `f_divergence_type`: f-DPO, Wang et al. 2023 (arXiv 2309.16240).
//!
//! DPO's log-ratio `x = log p - log p'` is replaced by `s(x) = f'(e^x)` without its constant, which cancels in the difference of two
//! scores.

use dyad_proto::RunConfig;
use dyad_proto::run_config::FDivergenceType;
use tch::Tensor;

/// Largest exponent of the alpha-divergence, as in TRL: `e^80` is finite in float32.
const MOST: f64 = 80.0;

/// Within this distance of 1 the alpha-divergence is the reverse KL.
const NEAR_ONE: f64 = 1e-6;

/// A divergence between policy and reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Divergence {
    /// `f(t) = t log t`, `s(x) = x`.
    ReverseKl,
    /// `f(t) = -log t`, `s(x) = 1 - e^-x`.
    ForwardKl,
    /// `f(t) = t log t - (t + 1) log((t + 1) / 2)`, `s(x) = log 2 + log sigmoid(x)`.
    JensenShannon,
    /// `s(x) = (e^((alpha - 1) x) - 1) / (alpha - 1)`.
    Alpha(f64),
}

impl Divergence {
    /// The divergence that the configuration names.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        match config.f_divergence_type {
            FDivergenceType::ReverseKl => Self::ReverseKl,
            FDivergenceType::ForwardKl => Self::ForwardKl,
            FDivergenceType::JsDivergence => Self::JensenShannon,
            FDivergenceType::AlphaDivergence => match config.f_alpha_divergence_coef() {
                alpha if (alpha - 1.0).abs() < NEAR_ONE => Self::ReverseKl,
                alpha => Self::Alpha(alpha),
            },
        }
    }

    /// `s(x)` of each log-ratio.
    pub(super) fn score(self, log_ratio: &Tensor) -> Tensor {
        match self {
            Self::ReverseKl => log_ratio.shallow_clone(),
            Self::ForwardKl => -(-log_ratio).expm1(),
            Self::JensenShannon => log_ratio.log_sigmoid() + std::f64::consts::LN_2,
            Self::Alpha(alpha) => (log_ratio * (alpha - 1.0)).clamp_max(MOST).expm1() / (alpha - 1.0),
        }
    }
}
