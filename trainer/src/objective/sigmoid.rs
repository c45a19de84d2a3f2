//! DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7: `-log sigmoid(beta ((c - c') - (r - r')))`.

use super::logps::PairLogps;
use super::{LossOptions, OutputScores, PairScores};

/// Loss and rewards of each pair; rewards are `beta` times the log-ratios.
pub(super) fn scores(pairs: &PairLogps, LossOptions { beta, .. }: LossOptions) -> PairScores {
    let (chosen, rejected) = (pairs.chosen.log_ratio() * beta, pairs.rejected.log_ratio() * beta);
    PairScores {
        loss: -(&chosen - &rejected).log_sigmoid(),
        chosen: OutputScores { reward: chosen, logp: pairs.chosen.policy.shallow_clone() },
        rejected: OutputScores { reward: rejected, logp: pairs.rejected.policy.shallow_clone() },
    }
}
