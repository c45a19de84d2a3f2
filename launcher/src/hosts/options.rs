//! Options for the hosts of a run.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::hosts::environment::is_name;

/// Hosts of a run, and connections to them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Several hosts")]
pub struct HostOptions {
    /// Hosts of the run, reached over ssh: [user@]host[:port], separated by commas.
    #[arg(long, value_name = "A,B,…", conflicts_with = "hostfile")]
    pub hosts: Option<String>,
    /// File of hosts, one per line: [user@]host[:port] [slots=N]. slots is the number of trainers on the host.
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<PathBuf>,
    /// Where the coordinator runs. It writes metrics into `output_dir` there; rank 0 writes checkpoints on the first host.
    #[arg(long, value_enum, default_value_t = CoordinatorOn::First, value_name = "first|here")]
    pub coordinator_on: CoordinatorOn,
    /// Set a variable in every process of the run, on all hosts; without =VALUE it gets the launcher's own value. May be
    /// repeated. OTEL_*, NCCL_*, GLOO_*, HF_*, HUGGING*, DYAD_LOG and a few more are always passed on (docs/hosts.md).
    #[arg(long = "env", value_name = "NAME[=VALUE]", value_parser = variable)]
    pub env: Vec<(String, Option<String>)>,
    /// Copy the binaries and libtorch to every host that lacks them, into ~/.cache/dyad. Without this flag every host must have
    /// them at the same path as this machine.
    #[arg(long)]
    pub push: bool,
    /// Command to use instead of `ssh`, with its options, such as "ssh -F config".
    #[arg(long, env = "DYAD_SSH", default_value = "ssh", value_name = "COMMAND")]
    pub ssh: String,
    /// How long a host may be silent before it counts as lost. Its agent then kills the processes there.
    #[arg(long, default_value_t = 20, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..=86_400))]
    pub host_timeout: u64,
}

/// Which machine runs the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CoordinatorOn {
    /// The first host.
    First,
    /// The machine that the launcher is started on.
    Here,
}

fn variable(text: &str) -> Result<(String, Option<String>), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    if !is_name(name) {
        return Err("expected NAME or NAME=VALUE".into());
    }
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_need_a_valid_name() {
        assert_eq!(variable("A_1=x=y"), Ok(("A_1".into(), Some("x=y".into()))));
        assert_eq!(variable("A"), Ok(("A".into(), None)));
        assert_eq!(variable("A="), Ok(("A".into(), Some(String::new()))));
        for wrong in ["", "=x", "1A", "A B=1", "A-B"] {
            assert!(variable(wrong).is_err(), "{wrong}");
        }
    }
}
