//! Every rule that a configuration must keep.

use super::{ReferenceLogps, RunConfig, TrainingMethod};
use crate::Fault;

impl RunConfig {
    /// Every rule that needs no file system.
    pub fn check(&self) -> Result<(), Fault> {
        for (key, value) in [("training_file", &self.training_file), ("output_dir", &self.output_dir)] {
            if value.is_empty() {
                return Err(Fault::input(format!("config key `{key}` is missing"))
                    .hint(format!("add `{key} = \"…\"` to the config file, or --set {key}=…")));
            }
        }
        if self.model.is_empty() && self.from_checkpoint.is_none() {
            return Err(Fault::input("config key `model` is missing")
                .hint("add `model = \"…\"` (a Hugging Face folder or hub id), or `from_checkpoint`"));
        }
        if self.n_evals > 0 && self.validation_file.is_none() {
            return Err(Fault::input("n_evals is set but validation_file is not")
                .hint("add `validation_file = \"…\"`, or set n_evals = 0"));
        }
        if self.merge_adapter && !self.lora {
            return Err(Fault::input("merge_adapter is set but lora is not").hint("set lora = true"));
        }
        self.lora_modules()?;
        if self.keeps_references() && self.training_method == TrainingMethod::Sft {
            return Err(Fault::input(
                "reference_logps is set, but supervised fine-tuning has no reference model",
            )
            .hint("remove reference_logps, or set training_method = \"dpo\""));
        }
        if self.offload_reference {
            self.check_offload()?;
        }
        self.check_ranges()
    }

    fn check_offload(&self) -> Result<(), Fault> {
        let why = match (self.training_method, self.reference_logps, self.lora) {
            (TrainingMethod::Sft, ..) => "supervised fine-tuning has no reference model",
            (_, ReferenceLogps::Precompute, _) => {
                "reference_logps = \"precompute\" frees the reference model"
            }
            (_, _, true) => "with lora the reference is the base model itself",
            _ => return Ok(()),
        };
        Err(Fault::input(format!("offload_reference is set, but {why}")).hint("remove offload_reference"))
    }

    fn check_ranges(&self) -> Result<(), Fault> {
        let positive_integers = [
            ("n_epochs", u64::from(self.n_epochs)),
            ("batch_size", u64::from(self.batch_size)),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("max_seq_length", u64::from(self.max_seq_length.unwrap_or(1))),
            ("lora_r", u64::from(self.lora_r())),
            ("n_checkpoints", u64::from(self.n_checkpoints)),
            ("save_steps", self.save_steps.unwrap_or(1)),
            ("save_total_limit", u64::from(self.save_total_limit.unwrap_or(1))),
            ("micro_batch_tokens", u64::from(self.micro_batch_tokens)),
        ];
        for (key, value) in positive_integers {
            require(value > 0, key, "at least 1", value as f64)?;
        }
        require(self.zero_stage <= 3, "zero_stage", "0, 1, 2 or 3", f64::from(self.zero_stage))?;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        require(not_negative(self.learning_rate), "learning_rate", "at least 0", self.learning_rate)?;
        require(positive(self.dpo_beta), "dpo_beta", "above 0", self.dpo_beta)?;
        require(positive(self.lora_alpha()), "lora_alpha", "above 0", self.lora_alpha())?;
        require(not_negative(self.weight_decay), "weight_decay", "at least 0", self.weight_decay)?;
        require(not_negative(self.max_grad_norm), "max_grad_norm", "at least 0", self.max_grad_norm)?;
        let year = 525_600.0;
        require((0.0..=year).contains(&self.save_minutes), "save_minutes", "0 to 525600", self.save_minutes)?;
        for (key, ratio) in [("min_lr_ratio", self.min_lr_ratio), ("warmup_ratio", self.warmup_ratio)] {
            require((0.0..=1.0).contains(&ratio), key, "between 0 and 1", ratio)?;
        }
        require(
            (0.0..1.0).contains(&self.lora_dropout()),
            "lora_dropout",
            "at least 0 and below 1",
            self.lora_dropout(),
        )
    }
}

fn require(holds: bool, key: &str, expected: &str, found: f64) -> Result<(), Fault> {
    if holds {
        return Ok(());
    }
    Err(Fault::input(format!("config key `{key}`: expected {expected}, found {found}"))
        .hint("see docs/config.md for every key and its range"))
}
