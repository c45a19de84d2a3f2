//! The objective of a run and its properties. Other code should ask these methods instead of matching on training methods and losses.

use super::{LossType, RunConfig, TrainingMethod};

/// What the function that a run minimises reads, and how its terms are averaged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    answers: Answers,
    estimates_kl: bool,
    needs_reference: bool,
    couples_pairs: bool,
    logs_per_token: bool,
    nll_weight: f64,
}

/// The answers of a record that an objective reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answers {
    /// The preferred one.
    Chosen,
    /// The preferred and the other one.
    Both,
    /// The only one, with its label.
    Labelled,
}

impl Objective {
    /// Supervised fine-tuning: negative log-likelihood of the preferred outputs, a mean over their tokens.
    pub const LIKELIHOOD: Self = Self {
        answers: Answers::Chosen,
        estimates_kl: false,
        needs_reference: false,
        couples_pairs: false,
        logs_per_token: false,
        nll_weight: 1.0,
    };

    /// A preference objective with one loss and no further keys.
    #[must_use]
    pub fn of_loss(loss: LossType) -> Self {
        RunConfig { loss_type: loss.into(), ..RunConfig::default() }.objective()
    }

    /// Whether the non-preferred output is computed too.
    #[must_use]
    pub const fn scores_both_outputs(self) -> bool {
        matches!(self.answers, Answers::Both)
    }

    /// Whether the records are labelled answers.
    #[must_use]
    pub const fn is_labelled(self) -> bool {
        matches!(self.answers, Answers::Labelled)
    }

    /// Whether each record is also scored with the answer of another record of the step, to estimate the KL divergence of policy and
    /// reference.
    #[must_use]
    pub const fn estimates_kl(self) -> bool {
        self.estimates_kl
    }

    /// Number of outputs of a pair that are computed.
    #[must_use]
    pub const fn outputs_per_pair(self) -> usize {
        if self.scores_both_outputs() { 2 } else { 1 }
    }

    /// Whether the loss compares the policy with a reference model.
    #[must_use]
    pub const fn needs_reference(self) -> bool {
        self.needs_reference
    }

    /// Whether the loss of a pair depends on all pairs of the step.
    #[must_use]
    pub const fn couples_pairs(self) -> bool {
        self.couples_pairs
    }

    /// Whether `rewards/*` and `logps/*` are per token.
    #[must_use]
    pub const fn logs_per_token(self) -> bool {
        self.logs_per_token
    }

    /// Factor of the negative log-likelihood of the chosen outputs, a mean over tokens; the other terms of the loss are means over
    /// pairs. 0 if the loss has no such term.
    #[must_use]
    pub const fn nll_weight(self) -> f64 {
        self.nll_weight
    }
}

/// A loss of each pair and its factor in the sum that is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightedLoss {
    /// The loss.
    pub loss: LossType,
    /// Its entry of `loss_weights`.
    pub weight: f64,
}

/// Default of SimPO's margin, as in TRL's `CPOConfig`.
const SIMPO_GAMMA: f64 = 0.5;

impl RunConfig {
    /// What the run minimises.
    #[must_use]
    pub fn objective(&self) -> Objective {
        match self.training_method {
            TrainingMethod::Sft => Objective::LIKELIHOOD,
            TrainingMethod::Dpo => {
                let losses: Vec<LossType> = self.pair_losses().iter().map(|term| term.loss).collect();
                let any = |property: fn(LossType) -> bool| losses.iter().copied().any(property);
                Objective {
                    answers: if any(LossType::is_labelled) { Answers::Labelled } else { Answers::Both },
                    estimates_kl: any(LossType::estimates_kl),
                    needs_reference: any(LossType::needs_reference) && !self.dpo_reference_free,
                    couples_pairs: any(LossType::couples_pairs),
                    logs_per_token: any(LossType::logs_per_token),
                    nll_weight: self.nll_weight(),
                }
            }
        }
    }

    /// The losses of pairs, without the negative log-likelihood. A `simpo_gamma` above 0 turns `sigmoid` into SimPO.
    #[must_use]
    pub fn pair_losses(&self) -> Vec<WeightedLoss> {
        let simpo = self.simpo_gamma.is_some_and(|gamma| gamma > 0.0);
        let effective = |loss| if simpo && loss == LossType::Sigmoid { LossType::Simpo } else { loss };
        let terms = self.weighted_losses().filter(|term| term.loss != LossType::Sft);
        terms.map(|term| WeightedLoss { loss: effective(term.loss), ..term }).collect()
    }

    fn weighted_losses(&self) -> impl Iterator<Item = WeightedLoss> {
        let weights = self.loss_weights.iter().flatten().copied().chain(std::iter::repeat(1.0));
        self.loss_type.all().iter().zip(weights).map(|(&loss, weight)| WeightedLoss { loss, weight })
    }

    fn nll_weight(&self) -> f64 {
        let of_loss = |term: WeightedLoss| match term.loss {
            LossType::Sft => term.weight,
            LossType::Cpo => term.weight * self.cpo_alpha(),
            LossType::Orpo => term.weight,
            _ => 0.0,
        };
        self.rpo_alpha + self.weighted_losses().map(of_loss).sum::<f64>()
    }

    /// Share of the policy in a reference model that moves.
    #[must_use]
    pub fn ref_model_mixup_alpha(&self) -> f64 {
        self.ref_model_mixup_alpha.unwrap_or(0.6)
    }

    /// Steps from one move of the reference model to the next.
    #[must_use]
    pub fn ref_model_sync_steps(&self) -> u64 {
        self.ref_model_sync_steps.unwrap_or(512)
    }

    /// Target margin of SimPO.
    #[must_use]
    pub fn simpo_gamma(&self) -> f64 {
        self.simpo_gamma.unwrap_or(SIMPO_GAMMA)
    }

    /// Factor of CPO's negative log-likelihood.
    #[must_use]
    pub fn cpo_alpha(&self) -> f64 {
        self.cpo_alpha.unwrap_or(1.0)
    }

    /// The alpha of the alpha-divergence.
    #[must_use]
    pub fn f_alpha_divergence_coef(&self) -> f64 {
        self.f_alpha_divergence_coef.unwrap_or(0.5)
    }

    /// Temperature with which DiscoPOP blends its two losses.
    #[must_use]
    pub fn discopop_tau(&self) -> f64 {
        self.discopop_tau.unwrap_or(0.05)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fault;

    fn checked(keys: &str) -> Result<RunConfig, Fault> {
        let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\n";
        RunConfig::from_toml(&format!("{good}{keys}\n"), "run.toml", &[])
    }

    #[test]
    fn objectives_without_a_reference_have_none() {
        let needs = |keys: &str| checked(keys).unwrap().objective().needs_reference();
        assert!(needs("") && needs("loss_type = \"ipo\"") && needs("loss_type = [\"sigmoid\", \"sft\"]"));
        for keys in [
            "loss_type = \"simpo\"",
            "loss_type = \"cpo\"",
            "loss_type = \"orpo\"",
            "simpo_gamma = 0.3",
            "dpo_reference_free = true",
            "training_method = \"sft\"",
        ] {
            assert!(!needs(keys), "{keys}");
        }
    }

    #[test]
    fn a_margin_turns_dpo_into_simpo() {
        let loss = |keys: &str| checked(keys).unwrap().pair_losses()[0].loss;
        assert_eq!(loss("simpo_gamma = 0.3"), LossType::Simpo);
        assert_eq!(loss("simpo_gamma = 0.0"), LossType::Sigmoid);
        assert_eq!(checked("loss_type = \"simpo\"").unwrap().simpo_gamma(), 0.5);
        assert_eq!(checked("loss_type = \"simpo\"\nsimpo_gamma = 0").unwrap().simpo_gamma(), 0.0);
    }

    #[test]
    fn every_way_to_add_the_likelihood_sets_its_weight() {
        let weight = |keys: &str| checked(keys).unwrap().objective().nll_weight();
        for (keys, expected) in [
            ("", 0.0),
            ("rpo_alpha = 0.25", 0.25),
            ("loss_type = [\"sigmoid\", \"sft\"]\nloss_weights = [1.0, 0.5]", 0.5),
            ("loss_type = \"orpo\"", 1.0),
            ("loss_type = \"cpo\"", 1.0),
            ("loss_type = \"cpo\"\ncpo_alpha = 0", 0.0),
            ("training_method = \"sft\"", 1.0),
        ] {
            assert_eq!(weight(keys), expected, "{keys}");
        }
    }

    #[test]
    fn loss_weights_go_with_their_losses() {
        let config =
            checked("loss_type = [\"ipo\", \"sft\", \"hinge\"]\nloss_weights = [2, 1, 0.5]").unwrap();
        let terms: Vec<_> = config.pair_losses().iter().map(|term| (term.loss, term.weight)).collect();
        assert_eq!(terms, [(LossType::Ipo, 2.0), (LossType::Hinge, 0.5)]);
    }
}
