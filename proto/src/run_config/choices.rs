//! Types of configuration keys that have a fixed set of values.

use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Training method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainingMethod {
    /// Direct preference optimisation on both outputs.
    Dpo,
    /// Supervised fine-tuning on the preferred outputs.
    Sft,
}

/// Form of the data files, by the names of the hosted API and TRL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetFormat {
    /// The first record of a file decides.
    #[default]
    Auto,
    /// `input`, `preferred_output`, `non_preferred_output`.
    PreferenceOpenai,
    /// `prompt`, `chosen`, `rejected`.
    Preference,
    /// `prompt`, `completion`, `label`.
    UnpairedPreference,
    /// `prompt`, `completion`.
    PromptCompletion,
    /// `messages`.
    Messages,
    /// `text`.
    Text,
}

/// Whether supervised fine-tuning trains the tokens of inputs too: true, false or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrainOnInputs {
    /// Not in records that have inputs. `text` has none: all of its tokens are trained.
    #[default]
    Auto,
    /// All tokens are trained.
    Yes,
    /// Only tokens of answers are trained.
    No,
}

impl Serialize for TrainOnInputs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Yes => serializer.serialize_bool(true),
            Self::No => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for TrainOnInputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Choice;
        impl Visitor<'_> for Choice {
            type Value = TrainOnInputs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or \"auto\"")
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<TrainOnInputs, E> {
                Ok(if value { TrainOnInputs::Yes } else { TrainOnInputs::No })
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<TrainOnInputs, E> {
                match value {
                    "auto" => Ok(TrainOnInputs::Auto),
                    other => Err(E::invalid_value(Unexpected::Str(other), &self)),
                }
            }
        }
        deserializer.deserialize_any(Choice)
    }
}

/// Shape of the learning rate over the run, by transformers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Straight line from the full rate to `min_lr_ratio` of it.
    Linear,
    /// `scheduler_num_cycles` waves of a cosine between the full rate and `min_lr_ratio` of it; by default half a wave.
    Cosine,
    /// `scheduler_num_cycles` half waves of a cosine, each from the full rate to `min_lr_ratio` of it; by default one.
    CosineWithRestarts,
    /// The full rate divided by the square root of the steps, counted in units of the warmup.
    InverseSqrt,
    /// The full rate throughout (after warmup).
    Constant,
}

impl LrSchedulerType {
    /// Default of `scheduler_num_cycles`; `None` for a shape without cycles.
    #[must_use]
    pub const fn usual_cycles(self) -> Option<f64> {
        match self {
            Self::Cosine => Some(0.5),
            Self::CosineWithRestarts => Some(1.0),
            Self::Linear | Self::InverseSqrt | Self::Constant => None,
        }
    }
}

/// Precision of the forward and backward passes; master weights are always float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single precision.
    Float32,
    /// bfloat16 with float32 master weights.
    Bfloat16,
    /// bfloat16 if the device computes it fast, otherwise float32.
    Auto,
}

/// Precision in which gradients are sent between trainers; they are summed and stored in float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReduceDtype {
    /// Unrounded.
    Float32,
    /// Rounded, with half the bytes.
    Bfloat16,
}

/// When the reference model's log-probabilities are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceLogps {
    /// In every step, together with the policy.
    Compute,
    /// When a pair is first seen; later epochs and later runs reuse them.
    Cache,
    /// For all pairs before the first step; the reference model is then freed.
    Precompute,
}

/// Which trainers read the model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelLoading {
    /// Like `Broadcast` if trainers are on several hosts, or if the model is on a network file system or missing on a host; otherwise
    /// like `Every`.
    Auto,
    /// Every trainer reads them.
    Every,
    /// Rank 0 reads them and sends them to the others.
    Broadcast,
}

/// Which layers are recomputed in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpointing {
    /// None.
    None,
    /// The lower half.
    Selective,
    /// All.
    Full,
    /// As few as necessary to fit into free memory.
    Auto,
}

/// The optimizer, by transformers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optim {
    /// AdamW with float32 moments.
    Adamw,
    /// AdamW with 8-bit moments, quantised in blocks.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}
