//! The objective of a step: a pure function from log-probabilities of sequences to losses and derivatives, independent of the model.
//!
//! [`losses`] has one function for each loss. Their derivative comes from autograd over these small functions. The likelihood of the
//! chosen outputs, a mean over tokens, has a constant derivative. [`head`] turns both into gradients of hidden rows and weights.

pub mod divergence;
pub mod head;
pub mod logps;
mod losses;
pub mod options;
pub mod statistics;

use std::sync::Arc;

use dyad_proto::RunConfig;
use dyad_proto::run_config::{Objective, WeightedLoss};
use tch::{Kind, Tensor};

use self::logps::{OutputLogps, PairLogps, SequenceLogps, of_output};
use self::options::LossOptions;
use self::statistics::{DeviceSums, Statistic};

/// What an objective reads of each token.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenReading {
    /// `ld_alpha`: LD-DPO's weight of the tokens beyond the length of the shorter output, Liu et al. 2024 (arXiv 2409.06411). `None`
    /// is 1.
    pub tail_weight: Option<f64>,
    /// `use_weighting`: the losses of pairs are weighted as in WPO, Zhou et al. 2024 (arXiv 2406.11827).
    pub alignment: bool,
}

/// The objective of one step.
#[derive(Clone, Debug)]
pub struct StepObjective {
    /// What is minimised.
    objective: Objective,
    /// The losses whose weighted sum is the loss of a pair.
    losses: Arc<[WeightedLoss]>,
    options: LossOptions,
    reading: TokenReading,
    size: StepSize,
}

/// Numbers over all ranks and micro-batches by which a step's sums are divided.
#[derive(Clone, Copy, Debug)]
pub struct StepSize {
    /// Pairs.
    pub pairs: f64,
    /// Completion tokens of the chosen outputs.
    pub chosen_tokens: f64,
}

impl StepObjective {
    /// The objective of a run. Its size is that of an evaluation, which needs no derivative.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        Self {
            objective: config.objective(),
            losses: config.pair_losses().into(),
            options: LossOptions::of(config),
            reading: TokenReading { tail_weight: config.ld_alpha, alignment: config.use_weighting },
            size: StepSize { pairs: 1.0, chosen_tokens: 1.0 },
        }
    }

    /// The same objective in a step of this size.
    #[must_use]
    pub fn sized(&self, size: StepSize) -> Self {
        Self { size, ..self.clone() }
    }

    /// What the objective reads of each token.
    #[must_use]
    pub fn token_reading(&self) -> TokenReading {
        self.reading
    }

    /// Whether the loss of a pair depends on all pairs of the step.
    #[must_use]
    pub fn couples_pairs(&self) -> bool {
        self.objective.couples_pairs()
    }

    /// Whether each labelled answer is also scored with its partner's answer.
    #[must_use]
    pub fn estimates_kl(&self) -> bool {
        self.objective.estimates_kl()
    }

    /// Loss, derivative and statistics of some sequences: chosen and rejected in turn for preference losses, an answer and its partner's in
    /// turn to estimate the KL divergence, otherwise one answer of each record.
    #[must_use]
    pub fn score(&self, sequences: &SequenceLogps<'_>) -> Scored {
        if self.objective.is_labelled() {
            self.labelled(sequences)
        } else if self.objective.scores_both_outputs() {
            self.preference(sequences)
        } else {
            self.fine_tuning(sequences)
        }
    }

    /// Labelled answers; if the objective estimates the KL divergence, each is followed by its partner's answer to the same prompt.
    fn labelled(&self, sequences: &SequenceLogps<'_>) -> Scored {
        let estimates = self.objective.estimates_kl();
        let of = |values: &Tensor, which: i64| match estimates {
            true => of_output(values, which),
            false => values.shallow_clone(),
        };
        let log_ratio = |policy: &Tensor, which: i64| match sequences.reference {
            Some(reference) => policy - of(reference, which),
            None => policy.shallow_clone(),
        };
        let leaf = of(sequences.policy, 0).detach().set_requires_grad(true);
        let kl = match estimates {
            true => losses::kto::kl_estimate(&log_ratio(&of(sequences.policy, 1), 1)),
            false => Tensor::zeros([], (Kind::Double, leaf.device())),
        };
        let desirable = sequences.desirable;
        let ratio = log_ratio(&leaf, 0);
        let losses = losses::kto::losses(&ratio, &kl, desirable, self.options) * sequences.weights;
        let losses = losses * self.losses.iter().map(|term| term.weight).sum::<f64>();
        let gradient = Tensor::run_backward(&[&losses.sum(Kind::Double)], &[&leaf], false, false).remove(0);
        let (reward, logps) = (ratio.detach() * self.options.beta, leaf.detach());
        let other = desirable.neg() + 1.0;
        let values = vec![
            (Statistic::Loss, losses.detach()),
            (Statistic::RewardsChosen, &reward * desirable),
            (Statistic::RewardsRejected, &reward * &other),
            (Statistic::LogpsChosen, &logps * desirable),
            (Statistic::LogpsRejected, &logps * &other),
            (Statistic::Desirable, desirable.shallow_clone()),
            (Statistic::KlEstimate, kl.expand_as(desirable)),
        ];
        Scored { gradient: gradient / self.size.pairs, likelihood_gradient: None, values }
    }

    fn preference(&self, sequences: &SequenceLogps<'_>) -> Scored {
        let leaf = sequences.policy.detach().set_requires_grad(true);
        let pairs = PairLogps::of(&leaf, sequences);
        let of_loss = |term: &WeightedLoss| losses::of_pairs(term.loss, &pairs, self.options) * term.weight;
        let losses = self.losses.iter().map(of_loss).reduce(|sum, loss| sum + loss);
        let losses = losses.map(|losses| losses * sequences.pair_weights());
        let gradient = losses.as_ref().map(|losses| {
            let total = losses.sum(Kind::Double);
            Tensor::run_backward(&[&total], &[&leaf], false, false).remove(0) / self.size.pairs
        });
        let gradient = gradient.unwrap_or_else(|| sequences.policy.zeros_like());
        let losses = losses.unwrap_or_else(|| sequences.weights.zeros_like());
        let mut values = vec![(Statistic::Loss, losses.detach())];
        values.extend(self.output_metrics(&pairs));
        let (likelihood_gradient, nll) = self.likelihood(sequences, &of_output(sequences.likelihood, 0));
        values.extend(nll);
        let likelihood_gradient =
            likelihood_gradient.map(|chosen| Tensor::stack(&[&chosen, &chosen.zeros_like()], 1).view([-1]));
        Scored { gradient, likelihood_gradient, values }
    }

    fn fine_tuning(&self, sequences: &SequenceLogps<'_>) -> Scored {
        let logps = sequences.likelihood;
        let (gradient, nll) = self.likelihood(sequences, logps);
        let mut values = vec![(Statistic::LogpsChosen, logps.shallow_clone())];
        values.extend(nll);
        let gradient = gradient.unwrap_or_else(|| logps.zeros_like());
        Scored { gradient, likelihood_gradient: None, values }
    }

    /// The likelihood term: its derivative with respect to the log-probabilities of the chosen outputs, and their negatives. `None` if
    /// the objective has no such term.
    fn likelihood(
        &self,
        sequences: &SequenceLogps<'_>,
        chosen: &Tensor,
    ) -> (Option<Tensor>, Option<(Statistic, Tensor)>) {
        let factor = self.objective.nll_weight();
        if factor == 0.0 {
            return (None, None);
        }
        let gradient = sequences.weights * (-factor / self.size.chosen_tokens);
        (Some(gradient), Some((Statistic::Nll, -(chosen * sequences.weights))))
    }

    /// The metrics `rewards/*` and `logps/*` of each pair.
    fn output_metrics(&self, pairs: &PairLogps) -> [(Statistic, Tensor); 6] {
        let per_token = self.objective.logs_per_token();
        let of = |output: &OutputLogps| {
            let (ratio, logp) = if per_token {
                (output.per_token(), output.per_token())
            } else {
                (output.log_ratio(), output.policy.shallow_clone())
            };
            (ratio.detach() * self.options.beta, logp.detach())
        };
        let ((chosen_reward, chosen), (rejected_reward, rejected)) = (of(&pairs.chosen), of(&pairs.rejected));
        [
            (Statistic::RewardsCorrect, chosen_reward.gt_tensor(&rejected_reward)),
            (Statistic::LogpsCorrect, chosen.gt_tensor(&rejected)),
            (Statistic::RewardsChosen, chosen_reward),
            (Statistic::RewardsRejected, rejected_reward),
            (Statistic::LogpsChosen, chosen),
            (Statistic::LogpsRejected, rejected),
        ]
    }
}

/// Results of an objective.
#[derive(Debug)]
pub struct Scored {
    /// `dL/d(log-probability)` of each sequence. `[sequences]`
    pub gradient: Tensor,
    /// `dL/d(log-probability)` of each sequence through the likelihood term, in which every token has weight 1. `None` without this
    /// term, and if [`Scored::gradient`] has it. `[sequences]`
    pub likelihood_gradient: Option<Tensor>,
    /// Values of each pair. `[pairs]`
    values: Vec<(Statistic, Tensor)>,
}

impl Scored {
    /// The same for a pass in which each labelled answer is followed by its partner's, which has no gradient.
    #[must_use]
    pub fn with_partners(self) -> Self {
        let gradient = Tensor::stack(&[&self.gradient, &self.gradient.zeros_like()], 1).view([-1]);
        Self { gradient, ..self }
    }

    /// Sums over the pairs.
    #[must_use]
    pub fn statistics(&self) -> DeviceSums {
        let sums: Vec<(Statistic, Tensor)> =
            self.values.iter().map(|(name, values)| (*name, values.sum(Kind::Double))).collect();
        DeviceSums::of(&sums, self.gradient.device())
    }

    /// The results of `pairs` pairs from the one with number `first`.
    #[must_use]
    pub fn narrow(&self, first: i64, pairs: i64) -> Self {
        let all = self.values.first().map_or(0, |(_, values)| values.numel());
        let per_pair = self.gradient.numel().checked_div(all).unwrap_or(1) as i64;
        let of_pairs = |values: &Tensor| values.narrow(0, first, pairs);
        let of_sequences =
            |values: &Tensor| values.view([-1, per_pair]).narrow(0, first, pairs).reshape([-1]);
        Self {
            gradient: of_sequences(&self.gradient),
            likelihood_gradient: self.likelihood_gradient.as_ref().map(of_sequences),
            values: self.values.iter().map(|(name, values)| (*name, of_pairs(values))).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
