//! `launcher evaluate`: the metrics of a model on preference pairs, without training. It is a run of the same programs that only evaluates,
//! in a temporary folder that is removed afterwards.

use std::path::{Path, PathBuf};

use clap::Args;
use dyad_proto::names::metric;
use dyad_proto::run_config::ReferenceLogps;
use dyad_proto::{Fault, RunConfig, plain, safe_file};
use serde_json::{Value, json};

use crate::hosts::hostfile::Nodes;
use crate::placement::gpus::Gpus;
use crate::show::rows::{self, Row};
use crate::show::summary::EVALUATED;

/// Options of `launcher evaluate`.
#[derive(Args, Clone, Debug)]
pub struct EvaluateOptions {
    /// Model folder, PEFT adapter folder, or hub id.
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// Preference pairs to evaluate on (docs/data.md).
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    /// Model to compare with, as `from_checkpoint` is in a run: folder, adapter folder or hub id. Default: with --config the start of that
    /// run; else the base of an adapter; else the model itself, whose rewards are 0.
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<String>,
    /// Run configuration whose loss, lengths and precision are used; its files and its keys of training are not.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set one key of the configuration, such as dpo_beta=0.2; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Number of nodes on this machine; each runs one trainer per GPU, or one CPU trainer.
    #[arg(long, value_name = "N")]
    pub nodes: Option<Nodes>,
    /// GPUs of each node: a number, or auto for all visible GPUs, or the CPU if there is none.
    #[arg(long, default_value = "auto", value_name = "G|auto")]
    pub gpus_per_node: Gpus,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Also write that JSON object to this file. Nothing else is written.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Show every log line of every process.
    #[arg(long)]
    pub verbose: bool,
}

/// What an evaluation computes, once its options are checked.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Configuration of the run.
    pub config: RunConfig,
    /// Model to compare with; empty for the base of an adapter, or the model itself.
    pub reference: String,
    /// The same for the user; `None` for an objective without a reference.
    pub compared_with: Option<String>,
}

impl Evaluation {
    /// Checks the options. `folder` is the temporary folder.
    pub fn new(options: &EvaluateOptions, folder: &Path) -> Result<Self, Fault> {
        let (mut config, given) = configuration(options)?;
        let start = given.then(|| config.from_checkpoint.clone().unwrap_or_else(|| config.model.clone()));
        let adapter = is_adapter(&options.model);
        // An adapter of a run lies on the run's model, whatever the adapter's own configuration calls it.
        if !(adapter && given && config.from_checkpoint.is_none()) {
            config.model = String::new();
            config.model_revision = None;
        }
        config.from_checkpoint = Some(options.model.clone());
        config.output_dir = folder.join("out").to_string_lossy().into_owned();
        let untrained = RunConfig::default();
        let config = RunConfig {
            // With it adapters are accepted, and whole models too.
            lora: true,
            merge_adapter: false,
            max_steps: None,
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
            reference_logps: ReferenceLogps::Compute,
            offload_reference: false,
            offload_optimizer: false,
            lora_r: None,
            lora_alpha: None,
            lora_dropout: None,
            lora_trainable_modules: None,
            optim: untrained.optim,
            ..config
        };
        config.check()?;
        let needs = config.objective().needs_reference();
        if !needs && options.reference.is_some() {
            return Err(Fault::input("--reference is given, but the objective has no reference model")
                .hint("leave out --reference, or set training_method = \"dpo\" and a loss that has one"));
        }
        let reference = options.reference.clone().or(start).filter(|_| needs).unwrap_or_default();
        let shown = match (reference.is_empty(), adapter) {
            (false, _) => reference.clone(),
            (true, true) => "the adapter's base".to_owned(),
            (true, false) => "the model itself: rewards and kl are 0; --reference names another".to_owned(),
        };
        let reference = absolute(&reference)?;
        Ok(Self { config, reference, compared_with: needs.then_some(shown) })
    }
}

/// The configuration with the user's keys, and whether it is that of a run.
fn configuration(options: &EvaluateOptions) -> Result<(RunConfig, bool), Fault> {
    let file = options.file.to_str().ok_or_else(|| {
        Fault::input(format!("--file {} is not valid UTF-8", options.file.display())).hint("rename the file")
    })?;
    let set = |key: &str, value: &str| format!("{key}={value}");
    // Last, so that they win.
    let own = [set("training_file", file), set("validation_file", file), set("output_dir", "unused")];
    let given: Vec<String> = options.overrides.iter().cloned().chain(own).collect();
    match &options.config {
        Some(path) => Ok((RunConfig::load(path, &given)?, true)),
        None => {
            let model = [set("from_checkpoint", &options.model)];
            Ok((RunConfig::from_toml("", "--set", &[model.as_slice(), &given].concat())?, false))
        }
    }
}

fn is_adapter(model: &str) -> bool {
    Path::new(model).join("adapter_config.json").is_file()
}

/// The absolute path of a folder; hub ids stay as they are.
fn absolute(model: &str) -> Result<String, Fault> {
    if model.is_empty() || !Path::new(model).exists() {
        return Ok(model.to_owned());
    }
    let path = std::path::absolute(model)
        .map_err(|error| Fault::failed(format!("no absolute path for {model}: {error}")))?;
    Ok(path.to_string_lossy().into_owned())
}

/// A temporary folder; dropping it removes it.
#[derive(Debug)]
pub struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    /// Makes a folder of this process.
    pub fn new() -> Result<Self, Fault> {
        let path = std::env::temp_dir().join(format!("dyad-evaluate-{}", std::process::id()));
        let made = safe_file::new_folder(&path);
        made.map_err(|error| {
            Fault::failed(format!("cannot make the temporary folder {}: {error}", path.display()))
                .hint("set TMPDIR to a folder that you may write to")
        })?;
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// The metrics that the run has written.
pub fn metrics(evaluation: &Evaluation) -> Result<Row, Fault> {
    let path = Path::new(&evaluation.config.output_dir).join("eval_metrics.jsonl");
    let row = rows::read(&path).pop();
    row.ok_or_else(|| Fault::failed(format!("the run has left no metrics in {}", path.display())))
}

/// The result as JSON: what was evaluated, and the keys of `eval_metrics.jsonl`.
#[must_use]
pub fn as_json(options: &EvaluateOptions, evaluation: &Evaluation, row: &Row) -> Value {
    let mut result = json!({
        "model": options.model,
        "file": options.file,
        "compared_with": evaluation.compared_with,
    });
    let metrics: std::collections::BTreeMap<_, _> =
        row.iter().filter(|(key, _)| *key != metric::STEP).collect();
    for (key, value) in metrics {
        result[key.as_str()] = json!(value);
    }
    result
}

/// The result as a table.
#[must_use]
pub fn table(options: &EvaluateOptions, evaluation: &Evaluation, row: &Row) -> String {
    let line = |name: &str, text: &str| format!("{name:22}{}\n", plain::line(text));
    let mut out = line("model", &options.model);
    out += &line("pairs", &options.file.to_string_lossy());
    let reference = evaluation.compared_with.as_deref().unwrap_or("no reference model");
    out += &line("compared with", reference);
    for (key, label) in EVALUATED {
        if let Some(value) = row.get(&format!("{}{key}", metric::EVAL)) {
            out += &format!("  {label:20}{value:>10.4}\n");
        }
    }
    out
}

/// Writes the result to the file that the user names.
pub fn write(path: &Path, result: &Value) -> Result<(), Fault> {
    safe_file::write(path, format!("{result:#}\n").as_bytes()).map_err(|error| {
        Fault::input(format!("cannot write --output {}: {error}", path.display()))
            .hint("name a file in a folder that you may write to")
    })
}

/// Fails before the evaluation if the file for its result cannot be written.
pub fn check_output(path: &Path) -> Result<(), Fault> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let what = match (folder.is_dir(), path.is_dir()) {
        (true, false) => return Ok(()),
        (true, true) => "it is a folder",
        (false, _) => "its folder is missing",
    };
    Err(Fault::input(format!("cannot write --output {}: {what}", path.display()))
        .hint("name a file in a folder that you may write to"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(model: &str, more: impl FnOnce(&mut EvaluateOptions)) -> EvaluateOptions {
        let mut options = EvaluateOptions {
            model: model.into(),
            file: "v.jsonl".into(),
            reference: None,
            config: None,
            overrides: Vec::new(),
            nodes: None,
            gpus_per_node: Gpus::Auto,
            json: false,
            output: None,
            verbose: false,
        };
        more(&mut options);
        options
    }

    fn evaluation(options: &EvaluateOptions) -> Result<Evaluation, Fault> {
        Evaluation::new(options, Path::new("/tmp/x"))
    }

    #[test]
    fn without_a_reference_a_model_is_compared_with_itself_and_that_is_said() {
        let alone = evaluation(&options("org/model", |_| {})).unwrap();
        assert_eq!(alone.reference, "");
        assert!(alone.compared_with.unwrap().starts_with("the model itself: rewards and kl are 0"));
        let other = evaluation(&options("org/model", |o| o.reference = Some("org/base".into()))).unwrap();
        assert_eq!(
            (other.reference.as_str(), other.compared_with.as_deref()),
            ("org/base", Some("org/base"))
        );
        assert_eq!(other.config.from_checkpoint.as_deref(), Some("org/model"));
        assert_eq!(other.config.validation_file, Some("v.jsonl".into()));
    }

    #[test]
    fn a_loss_without_a_reference_refuses_one() {
        let simpo = |o: &mut EvaluateOptions| o.overrides = vec!["loss_type=simpo".into()];
        assert_eq!(evaluation(&options("org/model", simpo)).unwrap().compared_with, None);
        let both = options("org/model", |o| {
            simpo(o);
            o.reference = Some("org/base".into());
        });
        assert!(evaluation(&both).unwrap_err().message.starts_with("--reference is given, but"));
    }

    #[test]
    fn keys_of_training_in_a_runs_configuration_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        let text = "model = \"org/start\"\ntraining_file = \"t\"\noutput_dir = \"o\"\nvalidation_file = \"w\"\ndpo_beta = 0.5\n\
                    n_evals = 4\nearly_stopping_enabled = true\nreference_logps = \"precompute\"\nn_samples = 2\nlora = true\nlora_r = 8\n";
        std::fs::write(&path, text).unwrap();
        let of_run = evaluation(&options("org/trained", |o| o.config = Some(path))).unwrap();
        assert_eq!((of_run.reference.as_str(), of_run.config.dpo_beta), ("org/start", 0.5));
        assert!(of_run.config.model.is_empty() && of_run.config.early_stopping().is_none());
    }
}
