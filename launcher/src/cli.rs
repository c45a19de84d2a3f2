//! Command line of the launcher.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use dyad_proto::LAST_SCRAPE_SECONDS;
use dyad_telemetry::LogFormat;

use crate::agent::serve::AgentOptions;
use crate::doctor::DoctorOptions;
use crate::hosts::hostfile::Nodes;
use crate::hosts::options::HostOptions;
use crate::kubernetes::cli::KubernetesOptions;
use crate::node::NodeOptions;
use crate::predict::options::PlanOptions;
use crate::quickstart::QuickstartOptions;
use crate::security::SecurityOptions;
use crate::slurm::SlurmOptions;

/// Fine-tune a language model on preference pairs.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "launcher",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  launcher quickstart
  launcher --config run.toml
  launcher --config run.toml --set learning_rate=1e-6 --set n_epochs=2
  launcher --config run.toml --resume
  launcher --nodes 2 --gpus-per-node 0 --config run.toml
  launcher --nodes 4 --hosts a,b,c,d --config run.toml
  launcher --hostfile hosts --config run.toml
  launcher doctor --hostfile hosts --config run.toml
  launcher slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 --config run.toml --submit
  launcher plan --gpus 64 --model 8B
  launcher kubernetes apply --nodes 4 --gpus-per-node 8 --image IMAGE --data claim:data --config run.toml

Ctrl-C, SIGTERM or SIGHUP (the terminal closes; not under nohup): finish the step in progress, write a checkpoint, end with status 130;
--resume goes on. Ctrl-C again, another signal more than 5 s later, or the end of --grace-period: end at once.

Exit status:
  0    the run is complete
  1    the run failed
  2    invalid input: configuration, data, model folder, missing device
  3    a port or host cannot be reached, or another run has output_dir
  130  stopped by Ctrl-C, SIGTERM or SIGHUP

Environment:
  OTEL_EXPORTER_OTLP_ENDPOINT  where traces of all processes go, such as http://localhost:4317; the other OTEL_* variables
                               work as OpenTelemetry says [default: nowhere]"
)]
pub struct CommandLine {
    /// What to do instead of a run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The run; absent only beside a command.
    #[command(flatten)]
    pub options: Option<Options>,
    /// Where the run goes. Not a part of [`Options`]: clap cannot tell whether a group is there that has groups of its own.
    #[command(flatten)]
    pub hosts: HostOptions,
    /// Who may talk to whom; no part of [`Options`] for the same reason.
    #[command(flatten)]
    pub security: SecurityOptions,
}

/// What the launcher does beside runs.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Predict memory, speed and cost of a run; starts nothing.
    Plan(PlanOptions),
    /// Run on a Kubernetes cluster: render, apply, status, logs, wait, delete.
    Kubernetes(Box<KubernetesOptions>),
    /// Start and watch the trainers of one node, where a scheduler has placed one such process per node.
    Node(NodeOptions),
    /// Check machines before a run: ssh, clocks, versions, GPUs, ports, memory, disk, model.
    Doctor(DoctorOptions),
    /// Write, or submit, a Slurm batch script that starts a run on its nodes.
    Slurm(SlurmOptions),
    /// Make a small model and train it on shipped pairs, first supervised, then with DPO, on this machine's CPU.
    Quickstart(QuickstartOptions),
    /// Serve a launcher on standard input and output; what `launcher --hosts` starts on each host.
    Agent(AgentOptions),
}

/// Options of a run.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Nodes to run; each node runs one trainer per GPU, or one CPU trainer. Without hosts all are on this machine (default 1) and
    /// share its GPUs, of which there must be one for each; with hosts, the first N of them (default all). MIN:MAX starts on MAX hosts, or as many as there are, at least MIN; a run does
    /// not change its size yet.
    #[arg(long, value_name = "N|MIN:MAX")]
    pub nodes: Option<Nodes>,
    /// GPUs that each node uses: a number, or auto for all that CUDA_VISIBLE_DEVICES leaves, or the CPU where the machine has none.
    /// 0 trains on the CPU.
    #[arg(long, default_value = "auto", value_name = "G|auto")]
    pub gpus_per_node: Gpus,
    /// Run configuration (TOML); see docs/config.md for every key.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Override one key of the configuration; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Continue from the last complete checkpoint in `output_dir`.
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
    /// Delete the metrics and checkpoints of an earlier run in `output_dir`.
    #[arg(long)]
    pub overwrite: bool,
    /// Continue from the last complete checkpoint in `output_dir`; where there is none, start (again). A run that is complete stays as it
    /// is. For schedulers that start a job again.
    #[arg(long)]
    pub auto_resume: bool,
    /// The scheduler's job, with --auto-resume: only a run that this job has begun is gone on with. Until then everything is as without
    /// --auto-resume, --overwrite or --resume beside it included.
    #[arg(long, value_name = "ID", requires = "auto_resume")]
    pub job: Option<String>,
    /// Check everything and print what would be started; start nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Show so many sample answers before and after training (needs `validation_file`).
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub samples: usize,
    /// Longest sample answer, in tokens.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_new_tokens: usize,
    /// Address that the coordinator listens on; port 0 takes a free one. By default 127.0.0.1:0, and with hosts an address that all
    /// of them reach.
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// How long a trainer tries to reach the coordinator.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub connect_timeout: u64,
    /// How long a run that was told to end (Ctrl-C, SIGTERM) may take to finish its step and save, before it is stopped.
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub grace_period: u64,
    /// How often a run that lost a process or host goes on from its last checkpoint, or begins anew where there is none. The count
    /// starts afresh with every later checkpoint. Bad input, a full disk, a signal, and the same failure at the same step three times
    /// end the run. 0 never starts it again.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub max_restarts: u32,
    /// How long a trainer may stand still although its heart beats, whatever it is doing; also shortens how long it, or the
    /// coordinator, may be silent. By default its phase says how long, 5 to 20 minutes, and longer where a run's own pauses are long.
    /// 0 sets no limit.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=604_800))]
    pub stall_timeout: Option<u64>,
    /// Start although the run does not fit the memory by estimate.
    #[arg(long)]
    pub no_memory_check: bool,
    /// Record a few steps of every trainer: a Chrome trace and a table each, in `output_dir/profile`.
    #[arg(long)]
    pub profile: bool,
    /// Keep each trainer to the cores of its memory node, or of its GPU's; matters on machines with several nodes only.
    #[arg(long, value_enum, default_value_t = NumaBinding::Node, value_name = "node|none")]
    pub numa_binding: NumaBinding,
    /// Show every log line of every process.
    #[arg(long)]
    pub verbose: bool,
    /// How log lines of all processes look, here and in `output_dir/logs`.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Let the coordinator serve metrics for Prometheus on this address [default: not at all].
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// How long the coordinator stays after the end of the run until somebody has scraped how it ended, where its metrics have been
    /// scraped before: without that, Prometheus takes the end of a run for the death of its coordinator. A little more than the
    /// interval of scrapes is enough; 0 waits for nobody.
    #[arg(long, value_name = "SECONDS", default_value_t = LAST_SCRAPE_SECONDS, value_parser = clap::value_parser!(u64).range(..=3600))]
    pub metrics_linger: u64,
    /// Trace the first three steps and one in so many, where OTEL_EXPORTER_OTLP_ENDPOINT is set; slow and failed ones always.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub trace_every: u64,
}

/// Whether trainers keep to the cores near their memory; torchrun's flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NumaBinding {
    /// To those of a node, or of as many as there are for each trainer.
    Node,
    /// To none.
    None,
}

/// GPUs per node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// All that the machine has, shared out over the nodes.
    Auto,
    /// Exactly so many.
    Count(u32),
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number.parse().map(Self::Count).map_err(|_| "expected a number or auto".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<CommandLine, clap::Error> {
        CommandLine::try_parse_from(line.split(' '))
    }

    #[test]
    fn runs_need_no_command_and_commands_no_run() {
        let run = parse("launcher --nodes 4 --config run.toml").unwrap();
        let options = run.options.unwrap();
        assert!(
            run.command.is_none()
                && options.nodes == Some(Nodes::exactly(4))
                && options.gpus_per_node == Gpus::Auto
        );
        assert!(run.hosts.hosts.is_none());
        let run = parse("launcher --hosts a,b --config run.toml").unwrap();
        assert!(run.options.is_some_and(|options| options.nodes.is_none()));
        assert_eq!(run.hosts.hosts.as_deref(), Some("a,b"));
        assert!(parse("launcher --hosts a --hostfile f --config run.toml").is_err());
        let doctor = parse("launcher doctor --hosts a,b").unwrap();
        assert!(matches!(doctor.command, Some(Command::Doctor(doctor)) if doctor.hosts.hosts.is_some()));
        let plan = parse("launcher plan --gpus 64 --model 8B").unwrap();
        assert!(
            matches!(plan.command, Some(Command::Plan(plan)) if plan.gpus == Some(64))
                && plan.options.is_none()
        );
    }

    #[test]
    fn a_run_without_configuration_is_refused() {
        for line in ["launcher", "launcher --nodes 2"] {
            let refused = parse(line).unwrap_err();
            assert_eq!(refused.kind(), clap::error::ErrorKind::MissingRequiredArgument, "{line}");
        }
        assert!(parse("launcher --config run.toml plan --gpus 8 --model 8B").is_err());
        assert!(parse("launcher plan --gpus 0 --model 8B").is_err());
    }
}
