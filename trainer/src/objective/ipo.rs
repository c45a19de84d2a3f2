//! IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17: `(h - 1 / (2 beta))²` with `h = (c - c') / |c| - (r - r') / |r|`.
//!
//! The log-ratios are divided by the number of completion tokens, as in TRL; the paper's eq. 17 has sums. `beta` is the paper's tau.

use super::logps::PairLogps;
use super::{LossOptions, OutputScores, PairScores};

/// Loss and rewards of each pair; rewards are `beta` times the log-ratios, which are sums.
pub(super) fn scores(pairs: &PairLogps, LossOptions { beta, .. }: LossOptions) -> PairScores {
    let (chosen, rejected) = (pairs.chosen.log_ratio(), pairs.rejected.log_ratio());
    let margin = &chosen / pairs.chosen.tokens() - &rejected / pairs.rejected.tokens();
    PairScores {
        loss: (margin - 1.0 / (2.0 * beta)).square(),
        chosen: OutputScores { reward: chosen * beta, logp: pairs.chosen.policy.shallow_clone() },
        rejected: OutputScores { reward: rejected * beta, logp: pairs.rejected.policy.shallow_clone() },
    }
}
