//! Effect of each changed configuration key on a resume.

use serde_json::Value;

use crate::RunConfig;
use crate::run_config::{FDivergenceType, LossType, TrainingMethod, adapter_keys};

/// How a resume treats a key whose value differs from the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyRole {
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
pub const ROLES: &[(&str, KeyRole)] = &[
    ("model", KeyRole::Content),
    ("model_revision", KeyRole::Content),
    ("training_file", KeyRole::Content),
    // Evaluations change no weights. A change of the file is listed.
    ("validation_file", KeyRole::Content),
    ("dataset_format", KeyRole::Computes),
    ("output_dir", KeyRole::DoesNotMatter),
    ("training_method", KeyRole::Computes),
    ("train_on_inputs", KeyRole::Computes),
    ("assistant_only_loss", KeyRole::Computes),
    ("from_checkpoint", KeyRole::Content),
    ("n_epochs", KeyRole::Deliberate),
    ("max_steps", KeyRole::Deliberate),
    ("batch_size", KeyRole::Computes),
    ("learning_rate", KeyRole::Computes),
    ("lr_scheduler_type", KeyRole::Computes),
    ("min_lr_ratio", KeyRole::Computes),
    ("scheduler_num_cycles", KeyRole::Computes),
    ("warmup_ratio", KeyRole::Computes),
    ("weight_decay", KeyRole::Computes),
    ("max_grad_norm", KeyRole::Computes),
    ("max_seq_length", KeyRole::Resolved),
    // A resume without a date takes the date of the checkpoint.
    ("template_date", KeyRole::Resolved),
    ("random_seed", KeyRole::Computes),
    ("shuffle", KeyRole::Computes),
    ("dtype", KeyRole::Resolved),
    ("reduce_dtype", KeyRole::Computes),
    ("lora", KeyRole::Computes),
    ("lora_r", KeyRole::Computes),
    ("lora_alpha", KeyRole::Computes),
    ("lora_dropout", KeyRole::Computes),
    ("lora_trainable_modules", KeyRole::Computes),
    ("exclude_modules", KeyRole::Computes),
    ("modules_to_save", KeyRole::Computes),
    ("layers_to_transform", KeyRole::Computes),
    ("layers_pattern", KeyRole::Computes),
    ("rank_pattern", KeyRole::Computes),
    ("alpha_pattern", KeyRole::Computes),
    ("use_rslora", KeyRole::Computes),
    ("use_dora", KeyRole::Computes),
    ("lora_bias", KeyRole::Computes),
    // Has decided the values that the checkpoint holds.
    ("init_lora_weights", KeyRole::Computes),
    ("merge_adapter", KeyRole::Deliberate),
    ("loss_type", KeyRole::Computes),
    ("loss_weights", KeyRole::Computes),
    ("dpo_beta", KeyRole::Computes),
    ("label_smoothing", KeyRole::Computes),
    ("dpo_normalize_logratios_by_length", KeyRole::Computes),
    ("rpo_alpha", KeyRole::Computes),
    ("desirable_weight", KeyRole::Computes),
    ("undesirable_weight", KeyRole::Computes),
    ("dpo_reference_free", KeyRole::Computes),
    ("sync_ref_model", KeyRole::Computes),
    ("ref_model_mixup_alpha", KeyRole::Computes),
    ("ref_model_sync_steps", KeyRole::Computes),
    ("simpo_gamma", KeyRole::Computes),
    ("cpo_alpha", KeyRole::Computes),
    ("f_divergence_type", KeyRole::Computes),
    ("f_alpha_divergence_coef", KeyRole::Computes),
    ("ld_alpha", KeyRole::Computes),
    ("discopop_tau", KeyRole::Computes),
    ("use_weighting", KeyRole::Computes),
    ("reference_logps", KeyRole::Computes),
    ("reference_cache", KeyRole::DoesNotMatter),
    ("n_checkpoints", KeyRole::Deliberate),
    ("save_steps", KeyRole::Deliberate),
    ("save_minutes", KeyRole::Deliberate),
    ("save_total_limit", KeyRole::Deliberate),
    ("n_evals", KeyRole::Deliberate),
    ("eval_steps", KeyRole::Deliberate),
    ("eval_on_start", KeyRole::Deliberate),
    // Answers change no weights.
    ("n_samples", KeyRole::Deliberate),
    ("max_new_tokens", KeyRole::Deliberate),
    ("early_stopping_enabled", KeyRole::Deliberate),
    ("early_stopping_patience", KeyRole::Deliberate),
    ("early_stopping_min_delta", KeyRole::Deliberate),
    ("early_stopping_warmup_evals", KeyRole::Deliberate),
    ("metric_for_best_model", KeyRole::Deliberate),
    ("greater_is_better", KeyRole::Deliberate),
    // The memory settings below marked Deliberate change only the rounding of sums, like the world size. A user whose run goes out of
    // memory must be able to change them and resume.
    ("micro_batch_tokens", KeyRole::Deliberate),
    ("prefix_sharing", KeyRole::Deliberate),
    ("activation_checkpointing", KeyRole::DoesNotMatter),
    ("zero_stage", KeyRole::Deliberate),
    ("optim", KeyRole::Computes),
    ("offload_optimizer", KeyRole::Deliberate),
    ("offload_reference", KeyRole::DoesNotMatter),
    ("model_loading", KeyRole::DoesNotMatter),
];

/// Whether a run with this configuration uses the key.
pub(super) fn is_read(key: &str, config: &RunConfig) -> bool {
    let prefers = config.training_method == TrainingMethod::Dpo;
    match key {
        "lora_r" | "lora_alpha" | "lora_dropout" | "lora_trainable_modules" => config.lora,
        "train_on_inputs" => !prefers,
        "loss_type" | "loss_weights" | "dpo_beta" | "label_smoothing" => prefers,
        "dpo_normalize_logratios_by_length" | "rpo_alpha" | "dpo_reference_free" => prefers,
        "f_divergence_type" | "ld_alpha" | "use_weighting" => prefers,
        "sync_ref_model" => prefers,
        "ref_model_mixup_alpha" | "ref_model_sync_steps" => config.sync_ref_model,
        "desirable_weight" | "undesirable_weight" => config.objective().is_labelled(),
        "simpo_gamma" => config.pair_losses().iter().any(|term| term.loss == LossType::Simpo),
        "cpo_alpha" => config.loss_type.contains(LossType::Cpo),
        "f_alpha_divergence_coef" => config.f_divergence_type == FDivergenceType::AlphaDivergence,
        "discopop_tau" => config.loss_type.contains(LossType::Discopop),
        "reference_logps" => config.objective().needs_reference(),
        _ => config.lora || adapter_keys().iter().all(|(own, _)| *own != key),
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
        for (key, _) in ROLES.iter().filter(|(_, role)| *role == KeyRole::Resolved) {
            assert!(is_neutral(&defaults[key]), "{key}");
        }
    }
}
