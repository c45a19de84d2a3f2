//! The objective of a run and its properties. Other code should ask these methods instead of matching on training methods and losses.

use super::{LossType, ReferenceLogps, RunConfig, TrainingMethod};
use crate::Fault;

/// The function that a run minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// A preference loss: a mean over pairs, each a function of the log-probabilities of both outputs.
    Preference(LossType),
    /// Negative log-likelihood of the preferred outputs (supervised fine-tuning): a mean over their tokens.
    Likelihood,
}

impl Objective {
    /// Whether the non-preferred output is computed too.
    #[must_use]
    pub const fn scores_both_outputs(self) -> bool {
        matches!(self, Self::Preference(_))
    }

    /// Number of outputs of a pair that are computed.
    #[must_use]
    pub const fn outputs_per_pair(self) -> usize {
        if self.scores_both_outputs() { 2 } else { 1 }
    }

    /// Whether the loss compares the policy with a reference model.
    #[must_use]
    pub const fn needs_reference(self) -> bool {
        match self {
            Self::Preference(LossType::Sigmoid | LossType::Ipo) => true,
            Self::Preference(LossType::Simpo) | Self::Likelihood => false,
        }
    }

    /// Whether the loss is a mean over completion tokens instead of pairs.
    #[must_use]
    pub const fn is_per_token(self) -> bool {
        matches!(self, Self::Likelihood)
    }

    /// Reason for an error message; follows "reference_logps is set, but".
    const fn why_no_reference(self) -> &'static str {
        match self {
            Self::Likelihood => "supervised fine-tuning has no reference model",
            Self::Preference(_) => "loss_type = \"simpo\" has no reference model",
        }
    }
}

/// Default of SimPO's margin, as in TRL's `CPOConfig`.
const SIMPO_GAMMA: f64 = 0.5;

impl RunConfig {
    /// The function that the run minimises.
    #[must_use]
    pub fn objective(&self) -> Objective {
        match self.training_method {
            TrainingMethod::Dpo => Objective::Preference(self.loss_type),
            TrainingMethod::Sft => Objective::Likelihood,
        }
    }

    /// Target margin of SimPO.
    #[must_use]
    pub fn simpo_gamma(&self) -> f64 {
        self.simpo_gamma.unwrap_or(SIMPO_GAMMA)
    }

    /// Fails if a key about a reference model or about SimPO is set, but the run has no reference model or another loss.
    pub(super) fn check_objective(&self) -> Result<(), Fault> {
        let objective = self.objective();
        if self.keeps_references() && !objective.needs_reference() {
            let why = objective.why_no_reference();
            return Err(Fault::input(format!("reference_logps is set, but {why}")).hint(
                "remove reference_logps, or train with training_method = \"dpo\" and a loss that has a reference model",
            ));
        }
        if self.offload_reference {
            self.check_offload()?;
        }
        if self.simpo_gamma.is_some() && objective != Objective::Preference(LossType::Simpo) {
            return Err(Fault::input("simpo_gamma is set, but the loss is not SimPO")
                .hint("set loss_type = \"simpo\", or remove simpo_gamma"));
        }
        Ok(())
    }

    fn check_offload(&self) -> Result<(), Fault> {
        let objective = self.objective();
        let why = match (objective.needs_reference(), self.reference_logps, self.lora) {
            (false, ..) => objective.why_no_reference(),
            (_, ReferenceLogps::Precompute, _) => {
                "reference_logps = \"precompute\" frees the reference model"
            }
            (_, _, true) => "with lora the reference is the base model itself",
            _ => return Ok(()),
        };
        Err(Fault::input(format!("offload_reference is set, but {why}")).hint("remove offload_reference"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(keys: &str) -> Result<RunConfig, Fault> {
        let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\n";
        RunConfig::from_toml(&format!("{good}{keys}\n"), "run.toml", &[])
    }

    #[test]
    fn simpo_and_fine_tuning_have_no_reference() {
        let needs = |keys: &str| checked(keys).unwrap().objective().needs_reference();
        assert!(needs("") && needs("loss_type = \"ipo\""));
        assert!(!needs("loss_type = \"simpo\"") && !needs("training_method = \"sft\""));
    }

    #[test]
    fn reference_keys_are_refused_without_a_reference() {
        for method in ["loss_type = \"simpo\"", "training_method = \"sft\""] {
            for key in ["reference_logps = \"precompute\"", "offload_reference = true"] {
                let fault = checked(&format!("{method}\n{key}")).unwrap_err();
                assert!(fault.message.contains("no reference model"), "{fault}");
            }
        }
    }

    #[test]
    fn simpo_gamma_needs_the_simpo_loss() {
        assert_eq!(checked("loss_type = \"simpo\"").unwrap().simpo_gamma(), 0.5);
        assert_eq!(checked("loss_type = \"simpo\"\nsimpo_gamma = 0").unwrap().simpo_gamma(), 0.0);
        for keys in [
            "simpo_gamma = 1",
            "loss_type = \"ipo\"\nsimpo_gamma = 1",
            "training_method = \"sft\"\nsimpo_gamma = 1",
        ] {
            assert!(checked(keys).unwrap_err().message.starts_with("simpo_gamma is set"), "{keys}");
        }
        let fault = checked("loss_type = \"simpo\"\nsimpo_gamma = -1").unwrap_err();
        assert!(fault.message.starts_with("config key `simpo_gamma`: expected"), "{fault}");
    }
}
