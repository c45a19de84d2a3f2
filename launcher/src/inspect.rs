//! `launcher check`, `launcher preview` and `launcher convert`: files of pairs, without a run.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use dyad_inspect::check;
use dyad_inspect::convert::{self, Target};
use dyad_inspect::preview::{self, Marks};
use dyad_proto::run_config::{DataFile, DataFiles, DatasetFormat, TrainingMethod};
use dyad_proto::{Fault, RunConfig, agrees, counted};
use serde::de::DeserializeOwned;

use crate::show::console::print;

/// Model and form, for `check` and `preview`.
#[derive(Args, Clone, Debug)]
pub struct ReadingOptions {
    /// Take model, files and settings from a run's configuration (TOML); the other options win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Model folder or hub id: its tokenizer and chat template; no weights are read
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Most tokens of prompt plus completion [default: the model's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub max_seq_length: Option<u32>,
    /// `dpo`, or `sft`, which uses the preferred output only [default: dpo]
    #[arg(long, value_name = "METHOD", value_parser = named::<TrainingMethod>)]
    pub training_method: Option<TrainingMethod>,
    /// Form of the records: preference_openai, preference, unpaired_preference, prompt_completion, messages or text [default: the
    /// first record decides]
    #[arg(long, value_name = "FORM", value_parser = named::<DatasetFormat>)]
    pub dataset_format: Option<DatasetFormat>,
}

/// Options of `launcher check`.
#[derive(Args, Clone, Debug)]
pub struct CheckArguments {
    /// Files, folders, patterns or addresses of pairs
    #[arg(value_name = "FILE", required_unless_present = "config")]
    pub files: Vec<String>,
    /// Pairs to evaluate on; reports those that are among the pairs to train on
    #[arg(long, value_name = "FILE")]
    pub validation: Vec<String>,
    /// Model and form.
    #[command(flatten)]
    pub reading: ReadingOptions,
    /// Write NAME.clean.jsonl with the records without findings, and NAME.rejects.jsonl with the others and their problems
    #[arg(long)]
    pub fix: bool,
    /// Folder for the files of --fix [default: the current one]
    #[arg(long, value_name = "FOLDER", requires = "fix")]
    pub out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Most findings to print; 0 prints all
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
}

/// Options of `launcher preview`.
#[derive(Args, Clone, Debug)]
pub struct PreviewArguments {
    /// Files, folders, patterns or addresses of pairs
    #[arg(value_name = "FILE", required_unless_present = "config")]
    pub files: Vec<String>,
    /// Model and form.
    #[command(flatten)]
    pub reading: ReadingOptions,
    /// Number of records
    #[arg(short, long = "number", value_name = "N", default_value_t = 1)]
    pub number: usize,
}

/// Options of `launcher convert`.
#[derive(Args, Clone, Debug)]
pub struct ConvertArguments {
    /// Files, folders, patterns or addresses of records
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<String>,
    /// Form to write: preference_openai (hosted APIs), preference (TRL), unpaired_preference (KTO), prompt_completion, messages or text
    #[arg(long, value_name = "FORM", value_parser = Target::parse)]
    pub to: Target,
    /// Form of the files [default: the first record decides]
    #[arg(long, value_name = "FORM", value_parser = named::<DatasetFormat>)]
    pub from: Option<DatasetFormat>,
    /// File of lines to write
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}

/// A value by its name in the configuration.
fn named<T: DeserializeOwned>(name: &str) -> Result<T, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

impl ReadingOptions {
    /// The settings of a run that decide how records are read.
    fn run(&self) -> Result<RunConfig, Fault> {
        let mut config = match &self.config {
            Some(path) => RunConfig::load(path, &[])?,
            None => RunConfig::default(),
        };
        if let Some(model) = &self.model {
            config.model.clone_from(model);
        }
        config.max_seq_length = self.max_seq_length.or(config.max_seq_length);
        config.training_method = self.training_method.unwrap_or(config.training_method);
        config.dataset_format = self.dataset_format.unwrap_or(config.dataset_format);
        Ok(config)
    }
}

fn places(files: &[String]) -> DataFiles {
    files.iter().map(|path| DataFile { path: path.clone(), weight: None }).collect::<Vec<_>>().into()
}

/// Checks files. Fails if a run would refuse one.
pub fn check(arguments: &CheckArguments) -> Result<(), Fault> {
    let config = arguments.reading.run()?;
    let given = |files: &[String]| (!files.is_empty()).then(|| places(files));
    let options = check::CheckOptions {
        training: given(&arguments.files).unwrap_or_else(|| config.training_file.clone()),
        validation: given(&arguments.validation).or_else(|| config.validation_file.clone()),
        config,
        limit: if arguments.limit == 0 { usize::MAX } else { arguments.limit },
        fix: arguments.fix.then(|| arguments.out.clone().unwrap_or_else(|| Path::new(".").to_owned())),
    };
    let report = check::run(&options)?;
    print(&if arguments.json { format!("{:#}\n", check::json(&report)) } else { check::table(&report) })?;
    let refused: u64 = report.files.iter().map(|file| file.records[0]).sum();
    if refused == 0 {
        return Ok(());
    }
    let fault = Fault::input(format!(
        "a run refuses {} {}",
        counted(refused, "record"),
        agrees(refused, "that has an error", "that have errors")
    ));
    Err(match arguments.fix {
        true => fault.hint("train on the clean files"),
        false => fault.hint("mend them, or leave them out: --fix writes the other records into a new file"),
    })
}

/// Shows records as a model sees them.
pub fn preview(arguments: &PreviewArguments) -> Result<(), Fault> {
    let config = arguments.reading.run()?;
    if config.model.is_empty() {
        return Err(
            Fault::input("preview needs a model: its template writes the text").hint("give --model MODEL")
        );
    }
    let places =
        if arguments.files.is_empty() { config.training_file.clone() } else { places(&arguments.files) };
    let colours =
        std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let marks = if colours { Marks::Colours } else { Marks::Brackets };
    print(&preview::show(&places, &config, arguments.number, marks)?)
}

/// Writes records in another form.
pub fn convert(arguments: &ConvertArguments) -> Result<(), Fault> {
    let ConvertArguments { files, to, from, out } = arguments;
    let converted = convert::run(&places(files), from.unwrap_or_default(), *to, out)?;
    print(&converted.shown(out))
}
