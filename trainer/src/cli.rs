//! Command line of the trainer. The launcher starts `run`; users start the other commands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use dyad_data::new_model::NewModelCommand;
use dyad_proto::security::{TLS_DIR, TOKEN_FILE};
use dyad_telemetry::LogFormat;

/// One trainer process of a Dyad run.
#[derive(Debug, Parser)]
#[command(
    name = "trainer",
    version,
    after_help = "Exit status: 0 success, 1 the run failed, 2 invalid input, \
3 the coordinator cannot be reached, 4 stopped because another process failed, 130 stopped by a signal.

Environment: DYAD_LOG says which log lines are written [default: info]; OTEL_EXPORTER_OTLP_ENDPOINT and the other OTEL_* \
variables where traces go [default: nowhere]; DYAD_PEAK_FLOPS what the device can do per second, for model FLOPs utilisation \
[default: the data sheet's number of GPUs that are known]."
)]
pub struct TrainerCli {
    /// What to do.
    #[command(subcommand)]
    pub command: TrainerCommand,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum TrainerCommand {
    /// Join a run at its coordinator and train (started by the launcher).
    Run(TrainerOptions),
    /// Write a model with random weights and its own tokenizer, to learn, test and measure with.
    NewModel(NewModelCommand),
    /// Check everything that a run starts from, with the code that loads it: configuration, family, tensors and their shapes, adapter,
    /// tokenizer, template, vocabulary, the first pairs. Reads no weights, and prints what it found as JSON.
    Check(CheckOptions),
    /// Answer prompts with a model or adapter folder, one JSON line each.
    Generate(GenerateOptions),
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct TrainerOptions {
    /// Address of the coordinator, e.g. http://10.0.0.1:29400.
    #[arg(long)]
    pub coordinator: String,
    /// Folder with ca.pem, cert.pem, key.pem and join-token: the coordinator is reached over mutual TLS (docs/security.md).
    #[arg(long, env = TLS_DIR, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// File with the run's join token, for a coordinator without TLS. Without this option, the trainer looks up the token by the
    /// coordinator's port; that works if this user started the coordinator by hand on this machine.
    #[arg(long, env = TOKEN_FILE, value_name = "FILE", conflicts_with = "tls_dir")]
    pub token_file: Option<PathBuf>,
    /// Unique name within the run, e.g. node0-cpu or node1-gpu3.
    #[arg(long)]
    pub name: String,
    /// Position among the trainers; ranks are given in this order.
    #[arg(long)]
    pub launch_index: u32,
    /// cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Threads of the CPU passes.
    #[arg(long)]
    pub threads: Option<usize>,
    /// How long to wait until the coordinator's name resolves and its port answers.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub connect_timeout: u64,
    /// Profile three steps of this process (steps 5 to 7 in a long run): write a Chrome trace and a table of times into this folder.
    #[arg(long, value_name = "DIR")]
    pub profile: Option<PathBuf>,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// Options of `check`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct CheckOptions {
    /// The run's configuration (TOML, or a run.json); - reads JSON from standard input.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A model alone: a folder, or a hub id, of which only config.json is downloaded.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// Options of `generate`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  trainer generate --model runs/first/final --prompt 'What is a rank?'
  trainer generate --model runs/first/final --pairs held-out.jsonl --limit 20
  trainer generate --model runs/first/final < question.txt

Each answer is one JSON line: {\"prompt\": …, \"completion\": …}. Tokens are chosen greedily.")]
pub struct GenerateOptions {
    /// Model folder, or adapter folder that names its base.
    #[arg(long)]
    pub model: PathBuf,
    /// Prompt to answer, as a user's message; may be repeated. - reads one from standard input. Without --prompt and --pairs, one is read
    /// from standard input too.
    #[arg(long, value_name = "TEXT", conflicts_with = "pairs", allow_hyphen_values = true)]
    pub prompt: Vec<String>,
    /// File of pairs whose conversations are answered, or a folder, pattern or address; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub pairs: Vec<String>,
    /// Prompts of --pairs to answer, from the start of the file.
    #[arg(long, default_value_t = 5)]
    pub limit: usize,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 64)]
    pub max_new_tokens: usize,
    /// Local date to give to the chat template [default: now].
    #[arg(long, value_name = "YYYY-MM-DDTHH:MM:SS")]
    pub template_date: Option<String>,
    /// Threads of the CPU passes.
    #[arg(long)]
    pub threads: Option<usize>,
}
