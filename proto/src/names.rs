//! Names that several programs use: metrics of a run (named as in TRL) and phases of a step.

/// Keys of `metrics.jsonl`. Keys of `eval_metrics.jsonl` have the prefix [`EVAL`](metric::EVAL).
pub mod metric {
    /// Prefix of the keys of an evaluation.
    pub const EVAL: &str = "eval_";
    /// Optimizer steps done.
    pub const STEP: &str = "step";
    /// Passes over the training data.
    pub const EPOCH: &str = "epoch";
    /// Mean loss: over pairs (DPO, nats), or over completion tokens (SFT, nats).
    pub const LOSS: &str = "loss";
    /// Global norm of the gradients before clipping.
    pub const GRAD_NORM: &str = "grad_norm";
    /// Learning rate of the step.
    pub const LEARNING_RATE: &str = "learning_rate";
    /// Mean reward of chosen completions, beta times nats.
    pub const REWARDS_CHOSEN: &str = "rewards/chosen";
    /// Mean reward of rejected completions.
    pub const REWARDS_REJECTED: &str = "rewards/rejected";
    /// Share of pairs whose chosen completion has the higher reward.
    pub const REWARDS_ACCURACIES: &str = "rewards/accuracies";
    /// Mean difference of the two rewards.
    pub const REWARDS_MARGINS: &str = "rewards/margins";
    /// Mean log-probability of chosen completions, nats.
    pub const LOGPS_CHOSEN: &str = "logps/chosen";
    /// Mean log-probability of rejected completions, nats.
    pub const LOGPS_REJECTED: &str = "logps/rejected";
    /// Share of pairs whose chosen completion is the likelier one.
    pub const LOGPS_ACCURACIES: &str = "logps/accuracies";
    /// Negative log-likelihood of the chosen completions per token, if it is a term of the loss of pairs.
    pub const NLL_LOSS: &str = "nll_loss";
    /// KL divergence of policy and reference per completion token, nats.
    pub const KL: &str = "kl";
    /// The same over the tokens of chosen completions.
    pub const KL_CHOSEN: &str = "kl/chosen";
    /// The same over the tokens of rejected completions.
    pub const KL_REJECTED: &str = "kl/rejected";
    /// Mean logit over the tokens of chosen completions and the vocabulary.
    pub const LOGITS_CHOSEN: &str = "logits/chosen";
    /// Mean logit over the tokens of rejected completions and the vocabulary.
    pub const LOGITS_REJECTED: &str = "logits/rejected";
    /// Entropy of the policy's distribution per completion token, nats.
    pub const ENTROPY: &str = "entropy";
    /// Share of the tokens of chosen completions that are the policy's most likely ones.
    pub const MEAN_TOKEN_ACCURACY: &str = "mean_token_accuracy";
    /// Loss terms that layers add, such as a router's; included in the loss. Absent without such layers.
    pub const AUX_LOSS: &str = "aux_loss";
    /// Tokens trained on so far.
    pub const NUM_TOKENS: &str = "num_tokens";
    /// Seconds of the step on the slowest rank.
    pub const STEP_SECONDS: &str = "step_seconds";
    /// Seconds of an evaluation on the slowest rank; gets no further prefix.
    pub const EVAL_SECONDS: &str = "eval_seconds";
    /// With early stopping: the best value so far of the metric that is compared.
    pub const BEST_METRIC: &str = "eval_best_metric";
    /// With early stopping: the step of the best evaluation so far.
    pub const BEST_STEP: &str = "eval_best_step";
    /// With early stopping: evaluations in a row without an improvement.
    pub const PATIENCE_COUNTER: &str = "eval_patience_counter";
    /// Tokens of all ranks per second.
    pub const TOKENS_PER_SECOND: &str = "tokens_per_second";
    /// Pairs of all ranks per second.
    pub const PAIRS_PER_SECOND: &str = "pairs_per_second";
    /// Peak memory in bytes; maximum over ranks.
    pub const PEAK_MEMORY_BYTES: &str = "peak_memory_bytes";
}

/// Phases of a step that a trainer reports and other programs look up.
pub mod phase {
    /// Waiting for the next step's tokens.
    pub const FETCH: &str = "fetch";
    /// Waiting for gradients that other ranks have not sent yet.
    pub const ALL_REDUCE_WAIT: &str = "all_reduce_wait";
}
