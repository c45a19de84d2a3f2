//! The run configuration, which a user writes in `run.toml`, with the fine-tuning API's names and defaults.
//!
//! Unknown keys are errors that name the nearest known key; [`RunConfig::check`] has all other rules.
//! The launcher reads the file, the coordinator keeps it, and trainers get it when they join.

mod adapter_keys;
mod check;
mod choices;
mod combinations;
mod data_files;
mod early_stopping;
mod foreign;
mod lora_modules;
mod losses;
mod objective;
mod paths;
mod read;

use std::path::Path;

use chrono::{Datelike, NaiveDateTime};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::adapter_keys::{InitLoraWeights, ModuleNames, adapter_keys};
pub use self::choices::{
    ActivationCheckpointing, DatasetFormat, Dtype, LrSchedulerType, ModelLoading, Optim, ReduceDtype,
    ReferenceLogps, TrainOnInputs, TrainingMethod,
};
pub use self::data_files::{DataFile, DataFiles, SCHEMES, is_address};
pub use self::early_stopping::{EARLY_STOPPING_KEYS, EarlyStoppingRule};
pub use self::lora_modules::LoraModules;
pub use self::losses::{FDivergenceType, LossType, LossTypes};
pub use self::objective::{Objective, WeightedLoss};
pub use self::paths::expand;
pub use self::read::RECORD;
use self::read::{KEYS, at, from_table, known, parse_override, table_of, without_sections};
use crate::{Fault, files};

/// The run configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Hugging Face model folder, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`.
    pub model: String,
    /// Branch, tag or commit of `model` on the hub. Absent: `main`.
    pub model_revision: Option<String>,
    /// Preference pairs to train on: a path, a pattern or an address, or a list of them with weights.
    pub training_file: DataFiles,
    /// Preference pairs to evaluate on, named in the same way.
    pub validation_file: Option<DataFiles>,
    /// Form of all data files.
    pub dataset_format: DatasetFormat,
    /// Folder for metrics, logs, checkpoints and the final model.
    pub output_dir: String,
    /// `dpo` or `sft`.
    pub training_method: TrainingMethod,
    /// Supervised fine-tuning: also train the tokens of inputs.
    pub train_on_inputs: TrainOnInputs,
    /// Of an output with several messages, train the assistant's tokens alone.
    pub assistant_only_loss: bool,
    /// Model folder or PEFT adapter folder to start from; the reference model of DPO is this start.
    pub from_checkpoint: Option<String>,
    /// Passes over the training file.
    pub n_epochs: u32,
    /// Stop after this many optimizer steps, however many epochs that is.
    pub max_steps: Option<u64>,
    /// Pairs per optimizer step, over all trainers.
    pub batch_size: u32,
    /// Peak learning rate of AdamW.
    pub learning_rate: f64,
    /// Shape of the learning rate over the run.
    pub lr_scheduler_type: LrSchedulerType,
    /// Final learning rate as a share of the peak.
    pub min_lr_ratio: f64,
    /// Cycles of the schedules `cosine` and `cosine_with_restarts`. Absent: 0.5 and 1.
    pub scheduler_num_cycles: Option<f64>,
    /// Share of all steps in which the rate rises to its peak.
    pub warmup_ratio: f64,
    /// Decoupled weight decay; not applied to biases and norms.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 disables.
    pub max_grad_norm: f64,
    /// Maximum tokens of prompt plus completion; longer completions are cut. Absent: the model's own limit.
    pub max_seq_length: Option<u32>,
    /// Local date and time for chat templates, `YYYY-MM-DDTHH:MM:SS`. Absent: the start of the run.
    pub template_date: Option<String>,
    /// Seed of the data order, adapter initialisation and dropout.
    pub random_seed: u64,
    /// Shuffle the pairs anew each epoch; otherwise use file order.
    pub shuffle: bool,
    /// Precision of the forward and backward passes.
    pub dtype: Dtype,
    /// Precision in which gradients are sent between trainers.
    pub reduce_dtype: ReduceDtype,
    /// Train low-rank adapters instead of all weights.
    pub lora: bool,
    /// Rank of the adapters. Absent: 64, or the rank of the adapter that the run starts from; the same holds for the keys below.
    pub lora_r: Option<u32>,
    /// Scale of the adapters is `lora_alpha / lora_r`. Absent: twice the rank.
    pub lora_alpha: Option<f64>,
    /// Dropout on the adapters' input. Absent: 0.
    pub lora_dropout: Option<f64>,
    /// `all-linear`, a comma-separated list such as `q_proj,v_proj`, or a regular expression. Absent: `all-linear`.
    pub lora_trainable_modules: Option<String>,
    /// Modules that get no adapter, whatever the key above says.
    pub exclude_modules: Option<ModuleNames>,
    /// Modules that are trained whole and saved with the adapters, such as `embed_tokens` and `lm_head`.
    pub modules_to_save: Option<Vec<String>>,
    /// Numbers of the decoder layers that get adapters. Absent: all.
    pub layers_to_transform: Option<Vec<u32>>,
    /// Names of the module lists that these numbers count in.
    pub layers_pattern: Option<ModuleNames>,
    /// Ranks of layers whose names match, by regular expression; the first that matches counts.
    pub rank_pattern: Option<Map<String, Value>>,
    /// Scale numerators of layers whose names match.
    pub alpha_pattern: Option<Map<String, Value>>,
    /// The scale is `lora_alpha / sqrt(lora_r)`. Absent: false, or as the adapter that the run starts from; the same holds for the keys
    /// below.
    pub use_rslora: Option<bool>,
    /// Train a magnitude per output beside the adapters (DoRA).
    pub use_dora: Option<bool>,
    /// Adapters have a bias.
    pub lora_bias: Option<bool>,
    /// How new adapters begin. Absent: `true`.
    pub init_lora_weights: Option<InitLoraWeights>,
    /// Also write the merged model at the end, in addition to the adapter.
    pub merge_adapter: bool,
    /// Preference loss, or several whose weighted sum is minimised.
    pub loss_type: LossTypes,
    /// Factor of each loss of `loss_type`. Absent: 1 each.
    pub loss_weights: Option<Vec<f64>>,
    /// Strength of the pull towards the reference model.
    pub dpo_beta: f64,
    /// Assumed share of pairs whose outputs are in the wrong order.
    pub label_smoothing: f64,
    /// Divide each log-ratio by the number of its completion tokens.
    pub dpo_normalize_logratios_by_length: bool,
    /// Factor of the chosen outputs' negative log-likelihood, which is added to the loss.
    pub rpo_alpha: f64,
    /// Factor of the losses of desirable answers. Absent: 1.
    pub desirable_weight: Option<f64>,
    /// Factor of the losses of undesirable answers. Absent: 1.
    pub undesirable_weight: Option<f64>,
    /// Take reference log-probabilities as zero and load no reference model.
    pub dpo_reference_free: bool,
    /// Move the reference model towards the policy during the run (TR-DPO).
    pub sync_ref_model: bool,
    /// Share of the policy in the moved reference model. Absent: 0.6.
    pub ref_model_mixup_alpha: Option<f64>,
    /// Steps from one move of the reference model to the next. Absent: 512.
    pub ref_model_sync_steps: Option<u64>,
    /// SimPO's target margin between the rewards of the two outputs. Absent: 0.5 with the loss `simpo`.
    pub simpo_gamma: Option<f64>,
    /// Factor of CPO's negative log-likelihood. Absent: 1.
    pub cpo_alpha: Option<f64>,
    /// Divergence between policy and reference.
    pub f_divergence_type: FDivergenceType,
    /// The alpha of the alpha-divergence. Absent: 0.5.
    pub f_alpha_divergence_coef: Option<f64>,
    /// LD-DPO's weight of the tokens beyond the length of the shorter output. Absent: 1.
    pub ld_alpha: Option<f64>,
    /// Temperature of DiscoPOP. Absent: 0.05.
    pub discopop_tau: Option<f64>,
    /// Weigh pairs by how likely their outputs are under the policy (WPO).
    pub use_weighting: bool,
    /// When the reference model's log-probabilities are computed.
    pub reference_logps: ReferenceLogps,
    /// File that keeps reference log-probabilities across runs. Absent: in the user's cache folder.
    pub reference_cache: Option<String>,
    /// Checkpoints over the run, evenly spaced; the last one is the final model.
    pub n_checkpoints: u32,
    /// Write a checkpoint every this many optimizer steps.
    pub save_steps: Option<u64>,
    /// Write a checkpoint if none was written for this many minutes; the last two of these are kept. 0 disables.
    pub save_minutes: f64,
    /// Maximum number of checkpoints, of all kinds; the oldest are removed first.
    pub save_total_limit: Option<u32>,
    /// Evaluations over the run, evenly spaced. Needs `validation_file`. Absent: one at the end if there is such a file.
    pub n_evals: Option<u32>,
    /// Instead of `n_evals`: evaluate after every this many optimizer steps, and after the last one.
    pub eval_steps: Option<u64>,
    /// Also evaluate before the first step.
    pub eval_on_start: bool,
    /// Answers that the policy gives at every evaluation, to the first prompts of `validation_file`.
    pub n_samples: u32,
    /// Most tokens of such an answer. Absent: 64.
    pub max_new_tokens: Option<u32>,
    /// Stop once evaluations no longer improve; the final model is then that of the best evaluation.
    pub early_stopping_enabled: bool,
    /// Evaluations in a row without an improvement after which the run stops. Absent: 2.
    pub early_stopping_patience: Option<u32>,
    /// An improvement must be larger than this. Absent: 0.
    pub early_stopping_min_delta: Option<f64>,
    /// First evaluations that do not count against the patience. Absent: 1.
    pub early_stopping_warmup_evals: Option<u32>,
    /// Metric of evaluations that is compared. Absent: the loss.
    pub metric_for_best_model: Option<String>,
    /// Whether a greater value of it is better. Absent: as the metric's name says.
    pub greater_is_better: Option<bool>,
    /// Maximum tokens computed at once per trainer; a step's pairs are split into micro-batches of at most this many.
    pub micro_batch_tokens: u32,
    /// Compute a pair's prompt once for both outputs. Exact; turn it off only to measure its effect.
    pub prefix_sharing: bool,
    /// Layers that keep only their input and recompute the rest in the backward pass: less memory, more work.
    pub activation_checkpointing: ActivationCheckpointing,
    /// State that is sharded over trainers: 0 none, 1 optimizer states, 2 also gradients, 3 also weights.
    pub zero_stage: u8,
    /// AdamW with 32-bit or 8-bit moments.
    pub optim: Optim,
    /// Keep master weights and moments in host memory, and update them there.
    pub offload_optimizer: bool,
    /// Keep the reference model in host memory and copy each layer to the device when it is computed.
    pub offload_reference: bool,
    /// Which trainers read the model's files.
    pub model_loading: ModelLoading,
}

impl Default for RunConfig {
    #[expect(clippy::too_many_lines, reason = "one line for each key")]
    fn default() -> Self {
        Self {
            model: String::new(),
            model_revision: None,
            training_file: DataFiles::default(),
            validation_file: None,
            dataset_format: DatasetFormat::Auto,
            output_dir: String::new(),
            training_method: TrainingMethod::Dpo,
            train_on_inputs: TrainOnInputs::Auto,
            assistant_only_loss: true,
            from_checkpoint: None,
            n_epochs: 1,
            max_steps: None,
            batch_size: 8,
            learning_rate: 1e-5,
            lr_scheduler_type: LrSchedulerType::Cosine,
            min_lr_ratio: 0.0,
            scheduler_num_cycles: None,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            max_seq_length: None,
            template_date: None,
            random_seed: 42,
            shuffle: true,
            dtype: Dtype::Auto,
            reduce_dtype: ReduceDtype::Float32,
            lora: false,
            lora_r: None,
            lora_alpha: None,
            lora_dropout: None,
            lora_trainable_modules: None,
            exclude_modules: None,
            modules_to_save: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: None,
            alpha_pattern: None,
            use_rslora: None,
            use_dora: None,
            lora_bias: None,
            init_lora_weights: None,
            merge_adapter: false,
            loss_type: LossType::Sigmoid.into(),
            loss_weights: None,
            dpo_beta: 0.1,
            label_smoothing: 0.0,
            dpo_normalize_logratios_by_length: false,
            rpo_alpha: 0.0,
            desirable_weight: None,
            undesirable_weight: None,
            dpo_reference_free: false,
            sync_ref_model: false,
            ref_model_mixup_alpha: None,
            ref_model_sync_steps: None,
            simpo_gamma: None,
            cpo_alpha: None,
            f_divergence_type: FDivergenceType::ReverseKl,
            f_alpha_divergence_coef: None,
            ld_alpha: None,
            discopop_tau: None,
            use_weighting: false,
            reference_logps: ReferenceLogps::Compute,
            reference_cache: None,
            n_checkpoints: 1,
            save_steps: None,
            save_minutes: 30.0,
            save_total_limit: None,
            n_evals: None,
            eval_steps: None,
            eval_on_start: true,
            n_samples: 0,
            max_new_tokens: None,
            early_stopping_enabled: false,
            early_stopping_patience: None,
            early_stopping_min_delta: None,
            early_stopping_warmup_evals: None,
            metric_for_best_model: None,
            greater_is_better: None,
            micro_batch_tokens: 4096,
            prefix_sharing: true,
            activation_checkpointing: ActivationCheckpointing::Auto,
            zero_stage: 0,
            optim: Optim::Adamw,
            offload_optimizer: false,
            offload_reference: false,
            model_loading: ModelLoading::Auto,
        }
    }
}

/// Maximum size of a configuration file in bytes; a larger file is not a configuration.
const MOST_BYTES: u64 = 1 << 20;

/// Format of `template_date`.
const DATE: &str = "%Y-%m-%dT%H:%M:%S";

/// Parses a `template_date`.
pub fn parse_date(text: &str) -> Result<NaiveDateTime, Fault> {
    let date = NaiveDateTime::parse_from_str(text, DATE).ok();
    // Require four digits: systems differ in how they format other years in templates.
    date.filter(|date| date.format(DATE).to_string() == text && (1000..=9999).contains(&date.year()))
        .ok_or_else(|| {
            Fault::input(format!("template_date {text:?} is no date and time"))
                .hint("write it as YYYY-MM-DDTHH:MM:SS, for example 2026-01-31T12:00:00")
        })
}

fn home() -> Option<String> {
    std::env::var("HOME").ok()
}

impl RunConfig {
    /// Every key, in the order of the documentation.
    #[must_use]
    pub fn keys() -> Vec<&'static str> {
        KEYS.to_vec()
    }

    /// Reads a TOML file or a `run.json`, applies `key=value` overrides, and checks all rules.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, Fault> {
        // Shells do not expand the `~` in `--config=~/run.toml`.
        let shown = path.display().to_string();
        let expanded = expand(&shown, home().as_deref())
            .map_err(|fault| Fault { message: format!("--config: {}", fault.message), ..fault })?;
        let path = if expanded == shown { path } else { Path::new(&expanded) };
        let text = files::read_to_string_or_pipe(path, MOST_BYTES).map_err(|error| {
            Fault::input(format!("cannot read config file {}: {error}", path.display()))
                .hint("give the path of a TOML file with --config")
        })?;
        Self::from_toml(&text, &path.display().to_string(), overrides)
    }

    /// Parses TOML text, or the JSON of a `run.json`; `source` names it in errors.
    pub fn from_toml(text: &str, source: &str, overrides: &[String]) -> Result<Self, Fault> {
        let mut table = table_of(text, source)?;
        for (key, value) in &table {
            known(key).map_err(|fault| at(without_sections(fault, value), source, text, key))?;
        }
        for item in overrides {
            let (key, value) = parse_override(item)?;
            table.insert(key, value);
        }
        let mut config = from_table(&table, source, text)?;
        config.expand_paths(home().as_deref())?;
        config.check()?;
        Ok(config)
    }

    /// Serialises the configuration for trainers.
    pub fn to_json(&self) -> Result<String, Fault> {
        serde_json::to_string(self)
            .map_err(|error| Fault::failed(format!("cannot serialise the run config: {error}")))
    }

    /// Parses the output of [`RunConfig::to_json`] and checks it again, because it came over the wire.
    pub fn from_json(json: &str) -> Result<Self, Fault> {
        let mut value: serde_json::Value = serde_json::from_str(json)
            .map_err(|error| Fault::input(format!("run config from the coordinator: {error}")))?;
        value.as_object_mut().map(|keys| keys.remove(RECORD));
        let config: Self = serde_json::from_value(value)
            .map_err(|error| Fault::input(format!("run config from the coordinator: {error}")))?;
        config.check()?;
        Ok(config)
    }

    /// Sets `template_date` to the current local time, unless it is set.
    pub fn fill_template_date(&mut self) {
        let now = || chrono::Local::now().naive_local().format(DATE).to_string();
        self.template_date.get_or_insert_with(now);
    }

    /// The date for chat templates. It is the same on all ranks, because it is filled in before they get the configuration.
    pub fn template_date(&self) -> Result<NaiveDateTime, Fault> {
        let date = self.template_date.as_deref();
        let date = date.ok_or_else(|| Fault::failed("the run's configuration came without template_date"))?;
        parse_date(date)
    }

    /// Number of evenly spaced evaluations over the run, without the one before the first step; 0 if `eval_steps` says when.
    #[must_use]
    pub fn n_evals(&self) -> u32 {
        self.n_evals.unwrap_or(u32::from(self.validation_file.is_some() && self.eval_steps.is_none()))
    }

    /// Cycles of the learning rate's schedule; 0 for a schedule without cycles.
    #[must_use]
    pub fn scheduler_num_cycles(&self) -> f64 {
        self.scheduler_num_cycles.or(self.lr_scheduler_type.usual_cycles()).unwrap_or(0.0)
    }

    /// Most tokens of a sample answer.
    #[must_use]
    pub fn max_new_tokens(&self) -> u32 {
        self.max_new_tokens.unwrap_or(64)
    }

    /// Rank of new adapters.
    #[must_use]
    pub fn lora_r(&self) -> u32 {
        self.lora_r.unwrap_or(64)
    }

    /// Scale numerator of new adapters.
    #[must_use]
    pub fn lora_alpha(&self) -> f64 {
        self.lora_alpha.unwrap_or(2.0 * f64::from(self.lora_r()))
    }

    /// Dropout on the adapters' input.
    #[must_use]
    pub fn lora_dropout(&self) -> f64 {
        self.lora_dropout.unwrap_or(0.0)
    }

    /// Layers of new adapters.
    pub fn lora_modules(&self) -> Result<LoraModules, Fault> {
        self.lora_trainable_modules
            .as_deref()
            .map_or(Ok(LoraModules::AllLinear), |text| LoraModules::parse("lora_trainable_modules", text))
    }

    /// Whether reference log-probabilities are kept after the step that computes them.
    #[must_use]
    pub fn keeps_references(&self) -> bool {
        self.reference_logps != ReferenceLogps::Compute
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "model = \"m\"\ntraining_file = \"t.jsonl\"\noutput_dir = \"out\"\n";

    fn parse(extra: &str, overrides: &[&str]) -> Result<RunConfig, Fault> {
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        RunConfig::from_toml(&format!("{GOOD}{extra}"), "run.toml", &overrides)
    }

    #[test]
    fn defaults_are_the_fine_tuning_apis() {
        let config = parse("", &[]).unwrap();
        assert_eq!((config.n_epochs, config.batch_size, config.dpo_beta), (1, 8, 0.1));
        assert_eq!(config.lora_alpha(), 128.0);
        assert!(config.shuffle);
    }

    #[test]
    fn unknown_key_names_line_and_nearest_key() {
        let fault = parse("learning_rat = 1e-4\n", &[]).unwrap_err();
        assert_eq!(fault.message, "run.toml line 4: unknown config key `learning_rat`");
        assert_eq!(fault.hint, "did you mean `learning_rate`?");
    }

    #[test]
    fn a_key_that_is_the_start_of_another_is_found_on_its_own_line() {
        let fault = parse("learning_rate = 1e-4\n\nlearning_rat = 1e-4\n", &[]).unwrap_err();
        assert_eq!(fault.message, "run.toml line 6: unknown config key `learning_rat`");
    }

    #[test]
    fn wrong_type_and_range_name_the_key() {
        let fault = parse("batch_size = \"many\"\n", &[]).unwrap_err();
        assert!(
            fault.message.starts_with("run.toml line 4: config key `batch_size`: invalid type"),
            "{fault}"
        );
        let fault = parse("", &["learning_rate=fast"]).unwrap_err();
        assert_eq!(
            fault.message,
            "--set learning_rate=fast: config key `learning_rate`: invalid type: string \"fast\", expected a number"
        );
        let fault = parse("batch_size = -1\n", &[]).unwrap_err();
        assert!(fault.message.contains("`-1`, expected a whole number from 0"), "{fault}");
        let fault = parse("loss_type = \"ipo9\"\n", &[]).unwrap_err();
        assert!(fault.message.contains("config key `loss_type`: unknown variant `ipo9`"), "{fault}");
        let fault = parse("dpo_beta = 0\n", &[]).unwrap_err();
        assert_eq!(
            fault.message,
            "config key `dpo_beta`: expected a number above 0, at least 1e-6 and at most 1000, found 0"
        );
    }

    #[test]
    fn overrides_win_and_strings_need_no_quotes() {
        let config =
            parse("n_epochs = 3\n", &["n_epochs=5", "model=org/name", "learning_rate=1e-6"]).unwrap();
        assert_eq!((config.n_epochs, config.model.as_str(), config.learning_rate), (5, "org/name", 1e-6));
        assert_eq!(parse("", &["output_dir=2026-11-29"]).unwrap().output_dir, "2026-11-29");
        assert_eq!(parse("", &["output_dir=1"]).unwrap().output_dir, "1");
        let fault = parse("", &["output_dir=\"a\"\nmodel = \"b\""]).unwrap_err();
        assert!(
            fault.message.contains("`output_dir`") && fault.message.contains("control character"),
            "{fault}"
        );
        assert!(parse("", &["n_epoch=5"]).unwrap_err().hint.contains("n_epochs"));
        assert!(parse("", &["n_epochs"]).unwrap_err().message.contains("expected key=value"));
    }

    #[test]
    fn a_configuration_survives_json() {
        let config = parse("max_steps = 3\nlora = true\n", &[]).unwrap();
        assert_eq!(RunConfig::from_json(&config.to_json().unwrap()).unwrap(), config);
    }

    /// A changed last bit would make a different run.
    #[test]
    fn json_keeps_every_bit_of_a_number() {
        for text in [
            "0.00012345678901234567",
            "0.00098765432109876543",
            "0.0005500000000000001",
            "0.1234567890123456",
        ] {
            let config = parse(&format!("learning_rate = {text}\nwarmup_ratio = {text}\n"), &[]).unwrap();
            let travelled = RunConfig::from_json(&config.to_json().unwrap()).unwrap();
            let number: f64 = text.parse().unwrap();
            assert_eq!(travelled.learning_rate.to_bits(), number.to_bits(), "{text}");
            assert_eq!(travelled.warmup_ratio.to_bits(), number.to_bits(), "{text}");
        }
    }

    #[test]
    fn every_field_is_a_known_key() {
        let json = serde_json::to_value(RunConfig::default()).unwrap();
        let fields: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, RunConfig::keys());
    }
}
