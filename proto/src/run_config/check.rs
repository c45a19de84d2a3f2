//! Checks of a configuration.

use super::RunConfig;
use crate::Fault;

impl RunConfig {
    /// Checks all rules that do not depend on the content of files.
    pub fn check(&self) -> Result<(), Fault> {
        let missing =
            [("training_file", self.training_file.is_empty()), ("output_dir", self.output_dir.is_empty())];
        for (key, missing) in missing {
            if missing {
                return Err(Fault::input(format!("config key `{key}` is missing"))
                    .hint(format!("add `{key} = \"…\"` to the config file, or --set {key}=…")));
            }
        }
        if self.model.is_empty() && self.from_checkpoint.is_none() {
            return Err(Fault::input("config key `model` is missing")
                .hint("add `model = \"…\"` (a Hugging Face folder or hub id), or `from_checkpoint`"));
        }
        if self.model_revision.is_some()
            && (self.model.is_empty() || std::path::Path::new(&self.model).is_dir())
        {
            return Err(Fault::input("model_revision is set, but model is no model on the hub")
                .hint("remove model_revision, or name a hub id in `model`"));
        }
        self.check_paths()?;
        self.training_file.check("training_file", true)?;
        self.validation_file.as_ref().map_or(Ok(()), |files| files.check("validation_file", false))?;
        self.check_evaluations()?;
        self.check_early_stopping()?;
        self.check_schedule()?;
        if self.merge_adapter && !self.lora {
            return Err(Fault::input("merge_adapter is set but lora is not").hint("set lora = true"));
        }
        self.check_adapter_keys()?;
        self.template_date.as_deref().map_or(Ok(()), |date| super::parse_date(date).map(drop))?;
        self.check_objective()?;
        self.check_ranges()
    }

    /// Checks when the run evaluates.
    fn check_evaluations(&self) -> Result<(), Fault> {
        if self.n_evals.is_some() && self.eval_steps.is_some() {
            return Err(Fault::input("n_evals and eval_steps are both set").hint(
                "n_evals spaces evaluations evenly, eval_steps counts optimizer steps: keep one of them",
            ));
        }
        let set = [
            ("n_evals", self.n_evals() > 0),
            ("eval_steps", self.eval_steps.is_some()),
            ("n_samples", self.n_samples > 0),
        ];
        if self.n_samples == 0 && self.max_new_tokens.is_some() {
            return Err(Fault::input("max_new_tokens is set, but n_samples is not").hint(
                "it limits sample answers; pairs are cut at max_seq_length (prompt and completion together)",
            ));
        }
        if self.n_samples > 0 && !self.eval_on_start {
            return Err(Fault::input("n_samples is set, but eval_on_start is false").hint(
                "the answers of the model that the run starts from are given at the evaluation before the first step",
            ));
        }
        match set.into_iter().find(|(_, set)| *set && self.validation_file.is_none()) {
            Some((key, _)) => Err(Fault::input(format!("{key} is set but validation_file is not"))
                .hint(format!("add `validation_file = \"…\"`, or remove {key}"))),
            None => Ok(()),
        }
    }

    /// Checks that the keys of the learning rate's schedule belong together.
    fn check_schedule(&self) -> Result<(), Fault> {
        if self.scheduler_num_cycles.is_some() && self.lr_scheduler_type.usual_cycles().is_none() {
            return Err(Fault::input(
                "scheduler_num_cycles is set, but lr_scheduler_type is a schedule without cycles",
            )
            .hint("set lr_scheduler_type to \"cosine\" or \"cosine_with_restarts\", or remove scheduler_num_cycles"));
        }
        Ok(())
    }

    /// Checks the ranges of numbers. The ranges are far wider than needed. A number outside is a typing error; some would exhaust memory
    /// or overflow float32.
    fn check_ranges(&self) -> Result<(), Fault> {
        self.check_whole_numbers()?;
        self.check_numbers()
    }

    fn check_whole_numbers(&self) -> Result<(), Fault> {
        let integers = [
            ("n_epochs", u64::from(self.n_epochs), 1..=1_000_000),
            ("batch_size", u64::from(self.batch_size), 1..=1 << 20),
            ("max_steps", self.max_steps.unwrap_or(1), 1..=1_000_000_000_000),
            ("max_seq_length", u64::from(self.max_seq_length.unwrap_or(1)), 1..=1 << 24),
            ("lora_r", u64::from(self.lora_r()), 1..=1 << 16),
            ("n_checkpoints", u64::from(self.n_checkpoints), 1..=1_000_000),
            ("n_evals", u64::from(self.n_evals()), 0..=1_000_000),
            ("ref_model_sync_steps", self.ref_model_sync_steps(), 1..=1_000_000_000_000),
            ("eval_steps", self.eval_steps.unwrap_or(1), 1..=1_000_000_000_000),
            ("n_samples", u64::from(self.n_samples), 0..=100),
            ("max_new_tokens", u64::from(self.max_new_tokens.unwrap_or(1)), 1..=4096),
            ("early_stopping_patience", u64::from(self.early_stopping_patience.unwrap_or(1)), 1..=1_000_000),
            (
                "early_stopping_warmup_evals",
                u64::from(self.early_stopping_warmup_evals.unwrap_or(0)),
                0..=1_000_000,
            ),
            ("micro_batch_tokens", u64::from(self.micro_batch_tokens), 1..=1 << 24),
            ("save_steps", self.save_steps.unwrap_or(1), 1..=1_000_000_000_000),
            ("save_total_limit", u64::from(self.save_total_limit.unwrap_or(1)), 1..=1_000_000),
        ];
        for (key, value, range) in integers {
            let expected = format!("a whole number from {} to {}", range.start(), range.end());
            require(range.contains(&value), key, &expected, value as f64)?;
        }
        require(self.zero_stage <= 3, "zero_stage", "0, 1, 2 or 3", f64::from(self.zero_stage))
    }

    fn check_numbers(&self) -> Result<(), Fault> {
        // The minimums are far below useful values, but do not underflow to 0 in float32; a run with 0 would silently learn nothing.
        let above_0 = [
            ("dpo_beta", self.dpo_beta, 1e-6, 1000.0),
            ("lora_alpha", self.lora_alpha(), 1e-6, 1e6),
            ("discopop_tau", self.discopop_tau(), 1e-6, 1000.0),
            ("ref_model_mixup_alpha", self.ref_model_mixup_alpha(), 1e-6, 1.0),
            ("scheduler_num_cycles", self.scheduler_num_cycles.unwrap_or(1.0), 1e-6, 1e6),
        ];
        for (key, value, least, most) in above_0 {
            let expected = format!("a number above 0, at least {least:?} and at most {most}");
            require((least..=most).contains(&value), key, &expected, value)?;
        }
        let from_0 = [
            ("learning_rate", self.learning_rate, 1e-12, 1000.0),
            ("weight_decay", self.weight_decay, 1e-12, 1000.0),
            ("max_grad_norm", self.max_grad_norm, 1e-6, 1e30),
            ("min_lr_ratio", self.min_lr_ratio, 0.0, 1.0),
            ("warmup_ratio", self.warmup_ratio, 0.0, 1.0),
            ("early_stopping_min_delta", self.early_stopping_min_delta.unwrap_or(0.0), 1e-12, 1e6),
            ("simpo_gamma", self.simpo_gamma(), 1e-6, 1000.0),
            ("rpo_alpha", self.rpo_alpha, 1e-6, 1000.0),
            ("cpo_alpha", self.cpo_alpha(), 1e-6, 1000.0),
            ("desirable_weight", self.desirable_weight.unwrap_or(1.0), 1e-6, 1000.0),
            ("undesirable_weight", self.undesirable_weight.unwrap_or(1.0), 1e-6, 1000.0),
            ("ld_alpha", self.ld_alpha.unwrap_or(1.0), 0.0, 1.0),
            // At most one year.
            ("save_minutes", self.save_minutes, 1e-9, 525_600.0),
        ];
        for (key, value, least, most) in from_0 {
            let least_shown = if least == 0.0 {
                "a number between 0".into()
            } else {
                format!("0, or a number between {least:?}")
            };
            let expected = format!("{least_shown} and {}", shown(most));
            require(value == 0.0 || (least..=most).contains(&value), key, &expected, value)?;
        }
        let half = "at least 0 and below 0.5 (at 0.5 the pairs say nothing about the order of their outputs)";
        let smoothing = self.label_smoothing;
        require((0.0..0.5).contains(&smoothing), "label_smoothing", half, smoothing)?;
        let (coef, near) = (self.f_alpha_divergence_coef(), -100.0..=100.0);
        require(near.contains(&coef), "f_alpha_divergence_coef", "a number between -100 and 100", coef)?;
        for &weight in self.loss_weights.iter().flatten() {
            let expected = "numbers between 1e-6 and 1000";
            require((1e-6..=1000.0).contains(&weight), "loss_weights", expected, weight)?;
        }
        require(
            // Also below 1 after rounding to float32, in which it is used.
            (0.0..1.0).contains(&self.lora_dropout()) && (self.lora_dropout() as f32) < 1.0,
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
    Err(Fault::input(format!("config key `{key}`: expected {expected}, found {}", shown(found)))
        .hint("see docs/config.md for every key and its range"))
}

/// Formats a number, in exponential form if it is very large or small.
fn shown(number: f64) -> String {
    if number.fract() == 0.0 && number.abs() < 1e15 { format!("{number}") } else { format!("{number:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(key: &str, value: &str) -> String {
        let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\nvalidation_file = \"v\"\n";
        let config = RunConfig::from_toml(&format!("{good}{key} = {value}\n"), "run.toml", &[]);
        config.map_or_else(|fault| fault.message, |_| format!("{key} = {value} is taken"))
    }

    #[test]
    fn out_of_range_numbers_are_refused_by_name() {
        for (key, value) in [
            ("n_checkpoints", "4294967295"),
            ("n_evals", "4294967295"),
            ("batch_size", "4294967295"),
            ("n_epochs", "4294967295"),
            ("max_steps", "9223372036854775807"),
            ("max_seq_length", "4294967295"),
            ("max_seq_length", "0"),
            ("micro_batch_tokens", "0"),
            ("micro_batch_tokens", "4294967295"),
            ("lora_r", "4294967295"),
            ("lora_alpha", "1e300"),
            ("learning_rate", "1e308"),
            ("learning_rate", "inf"),
            ("learning_rate", "nan"),
            ("learning_rate", "-1e-5"),
            ("dpo_beta", "1e30"),
            ("dpo_beta", "1e-300"),
            ("dpo_beta", "nan"),
            ("weight_decay", "inf"),
            ("max_grad_norm", "inf"),
            ("warmup_ratio", "1.5"),
            ("warmup_ratio", "nan"),
            ("lora_dropout", "nan"),
            ("lora_dropout", "0.9999999999999999"),
            ("max_grad_norm", "1e-300"),
            ("learning_rate", "1e-320"),
            ("weight_decay", "1e-300"),
            ("save_minutes", "1e-12"),
            ("dpo_beta", "1e-45"),
            ("lora_alpha", "1e-300"),
            ("scheduler_num_cycles", "0"),
            ("scheduler_num_cycles", "nan"),
            ("eval_steps", "0"),
        ] {
            let message = refusal(key, value);
            let expected = format!("config key `{key}`: expected ");
            assert!(message.starts_with(&expected) && message.len() < 120, "{message}");
        }
        assert_eq!(
            refusal("learning_rate", "1e308"),
            "config key `learning_rate`: expected 0, or a number between 1e-12 and 1000, found 1e308"
        );
    }

    #[test]
    fn evaluations_are_spaced_evenly_or_by_steps_not_both() {
        assert_eq!(refusal("eval_steps", "5\nn_evals = 2"), "n_evals and eval_steps are both set");
        assert!(refusal("eval_steps", "5").ends_with("is taken"));
        let bare = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\n";
        for key in ["n_evals", "eval_steps", "n_samples"] {
            let fault = RunConfig::from_toml(&format!("{bare}{key} = 3\n"), "run.toml", &[]).unwrap_err();
            assert_eq!(fault.message, format!("{key} is set but validation_file is not"));
        }
    }

    #[test]
    fn sample_answers_need_the_evaluation_before_the_first_step() {
        assert_eq!(refusal("max_new_tokens", "9"), "max_new_tokens is set, but n_samples is not");
        let message = refusal("n_samples", "3\neval_on_start = false");
        assert_eq!(message, "n_samples is set, but eval_on_start is false");
        assert!(refusal("n_samples", "3\nmax_new_tokens = 9").ends_with("is taken"));
        assert!(refusal("n_samples", "101").starts_with("config key `n_samples`: expected"));
    }

    #[test]
    fn cycles_need_a_schedule_with_cycles() {
        for schedule in ["linear", "constant", "inverse_sqrt"] {
            let message = refusal("scheduler_num_cycles", &format!("2\nlr_scheduler_type = \"{schedule}\""));
            assert!(message.starts_with("scheduler_num_cycles is set, but lr_scheduler_type"), "{message}");
        }
        for schedule in ["cosine", "cosine_with_restarts"] {
            let message = refusal("scheduler_num_cycles", &format!("2\nlr_scheduler_type = \"{schedule}\""));
            assert!(message.ends_with("is taken"), "{message}");
        }
    }

    #[test]
    fn schedules_of_transformers_with_another_name_here_are_refused_with_that_name() {
        for (schedule, own) in [
            ("constant_with_warmup", "\"constant\""),
            ("cosine_with_min_lr", "min_lr_ratio"),
            ("polynomial", "\"linear\""),
            ("warmup_stable_decay", "\"cosine\""),
        ] {
            let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\n";
            let text = format!("{good}lr_scheduler_type = \"{schedule}\"\n");
            let fault = RunConfig::from_toml(&text, "run.toml", &[]).unwrap_err();
            assert!(fault.message.contains("config key `lr_scheduler_type`: unknown variant"), "{fault}");
            assert!(fault.hint.contains(own), "{fault:?}");
        }
    }

    #[test]
    fn values_of_a_wrong_type_are_refused_with_key_and_line() {
        for (key, value) in [
            ("batch_size", "8.0"),
            ("batch_size", "true"),
            ("batch_size", "\"8\""),
            ("batch_size", "-8"),
            ("batch_size", "4294967296"),
            ("shuffle", "\"true\""),
            ("shuffle", "1"),
            ("learning_rate", "\"1e-5\""),
            ("learning_rate", "[1e-5]"),
            ("zero_stage", "256"),
            ("max_steps", "1e3"),
        ] {
            let message = refusal(key, value);
            assert!(message.starts_with(&format!("run.toml line 5: config key `{key}`: ")), "{message}");
        }
        assert!(refusal("batch_size", "8\nbatch_size = 4").contains("duplicate key"));
    }
}
