//! Keys of the run configuration that take one of a few words.

use serde::{Deserialize, Serialize};

/// What the run optimises.
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
    /// bfloat16 where the device is fast at it, float32 elsewhere.
    Auto,
}

/// Precision in which gradients travel between trainers; they are added up and kept in float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReduceDtype {
    /// As they are.
    Float32,
    /// Rounded: half the bytes.
    Bfloat16,
}

/// Preference loss, by TRL's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// `-log sigmoid(beta * margin)`, the loss of Rafailov et al. 2023 (arXiv 2305.18290).
    Sigmoid,
    /// `(h - 1 / (2 beta))²` of the log-ratios' difference per token, Azar et al. 2023 (arXiv 2310.12036).
    Ipo,
    /// `-log sigmoid(beta * h - gamma)` of log-probabilities per token, without a reference, Meng et al. 2024 (arXiv 2405.14734).
    Simpo,
}

/// How DPO comes by the reference model's log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceLogps {
    /// In every step, beside the policy.
    Compute,
    /// The first time that a pair is seen; later epochs and later runs reuse them.
    Cache,
    /// For all pairs before the first step; the reference model is then freed.
    Precompute,
}

/// Which trainers read the model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelLoading {
    /// One, where trainers are on several hosts, the model on a network file system, or not at every trainer.
    Auto,
    /// Every trainer.
    Every,
    /// The one of rank 0; it sends them to the others.
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
    /// As many as it takes to fit into the memory that is free.
    Auto,
}

/// The optimizer, by transformers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optim {
    /// AdamW with float32 moments.
    Adamw,
    /// AdamW with moments of 8 bits, quantised in blocks.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}
