//! What a change of each configuration key means for a run that is resumed.

use serde_json::Value;

use crate::RunConfig;
use crate::run_config::{LossType, Objective};

/// How a resume treats a key whose value differs from the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Changes the numbers: the resume is refused.
    Computes,
    /// A path: the content is compared, not the path.
    Content,
    /// May be neutral (absent or `auto`): trainers resolve it and report the result as a fact, which is compared. If both values are
    /// explicit, they are compared directly.
    Resolved,
    /// The user may change it: the change is listed, and the run goes on.
    Deliberate,
    /// Changes neither numbers nor files.
    DoesNotMatter,
}

/// Role of every key of [`RunConfig`], in the same order. The first key that differs is reported.
pub const ROLES: &[(&str, Role)] = &[
    ("model", Role::Content),
    ("model_revision", Role::Content),
    ("training_file", Role::Content),
    // Evaluations change no weights. A change of the file is listed.
    ("validation_file", Role::Content),
    ("output_dir", Role::DoesNotMatter),
    ("training_method", Role::Computes),
    ("from_checkpoint", Role::Content),
    ("n_epochs", Role::Deliberate),
    ("max_steps", Role::Deliberate),
    ("batch_size", Role::Computes),
    ("learning_rate", Role::Computes),
    ("lr_scheduler_type", Role::Computes),
    ("min_lr_ratio", Role::Computes),
    ("warmup_ratio", Role::Computes),
    ("weight_decay", Role::Computes),
    ("max_grad_norm", Role::Computes),
    ("max_seq_length", Role::Resolved),
    // A resume without a date takes the date of the checkpoint.
    ("template_date", Role::Resolved),
    ("random_seed", Role::Computes),
    ("shuffle", Role::Computes),
    ("dtype", Role::Resolved),
    ("reduce_dtype", Role::Computes),
    ("lora", Role::Computes),
    ("lora_r", Role::Computes),
    ("lora_alpha", Role::Computes),
    ("lora_dropout", Role::Computes),
    ("lora_trainable_modules", Role::Computes),
    ("merge_adapter", Role::Deliberate),
    ("loss_type", Role::Computes),
    ("dpo_beta", Role::Computes),
    ("simpo_gamma", Role::Computes),
    ("reference_logps", Role::Computes),
    ("reference_cache", Role::DoesNotMatter),
    ("n_checkpoints", Role::Deliberate),
    ("save_steps", Role::Deliberate),
    ("save_minutes", Role::Deliberate),
    ("save_total_limit", Role::Deliberate),
    ("n_evals", Role::Deliberate),
    // The memory settings below marked Deliberate change only the rounding of sums, like the world size. A user whose run goes out of
    // memory must be able to change them and resume.
    ("micro_batch_tokens", Role::Deliberate),
    ("prefix_sharing", Role::Deliberate),
    ("activation_checkpointing", Role::DoesNotMatter),
    ("zero_stage", Role::Deliberate),
    ("optim", Role::Computes),
    ("offload_optimizer", Role::Deliberate),
    ("offload_reference", Role::DoesNotMatter),
    ("model_loading", Role::DoesNotMatter),
];

/// Whether a run with this configuration uses the key.
pub(super) fn is_read(key: &str, config: &RunConfig) -> bool {
    match key {
        "lora_r" | "lora_alpha" | "lora_dropout" | "lora_trainable_modules" => config.lora,
        "loss_type" | "dpo_beta" => config.objective().scores_both_outputs(),
        "simpo_gamma" => config.objective() == Objective::Preference(LossType::Simpo),
        "reference_logps" => config.objective().needs_reference(),
        _ => true,
    }
}

/// Whether the value leaves the choice to the trainer (absent or `auto`).
pub(super) fn is_neutral(value: &Value) -> bool {
    value.is_null() || value == "auto"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_role() {
        let named: Vec<&str> = ROLES.iter().map(|(key, _)| *key).collect();
        assert_eq!(named, RunConfig::keys(), "decide what a change of the key means for a resumed run");
    }

    #[test]
    fn resolved_keys_have_a_neutral_default() {
        let defaults = serde_json::to_value(RunConfig::default()).unwrap();
        for (key, _) in ROLES.iter().filter(|(_, role)| *role == Role::Resolved) {
            assert!(is_neutral(&defaults[key]), "{key}");
        }
    }
}
