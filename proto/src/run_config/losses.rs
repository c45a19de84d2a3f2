//! Losses by TRL's names, and what each of them reads. `docs/config.md` has the formulas.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// DPO, Rafailov et al. 2023 (arXiv 2305.18290).
    Sigmoid,
    /// DPO of scores per token, as in Tülu 3, Lambert et al. 2024 (arXiv 2411.15124).
    SigmoidNorm,
    /// Hinge, as in SLiC, Zhao et al. 2023 (arXiv 2305.10425).
    Hinge,
    /// IPO, Azar et al. 2023 (arXiv 2310.12036).
    Ipo,
    /// EXO with two outputs, Ji et al. 2024 (arXiv 2402.00856).
    ExoPair,
    /// NCA with two outputs, Chen et al. 2024 (arXiv 2402.05369).
    NcaPair,
    /// Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409).
    Robust,
    /// BCO with two outputs and no shift, Jung et al. 2024 (arXiv 2404.04656).
    BcoPair,
    /// SPPO with hard labels, Wu et al. 2024 (arXiv 2405.00675).
    SppoHard,
    /// Alignment via optimal transport, paired, Melnyk et al. 2024 (arXiv 2406.05882).
    Aot,
    /// Alignment via optimal transport, unpaired, of the same paper.
    AotUnpaired,
    /// APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    ApoZero,
    /// APO-down, of the same paper.
    ApoDown,
    /// DiscoPOP, Lu et al. 2024 (arXiv 2406.08414).
    Discopop,
    /// Negative log-likelihood of the chosen outputs, a mean over tokens.
    Sft,
    /// SimPO, Meng et al. 2024 (arXiv 2405.14734).
    Simpo,
    /// CPO, Xu et al. 2024 (arXiv 2401.08417).
    Cpo,
    /// ORPO, Hong et al. 2024 (arXiv 2403.07691).
    Orpo,
    /// KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), of labelled answers.
    Kto,
    /// APO-zero of labelled answers, D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    ApoZeroUnpaired,
}

impl LossType {
    /// Every loss.
    pub const ALL: [Self; 20] = [
        Self::Sigmoid,
        Self::SigmoidNorm,
        Self::Hinge,
        Self::Ipo,
        Self::ExoPair,
        Self::NcaPair,
        Self::Robust,
        Self::BcoPair,
        Self::SppoHard,
        Self::Aot,
        Self::AotUnpaired,
        Self::ApoZero,
        Self::ApoDown,
        Self::Discopop,
        Self::Sft,
        Self::Simpo,
        Self::Cpo,
        Self::Orpo,
        Self::Kto,
        Self::ApoZeroUnpaired,
    ];

    /// Whether the loss compares the policy with a reference model.
    #[must_use]
    pub const fn needs_reference(self) -> bool {
        !matches!(self, Self::Sft) && !self.stands_alone()
    }

    /// Whether the loss has no reference model and is not combined with others.
    #[must_use]
    pub const fn stands_alone(self) -> bool {
        matches!(self, Self::Simpo | Self::Cpo | Self::Orpo)
    }

    /// Whether the loss reads only the difference of the two scores, so that an f-divergence may take the place of the
    /// log-ratio: its normalisation constant cancels.
    #[must_use]
    pub const fn takes_f_divergence(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Hinge
                | Self::Ipo
                | Self::ExoPair
                | Self::Robust
                | Self::Discopop
                | Self::Sft
        )
    }

    /// Whether `label_smoothing` changes the loss.
    #[must_use]
    pub const fn takes_label_smoothing(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::ExoPair
                | Self::Robust
                | Self::Aot
                | Self::AotUnpaired
                | Self::Simpo
                | Self::Cpo
        )
    }

    /// Whether the loss divides log-ratios by the number of tokens by itself.
    #[must_use]
    pub const fn is_normalized(self) -> bool {
        matches!(self, Self::SigmoidNorm | Self::Ipo | Self::Simpo | Self::Orpo)
    }

    /// Whether `rewards/*` and `logps/*` are per token, as TRL logs them for this loss.
    #[must_use]
    pub const fn logs_per_token(self) -> bool {
        matches!(self, Self::Simpo | Self::Orpo)
    }

    /// Whether the loss of a pair depends on the other pairs of the step.
    #[must_use]
    pub const fn couples_pairs(self) -> bool {
        matches!(self, Self::Aot | Self::AotUnpaired | Self::Kto)
    }

    /// Whether the loss is one of labelled answers: an answer is desirable or not, and has no other answer beside it.
    #[must_use]
    pub const fn is_labelled(self) -> bool {
        matches!(self, Self::Kto | Self::ApoZeroUnpaired)
    }

    /// Whether the loss estimates the KL divergence of policy and reference from answers to other prompts of the step.
    #[must_use]
    pub const fn estimates_kl(self) -> bool {
        matches!(self, Self::Kto)
    }

    /// Its name in a configuration.
    #[must_use]
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// The value of `loss_type`: one loss, or several whose weighted sum is minimised. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LossTypes(Vec<LossType>);

impl From<LossType> for LossTypes {
    fn from(loss: LossType) -> Self {
        Self(vec![loss])
    }
}

impl LossTypes {
    /// The losses, in the order of the configuration.
    #[must_use]
    pub fn all(&self) -> &[LossType] {
        &self.0
    }

    /// Whether one of the losses is this one.
    #[must_use]
    pub fn contains(&self, loss: LossType) -> bool {
        self.0.contains(&loss)
    }

    /// The losses as text for a message: `"sigmoid"`, or `["sigmoid", "sft"]`.
    #[must_use]
    pub fn shown(&self) -> String {
        serde_json::to_string(self).unwrap_or_default().replace("\",\"", "\", \"")
    }
}

/// One loss is written as a text, several as a list.
impl Serialize for LossTypes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let [loss] = self.0.as_slice() {
            return loss.serialize(serializer);
        }
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        self.0.iter().try_for_each(|loss| list.serialize_element(loss))?;
        list.end()
    }
}

impl<'de> Deserialize<'de> for LossTypes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NameOrList)
    }
}

struct NameOrList;

impl<'de> Visitor<'de> for NameOrList {
    type Value = LossTypes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a loss, or a list of names")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<LossTypes, E> {
        LossType::deserialize(StrDeserializer::new(name)).map(LossTypes::from)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LossTypes, A::Error> {
        let mut losses = Vec::new();
        while let Some(loss) = list.next_element()? {
            losses.push(loss);
        }
        if losses.is_empty() {
            return Err(serde::de::Error::custom("the list of losses is empty"));
        }
        Ok(LossTypes(losses))
    }
}

/// The divergence that the reference holds the policy by, by TRL's names. See Wang et al. 2023 (arXiv 2309.16240).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FDivergenceType {
    /// KL(policy || reference), the divergence of DPO.
    ReverseKl,
    /// KL(reference || policy).
    ForwardKl,
    /// Jensen-Shannon divergence.
    JsDivergence,
    /// Alpha-divergence with `f_alpha_divergence_coef`.
    AlphaDivergence,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loss_is_written_as_text_and_several_as_a_list() {
        for text in ["\"sigmoid\"", "[\"sigmoid\",\"sft\"]"] {
            let losses: LossTypes = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&losses).unwrap(), text);
        }
        let one: LossTypes = serde_json::from_str("[\"ipo\"]").unwrap();
        assert_eq!(serde_json::to_string(&one).unwrap(), "\"ipo\"");
    }

    #[test]
    fn unknown_and_missing_losses_are_refused() {
        let refused = |text: &str| serde_json::from_str::<LossTypes>(text).unwrap_err().to_string();
        assert!(refused("\"ipo9\"").contains("unknown variant `ipo9`, expected one of `sigmoid`"));
        assert!(refused("[\"sigmoid\", \"x\"]").contains("unknown variant `x`"));
        assert!(refused("[]").contains("the list of losses is empty"));
        assert!(refused("3").contains("expected the name of a loss, or a list of names"));
    }

    #[test]
    fn every_loss_is_in_the_list_of_all() {
        let unknown = serde_json::from_str::<LossType>("\"x\"").unwrap_err().to_string();
        let names: Vec<String> = unknown.split('`').skip(3).step_by(2).map(str::to_owned).collect();
        assert_eq!(names, LossType::ALL.map(LossType::name));
    }
}
