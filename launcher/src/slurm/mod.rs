//! Slurm: runs inside an allocation, and batch scripts that make one.
//!
//! [`nodelist`], [`allocation`]: where a run goes. [`script`]: `launcher slurm`. The agents are steps that `srun` starts
//! ([`crate::hosts::transport`]).

pub mod allocation;
pub mod nodelist;
pub mod script;

use std::path::PathBuf;
use std::process::Stdio;

use clap::Args;
use dyad_proto::{Fault, RunConfig};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::console::{print, warn};
use crate::hosts::hostfile::Nodes;
use crate::programs::own_folder;

/// Options of `launcher slurm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  launcher slurm --nodes 4 --gpus-per-node 8 --partition gpu --time 12:00:00 --config run.toml > run.sbatch
  launcher slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 --config run.toml --submit -- --set n_epochs=2

Before the time limit, and when Slurm preempts the job, the run writes a checkpoint and ends; queued again it goes on from there.")]
pub struct SlurmOptions {
    /// Nodes of the job.
    #[arg(long, value_name = "N|MIN:MAX")]
    pub nodes: Nodes,
    /// Run configuration (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Override one key of the configuration; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// GPUs of each node. 0 trains on CPUs; without it, trainers use the GPUs that other options of sbatch have given to the job.
    #[arg(long, value_name = "G", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus_per_node: Option<u32>,
    /// Cores of each node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus_per_task: Option<u32>,
    /// Submit the script with sbatch instead of printing it.
    #[arg(long)]
    pub submit: bool,
    /// Partition.
    #[arg(long, value_name = "NAME")]
    pub partition: Option<String>,
    /// Account.
    #[arg(long, value_name = "NAME")]
    pub account: Option<String>,
    /// Quality of service.
    #[arg(long, value_name = "NAME")]
    pub qos: Option<String>,
    /// Features of the nodes.
    #[arg(long, value_name = "LIST")]
    pub constraint: Option<String>,
    /// Time limit, as sbatch takes it.
    #[arg(long, value_name = "TIME")]
    pub time: Option<String>,
    /// Name of the job.
    #[arg(long, default_value = "dyad", value_name = "NAME")]
    pub job_name: String,
    /// Seconds before the time limit at which the checkpoint is begun.
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(10..=65_535))]
    pub checkpoint_before: u32,
    /// Any other option of sbatch, such as --sbatch=--mem=0; may be repeated.
    #[arg(long = "sbatch", value_name = "OPTION", allow_hyphen_values = true)]
    pub extra: Vec<String>,
    /// Options for the launcher in the job.
    #[arg(last = true, value_name = "LAUNCHER OPTIONS")]
    pub launcher: Vec<String>,
}

/// Prints or submits the script.
pub async fn run(options: &SlurmOptions) -> Result<(), Fault> {
    // A mistake here would be found hours later otherwise.
    RunConfig::load(&options.config, &options.overrides)?;
    script::check(options)?;
    let folder =
        std::env::current_dir().map_err(|error| Fault::failed(format!("no working directory: {error}")))?;
    let script = script::write(options, &folder, &own_folder()?.join("launcher"))?;
    if options.gpus_per_node.is_none() {
        warn(
            "the job asks for no GPUs by --gpus-per-node: trainers use those that its nodes show, and the CPU where they show none",
        );
    }
    let said = if options.submit { submit(&script).await? } else { script };
    print(&said)
}

async fn submit(script: &str) -> Result<String, Fault> {
    let mut command = Command::new("sbatch");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| {
        Fault::unavailable(format!("cannot start sbatch: {error}"))
            .hint("submit from a login node of the cluster, or print the script without --submit")
    })?;
    if let Some(mut stdin) = child.stdin.take() {
        // What sbatch says of it counts, not that it has closed its input.
        let _ = stdin.write_all(script.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(|error| Fault::failed(format!("sbatch: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Fault::input(format!("sbatch refuses the job: {}", said.trim().replace('\n', "; ")))
            .hint("sbatch's words are about an option of this command line; `sinfo` and `sacctmgr show assoc` list what there is"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
