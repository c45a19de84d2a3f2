//! Command line of the launcher.

use clap::{ArgMatches, Args, Command, FromArgMatches, Parser, Subcommand};

use crate::agent::serve::AgentOptions;
use crate::doctor::DoctorOptions;
use crate::evaluate::EvaluateOptions;
use crate::hosts::options::HostOptions;
use crate::inspect::{CheckArguments, ConvertArguments, PreviewArguments};
use crate::kubernetes::cli::KubernetesOptions;
use crate::node::NodeOptions;
use crate::predict::options::PlanOptions;
use crate::quickstart::QuickstartOptions;
use crate::security::SecurityOptions;
use crate::slurm::options::SlurmOptions;
use crate::train::options::Options;

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
  launcher check train.jsonl --validation test.jsonl --model Qwen/Qwen2.5-0.5B-Instruct
  launcher doctor --hostfile hosts --config run.toml
  launcher slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 --config run.toml --submit
  launcher plan --gpus 64 --model 8B
  launcher evaluate --model runs/first/final --reference model --file validation.jsonl
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
    /// The subcommand; `None` for a training run.
    #[command(subcommand)]
    pub command: Option<LauncherCommand>,
    /// Options of a training run.
    #[command(flatten)]
    pub options: GivenOptions,
    /// Hosts of the run.
    #[command(flatten)]
    pub hosts: HostOptions,
    /// TLS and join token.
    #[command(flatten)]
    pub security: SecurityOptions,
}

/// Options of a training run; `None` if a subcommand was given. clap's own optional groups cannot hold further groups.
#[derive(Clone, Debug)]
pub struct GivenOptions(pub Option<Options>);

impl FromArgMatches for GivenOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        matches.contains_id("config").then(|| Options::from_arg_matches(matches)).transpose().map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for GivenOptions {
    fn augment_args(command: Command) -> Command {
        Options::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Options::augment_args_for_update(command)
    }
}

/// Subcommands of the launcher.
#[derive(Clone, Debug, Subcommand)]
pub enum LauncherCommand {
    /// Predict memory, speed and cost of a run; starts nothing.
    Plan(PlanOptions),
    /// Run on a Kubernetes cluster: render, apply, status, logs, wait, delete.
    Kubernetes(Box<KubernetesOptions>),
    /// Start and watch the trainers of one node, for a scheduler that starts one such process per node.
    Node(NodeOptions),
    /// Check machines before a run: ssh, clocks, versions, GPUs, ports, memory, disk, model.
    Doctor(DoctorOptions),
    /// Check files of pairs: every problem of every record, tokens, duplicates; with --fix write a clean file. (--dry-run checks a run,
    /// doctor checks machines.)
    Check(CheckArguments),
    /// Show records as a model sees them, with the trained tokens marked.
    Preview(PreviewArguments),
    /// Write records in another form: of hosted APIs, TRL, KTO, single answers, conversations.
    Convert(ConvertArguments),
    /// Write, or submit, a Slurm batch script that starts a run on its nodes.
    Slurm(SlurmOptions),
    /// Make a small model and train it on shipped pairs, first supervised, then with DPO, on this machine's CPU.
    Quickstart(QuickstartOptions),
    /// Evaluate a model or an adapter on preference pairs, without training.
    Evaluate(EvaluateOptions),
    /// Node agent: `launcher --hosts` starts it on each host and talks to it over standard input and output.
    Agent(AgentOptions),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::hostfile::Nodes;
    use crate::placement::gpus::Gpus;

    fn parse(line: &str) -> Result<CommandLine, clap::Error> {
        CommandLine::try_parse_from(line.split(' '))
    }

    #[test]
    fn run_options_and_subcommands_are_parsed() {
        let run = parse("launcher --nodes 4 --config run.toml").unwrap();
        let options = run.options.0.unwrap();
        assert!(
            run.command.is_none()
                && options.nodes == Some(Nodes::exactly(4))
                && options.gpus_per_node == Gpus::Auto
        );
        assert!(run.hosts.hosts.is_none());
        let run = parse("launcher --hosts a,b --config run.toml").unwrap();
        assert!(run.options.0.is_some_and(|options| options.nodes.is_none()));
        assert_eq!(run.hosts.hosts.as_deref(), Some("a,b"));
        assert!(parse("launcher --hosts a --hostfile f --config run.toml").is_err());
        let doctor = parse("launcher doctor --hosts a,b").unwrap();
        assert!(
            matches!(doctor.command, Some(LauncherCommand::Doctor(doctor)) if doctor.hosts.hosts.is_some())
        );
        let plan = parse("launcher plan --gpus 64 --model 8B").unwrap();
        assert!(
            matches!(plan.command, Some(LauncherCommand::Plan(plan)) if plan.gpus == Some(64))
                && plan.options.0.is_none()
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
