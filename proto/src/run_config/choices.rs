//! Types of configuration keys that have a fixed set of values.

use serde::{Deserialize, Serialize};

/// Training method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainingMethod {
    /// Direct preference optimisation on both outputs.
    Dpo,
    /// Supervised fine-tuning on the preferred outputs.
    Sft,
}

/// Shape of the learning rate over the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedulerType {
    /// Straight line from the full rate to `min_lr_ratio` of it.
    Linear,
    /// Half a cosine from the full rate to `min_lr_ratio` of it.
    Cosine,
    /// The full rate throughout (after warmup).
    Constant,
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
