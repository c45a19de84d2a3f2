//! The objective of a step: a pure function from log-probabilities of sequences to losses and derivatives, independent of the model.
//!
//! Each loss is one file with one function: from the log-probabilities of some pairs to the loss and the rewards of each pair.
//! The derivative comes from autograd over this small function. [`head`] turns it into gradients of hidden rows and weights.
//!
//! In the formulas, `c` and `r` are the log-probabilities of the chosen and the rejected output under the policy, `c'` and `r'` those
//! under the reference model: sums over completion tokens, in nats. `|c|` and `|r|` are numbers of completion tokens.

pub mod head;
mod ipo;
pub mod logps;
mod sigmoid;
mod simpo;
pub mod statistics;

use dyad_proto::RunConfig;
use dyad_proto::run_config::{LossType, Objective};
use tch::{Kind, Tensor};

use self::logps::{PairLogps, SequenceLogps};
use self::statistics::{DeviceSums, Statistic};

/// Parameters of the losses, from the configuration.
#[derive(Clone, Copy, Debug)]
pub struct LossOptions {
    /// `dpo_beta`: strength of the pull towards the reference; IPO's tau.
    pub beta: f64,
    /// `simpo_gamma`: SimPO's target margin.
    pub simpo_gamma: f64,
}

/// The objective of one step.
#[derive(Clone, Copy, Debug)]
pub struct StepObjective {
    /// What is minimised.
    pub objective: Objective,
    /// Parameters of its loss.
    pub options: LossOptions,
    /// Pairs of all ranks and micro-batches; chosen completion tokens if the loss is a mean over tokens.
    pub divisor: f64,
}

impl StepObjective {
    /// The objective of a run. Its divisor is that of an evaluation, which needs no derivative.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        let options = LossOptions { beta: config.dpo_beta, simpo_gamma: config.simpo_gamma() };
        Self { objective: config.objective(), options, divisor: 1.0 }
    }

    /// Loss, derivative and statistics of some sequences: chosen and rejected in turn for preference losses, otherwise chosen alone.
    #[must_use]
    pub fn score(&self, sequences: &SequenceLogps<'_>) -> Scored {
        match self.objective {
            Objective::Preference(loss) => self.preference(pair_loss(loss), sequences),
            Objective::Likelihood => self.likelihood(sequences.policy),
        }
    }

    fn preference(&self, pair_loss: PairLoss, sequences: &SequenceLogps<'_>) -> Scored {
        let leaf = sequences.policy.detach().set_requires_grad(true);
        let scores = pair_loss(&PairLogps::of(&leaf, sequences), self.options);
        let total = scores.loss.sum(Kind::Double);
        let gradient = Tensor::run_backward(&[&total], &[&leaf], false, false).remove(0) / self.divisor;
        Scored { gradient, statistics: scores.statistics() }
    }

    fn likelihood(&self, logps: &Tensor) -> Scored {
        let total = logps.sum(Kind::Double);
        let statistics = [(Statistic::Loss, -&total), (Statistic::LogpsChosen, total)];
        Scored {
            gradient: logps.full_like(-1.0 / self.divisor),
            statistics: DeviceSums::of(&statistics, logps.device()),
        }
    }
}

/// Results of an objective.
#[derive(Debug)]
pub struct Scored {
    /// `dL/d(log-probability)` of each sequence, divided by the step's divisor. `[sequences]`
    pub gradient: Tensor,
    /// Sums over the sequences.
    pub statistics: DeviceSums,
}

/// A loss: scores of pairs from their log-probabilities.
type PairLoss = fn(&PairLogps, LossOptions) -> PairScores;

/// The function of each loss.
fn pair_loss(loss: LossType) -> PairLoss {
    match loss {
        LossType::Sigmoid => sigmoid::scores,
        LossType::Ipo => ipo::scores,
        LossType::Simpo => simpo::scores,
    }
}

/// Scores that a loss gives each pair. All `[pairs]`, float64.
#[derive(Debug)]
struct PairScores {
    /// The loss, whose sum is differentiated.
    loss: Tensor,
    /// Metrics `rewards/chosen` and `logps/chosen`.
    chosen: OutputScores,
    /// Metrics `rewards/rejected` and `logps/rejected`.
    rejected: OutputScores,
}

/// Metrics of one output of each pair.
#[derive(Debug)]
struct OutputScores {
    reward: Tensor,
    logp: Tensor,
}

impl PairScores {
    fn statistics(&self) -> DeviceSums {
        let sum = |values: &Tensor| values.detach().sum(Kind::Double);
        let (chosen, rejected) = (&self.chosen, &self.rejected);
        let sums = [
            (Statistic::Loss, sum(&self.loss)),
            (Statistic::RewardsChosen, sum(&chosen.reward)),
            (Statistic::RewardsRejected, sum(&rejected.reward)),
            (Statistic::RewardsCorrect, sum(&chosen.reward.gt_tensor(&rejected.reward))),
            (Statistic::LogpsChosen, sum(&chosen.logp)),
            (Statistic::LogpsRejected, sum(&rejected.logp)),
            (Statistic::LogpsCorrect, sum(&chosen.logp.gt_tensor(&rejected.logp))),
        ];
        DeviceSums::of(&sums, self.loss.device())
    }
}

#[cfg(test)]
mod tests;
