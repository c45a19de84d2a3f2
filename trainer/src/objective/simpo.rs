//! SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6: `-log sigmoid(beta (c / |c| - r / |r|) - gamma)`. It has no reference model.

use super::logps::PairLogps;
use super::{LossOptions, OutputScores, PairScores};

/// Loss and rewards of each pair. Rewards are `beta` times the log-probability per token. `logps/*` are per token, too, as TRL's
/// `CPOTrainer` logs them for this loss.
pub(super) fn scores(pairs: &PairLogps, LossOptions { beta, simpo_gamma }: LossOptions) -> PairScores {
    let per_token = |output: &super::logps::OutputLogps| &output.policy / output.tokens();
    let (chosen, rejected) = (per_token(&pairs.chosen), per_token(&pairs.rejected));
    PairScores {
        loss: -((&chosen - &rejected) * beta - simpo_gamma).log_sigmoid(),
        chosen: OutputScores { reward: &chosen * beta, logp: chosen },
        rejected: OutputScores { reward: &rejected * beta, logp: rejected },
    }
}
