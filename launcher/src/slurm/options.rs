//! Options of `launcher slurm`.

use std::path::PathBuf;

use clap::Args;

use crate::hosts::hostfile::Nodes;

/// Options of `launcher slurm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  launcher slurm --nodes 4 --gpus-per-node 8 --partition gpu --time 12:00:00 --config run.toml > run.sbatch
  launcher slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 --config run.toml --submit -- --set n_epochs=2

Before the time limit, and when Slurm preempts the job, the run writes a checkpoint and ends. When the job is requeued, it resumes there.")]
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
    /// GPUs of each node. 0 trains on CPUs; without it, trainers use the GPUs that other options of sbatch give to the job.
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
    /// Time limit, as sbatch takes it: minutes, [HOURS:]MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]] or UNLIMITED.
    #[arg(long, value_name = "TIME", value_parser = time_limit)]
    pub time: Option<String>,
    /// Name of the job.
    #[arg(long, default_value = "dyad", value_name = "NAME")]
    pub job_name: String,
    /// Seconds before the time limit at which the run starts its last checkpoint.
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(10..=65_535))]
    pub checkpoint_before: u32,
    /// Any other option of sbatch, such as --sbatch=--mem=0; may be repeated.
    #[arg(long = "sbatch", value_name = "OPTION", allow_hyphen_values = true)]
    pub extra: Vec<String>,
    /// Options for the launcher in the job.
    #[arg(last = true, value_name = "LAUNCHER OPTIONS")]
    pub launcher: Vec<String>,
}

/// Checks the form of a time limit, which sbatch would refuse only when the script is submitted.
fn time_limit(text: &str) -> Result<String, String> {
    let number =
        |part: &str| !part.is_empty() && part.len() <= 9 && part.bytes().all(|byte| byte.is_ascii_digit());
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(days), clock),
        None => (None, text),
    };
    let parts = clock.split(':').count();
    let is_limit = parts <= 3 && days.is_none_or(number) && clock.split(':').all(number);
    if is_limit || ["UNLIMITED", "INFINITE"].contains(&text.to_ascii_uppercase().as_str()) {
        return Ok(text.to_owned());
    }
    Err("not a time limit of Slurm; use 90 (minutes), 12:00:00, 2-12 (days-hours), 2-12:30:00 or UNLIMITED"
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_limits_have_slurms_forms() {
        for good in ["90", "90:30", "12:00:00", "2-12", "2-12:30", "2-12:30:00", "0", "unlimited", "INFINITE"]
        {
            assert_eq!(time_limit(good).as_deref(), Ok(good));
        }
        for bad in ["", "12h", "1:2:3:4", "-1", "1-", "2-12:", ":30", "1 2", "99999999999"] {
            assert!(time_limit(bad).is_err(), "{bad}");
        }
    }
}
