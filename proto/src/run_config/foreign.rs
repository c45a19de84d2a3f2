//! Keys of other trainers (TRL and transformers, Axolotl, LLaMA-Factory, PEFT, hosted fine-tuning APIs), and their names here.

/// Hint for a key of another trainer; `None` for unknown keys.
pub(super) fn instead_of(key: &str) -> Option<String> {
    let key = key.to_ascii_lowercase().replace('-', "_");
    let found = KEYS.iter().find(|(names, ..)| names.contains(&key.as_str()));
    let (_, own, note) = found?;
    Some(match (own.is_empty(), note.is_empty()) {
        (true, _) => (*note).to_owned(),
        (false, true) => format!("it is called `{own}` here"),
        (false, false) => format!("it is called `{own}` here: {note}"),
    })
}

/// Hint for a key's value that other trainers know under this name; `None` for unknown values.
pub(super) fn instead_of_value(key: &str, value: &str) -> Option<&'static str> {
    let found = VALUES.iter().find(|(own, names, _)| *own == key && names.contains(&value));
    found.map(|(.., hint)| *hint)
}

/// Keys here, values elsewhere, and what to write instead.
const VALUES: [(&str, &[&str], &str); 4] = [
    (
        "lr_scheduler_type",
        &["constant_with_warmup"],
        "write \"constant\" with warmup_ratio: the rate rises to its peak and stays there",
    ),
    (
        "lr_scheduler_type",
        &["cosine_with_min_lr"],
        "write \"cosine\" with min_lr_ratio (and scheduler_num_cycles): it is the same formula",
    ),
    (
        "lr_scheduler_type",
        &["polynomial"],
        "\"linear\" with min_lr_ratio = lr_end / learning_rate is the polynomial of power 1; other powers are not here",
    ),
    (
        "lr_scheduler_type",
        &["cosine_warmup_with_min_lr", "reduce_lr_on_plateau", "warmup_stable_decay", "wsd", "greedy"],
        "it is not here: \"cosine\", \"cosine_with_restarts\", \"linear\", \"inverse_sqrt\" or \"constant\"",
    ),
];

/// Names elsewhere, the name here, and a note about differences. If there is no name here, the note says what to do.
const KEYS: [(&[&str], &str, &str); 67] = [
    (
        &["model_name_or_path", "model_name", "base_model", "pretrained_model_name_or_path", "model_id"],
        "model",
        "",
    ),
    (&["revision", "model_commit", "revision_of_model"], "model_revision", ""),
    (&["adapter_name_or_path", "lora_model_dir", "peft_model_id", "sft_checkpoint"], "from_checkpoint", ""),
    (&["ref_model", "ref_model_name_or_path", "reference_model", "ref_model_path"], "", NO_OTHER_REFERENCE),
    (
        &["train_file", "train_dataset", "dataset", "datasets", "dataset_name", "data_path", "training_data"],
        "training_file",
        FILES,
    ),
    (
        &["eval_file", "eval_dataset", "val_file", "test_file", "test_datasets", "validation_dataset"],
        "validation_file",
        FILES,
    ),
    (
        &[
            "dataset_config",
            "dataset_mixture",
            "interleave_probs",
            "mix_strategy",
            "dataset_split",
            "dataset_train_split",
            "dataset_test_split",
            "val_size",
            "val_set_size",
        ],
        "",
        FILES,
    ),
    (&["output", "out_dir", "save_dir"], "output_dir", ""),
    (&["beta", "pref_beta", "rl_beta"], "dpo_beta", ""),
    (&["loss", "pref_loss", "rl"], "loss_type", ""),
    (&["lr"], "learning_rate", ""),
    (&["lr_scheduler", "scheduler", "lr_schedule"], "lr_scheduler_type", ""),
    (
        &["lr_scheduler_kwargs", "cosine_min_lr_ratio", "min_lr", "min_lr_rate"],
        "min_lr_ratio",
        "a share of learning_rate",
    ),
    (
        &["warmup_steps", "num_warmup_steps", "lr_warmup_steps"],
        "warmup_ratio",
        "a share of all steps, such as 0.1",
    ),
    (&["seed", "data_seed"], "random_seed", ""),
    (&["num_train_epochs", "num_epochs", "epochs", "n_epoch"], "n_epochs", ""),
    (&["training_steps", "num_steps", "num_train_steps", "iters"], "max_steps", ""),
    (
        &["per_device_train_batch_size", "train_batch_size", "global_batch_size"],
        "batch_size",
        "pairs of an optimizer step over all trainers; how many of them are computed at once follows from micro_batch_tokens",
    ),
    (
        &["gradient_accumulation_steps", "micro_batch_size", "per_gpu_train_batch_size"],
        "batch_size",
        "write the pairs of a whole optimizer step; micro_batch_tokens splits them, without an effect on the result",
    ),
    (
        &["per_device_eval_batch_size", "eval_batch_size"],
        "",
        "leave it out: evaluations are divided by micro_batch_tokens as steps are",
    ),
    (
        &["max_length", "max_seq_len", "cutoff_len", "sequence_len", "model_max_length"],
        "max_seq_length",
        "prompt and completion together",
    ),
    (
        &["max_prompt_length", "max_completion_length", "max_target_length"],
        "",
        "only max_seq_length cuts: prompt and completion together, the completion's end first",
    ),
    (&["truncation_mode"], "", "leave it out: the end of a completion is cut (keep_start)"),
    (&["gradient_clipping", "clip_grad", "grad_clip", "max_gradient_norm"], "max_grad_norm", ""),
    (
        &["adam_beta1", "adam_beta2", "adam_epsilon"],
        "",
        "leave it out: AdamW has betas 0.9 and 0.999 and epsilon 1e-8",
    ),
    (&["optimizer", "optim_type"], "optim", ""),
    (
        &[
            "bf16",
            "fp16",
            "fp32",
            "tf32",
            "torch_dtype",
            "precision",
            "compute_dtype",
            "pure_bf16",
            "mixed_precision",
        ],
        "dtype",
        "auto, float32 or bfloat16",
    ),
    (
        &["use_peft", "use_lora", "adapter", "finetuning_type", "peft_type", "training_type"],
        "lora",
        "true or false",
    ),
    (&["lora_rank", "r", "rank", "peft_r"], "lora_r", ""),
    (&["alpha", "peft_alpha"], "lora_alpha", ""),
    (&["peft_dropout"], "lora_dropout", ""),
    (
        &["lora_target_modules", "target_modules", "lora_target", "lora_target_linear", "trainable_modules"],
        "lora_trainable_modules",
        "names with commas between them, or all-linear",
    ),
    (
        &["loraplus_lr_ratio", "bias", "layer_replication", "trainable_token_indices", "ensure_weight_tying"],
        "",
        "leave it out: this part of PEFT is not supported (docs/limits.md)",
    ),
    (
        &["target_parameters"],
        "",
        "leave it out: it adapts parameters that are no linear layers, such as the experts of a mixture; the supported models have none",
    ),
    (&["lora_rslora", "rslora", "peft_use_rslora"], "use_rslora", ""),
    (
        &[
            "load_in_4bit",
            "load_in_8bit",
            "quantization_bit",
            "quantization_config",
            "use_qlora",
            "bnb_4bit_quant_type",
        ],
        "",
        "leave it out: base models are not quantised; optim = \"adamw_8bit\", zero_stage and offload_reference save memory",
    ),
    (
        &["gradient_checkpointing", "use_gradient_checkpointing", "gradient_checkpointing_kwargs"],
        "activation_checkpointing",
        "auto, none or full",
    ),
    (&["precompute_ref_log_probs", "precompute_ref_batch_size"], "reference_logps", "\"precompute\""),
    (
        &[
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "ddp_backend",
            "zero",
            "zero_optimization",
            "accelerate_config",
        ],
        "zero_stage",
        "0, 1, 2 or 3; no file of its own",
    ),
    (&["cpu_offload", "offload", "optim_offload"], "offload_optimizer", ""),
    (
        &["packing", "padding_free", "sample_packing", "group_by_length", "pad_to_sequence_len"],
        "",
        "leave it out: nothing is padded, and pairs of like lengths are computed together",
    ),
    (
        &[
            "flash_attention",
            "attn_implementation",
            "flash_attn",
            "use_flash_attention_2",
            "use_liger_kernel",
            "torch_compile",
        ],
        "",
        "leave it out: the fastest kernels of the device are taken",
    ),
    (
        &["save_strategy", "saves_per_epoch", "checkpoint_interval", "n_checkpoint"],
        "",
        "write save_steps, save_minutes or n_checkpoints (docs/config.md)",
    ),
    (
        &["eval_strategy", "evaluation_strategy", "evals_per_epoch"],
        "",
        "write n_evals (how many there are over the run, evenly spaced) or eval_steps",
    ),
    (&["eval_interval", "eval_every", "val_period", "eval_freq"], "eval_steps", "in optimizer steps"),
    (&["num_cycles", "lr_scheduler_num_cycles"], "scheduler_num_cycles", ""),
    (
        &["load_best_model_at_end", "early_stopping", "early_stop"],
        "early_stopping_enabled",
        "`final` is then the model of the best evaluation",
    ),
    (
        &[
            "generate_during_eval",
            "num_val_samples_to_print",
            "eval_table_size",
            "eval_sample_prompts",
            "num_samples",
        ],
        "n_samples",
        "the number of prompts of validation_file that are answered at every evaluation",
    ),
    (&["eval_max_new_tokens", "max_generate_length"], "max_new_tokens", "of sample answers"),
    (&["early_stopping_threshold"], "early_stopping_min_delta", ""),
    (
        &["logging_steps", "logging_strategy", "logging_first_step", "log_every_n_steps"],
        "",
        "leave it out: every step has a row in metrics.jsonl",
    ),
    (
        &[
            "report_to",
            "run_name",
            "wandb_project",
            "wandb_api_key",
            "wandb_name",
            "use_wandb",
            "logging_dir",
            "project_name",
        ],
        "",
        "leave it out: TensorBoard files are written to output_dir/tb; docs/observability.md tells of Grafana",
    ),
    (&["resume_from_checkpoint", "auto_resume_from_checkpoints"], "", "give --resume to the launcher"),
    (&["overwrite_output_dir"], "", "give --overwrite to the launcher"),
    (
        &["num_processes", "num_gpus", "nproc_per_node", "nnodes", "world_size"],
        "",
        "give --nodes and --gpus-per-node to the launcher",
    ),
    (
        &["chat_template", "template", "chat_template_path"],
        "",
        "put chat_template.jinja into the model's folder, beside its tokenizer",
    ),
    (
        &["push_to_hub", "hub_model_id", "hub_token", "hf_token", "hf_output_repo_name"],
        "",
        "leave it out: the model is written to output_dir/final; HF_TOKEN is read from the environment",
    ),
    (&["dpo_label_smoothing", "cdpo_label_smoothing"], "label_smoothing", ""),
    (&["kto_desirable_weight", "kto_chosen_weight", "desirable_w"], "desirable_weight", ""),
    (&["kto_undesirable_weight", "kto_rejected_weight", "undesirable_w"], "undesirable_weight", ""),
    (&["ref_model_update_steps", "sync_ref_steps"], "ref_model_sync_steps", ""),
    (&["reference_free", "ref_free"], "dpo_reference_free", "true loads no reference model"),
    (
        &["gamma", "simpo_margin", "gamma_beta_ratio"],
        "simpo_gamma",
        "the margin itself, not its ratio to dpo_beta",
    ),
    (&["pref_ftx", "sft_weight", "nll_loss_coef", "dpo_ftx_gamma"], "rpo_alpha", ""),
    (&["orpo_alpha", "orpo_beta", "cpo_beta", "simpo_beta", "ipo_tau", "tau"], "dpo_beta", ""),
    (
        &[
            "disable_dropout",
            "neftune_noise_alpha",
            "trust_remote_code",
            "remove_unused_columns",
            "dataset_num_proc",
            "dataloader_num_workers",
        ],
        "",
        "leave it out: nothing here depends on it",
    ),
    (&["method", "stage", "task", "do_train"], "training_method", "\"dpo\" or \"sft\""),
];

const FILES: &str = "a file, folder or pattern, an address such as hf://datasets/OWNER/NAME/data/train.parquet, or a list with weights (docs/data.md)";
const NO_OTHER_REFERENCE: &str =
    "leave it out: the reference is what the run starts from, `from_checkpoint`, or `model` without it";

#[cfg(test)]
mod tests {
    use super::super::RunConfig;
    use super::*;

    #[test]
    fn names_of_other_trainers_lead_to_keys_that_exist() {
        let own = RunConfig::keys();
        let mut seen = Vec::new();
        for (names, key, note) in KEYS {
            assert!(key.is_empty() || own.contains(&key), "{key}");
            assert!(!key.is_empty() || !note.is_empty(), "{names:?}");
            for name in names {
                assert!(!own.contains(name), "{name} is a key here");
                assert!(!seen.contains(name), "{name} is there twice");
                seen.push(name);
            }
        }
    }

    #[test]
    fn a_key_of_trl_is_recognised_in_any_spelling() {
        assert_eq!(instead_of("beta").unwrap(), "it is called `dpo_beta` here");
        assert!(instead_of("Num-Train-Epochs").unwrap().contains("`n_epochs`"));
        assert!(
            instead_of("per_device_train_batch_size")
                .unwrap()
                .starts_with("it is called `batch_size` here: pairs")
        );
        assert!(instead_of("push_to_hub").unwrap().starts_with("leave it out"));
        assert_eq!(instead_of("batch_sise"), None);
    }
}
