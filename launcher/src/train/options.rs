//! Options of a training run, and loading of its configuration.

use std::path::{Path, PathBuf};

use clap::Args;
use dyad_proto::inputs::refuse_entangled;
use dyad_proto::run_config::DataFiles;
use dyad_proto::run_flags::{EarlierRunFlags, ObservationFlags, OutputMode};
use dyad_proto::{Fault, RunConfig, finished};
use dyad_sources::open;
use dyad_telemetry::LogFormat;

use crate::agent::run_files::readable_files;
use crate::hosts::hostfile::Nodes;
use crate::placement::gpus::Gpus;

/// Options of a run.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Number of nodes; each node runs one trainer per GPU, or one CPU trainer. Without hosts, all nodes are on this machine (default 1)
    /// and share its GPUs, at least one each. With hosts, the first N of them (default all). MIN:MAX uses up to MAX hosts, at
    /// least MIN; the number stays the same during the run.
    #[arg(long, value_name = "N|MIN:MAX")]
    pub nodes: Option<Nodes>,
    /// GPUs of each node: a number, or auto for all visible GPUs (CUDA_VISIBLE_DEVICES), or the CPU if there is none. 0 trains on
    /// the CPU.
    #[arg(long, default_value = "auto", value_name = "G|auto")]
    pub gpus_per_node: Gpus,
    /// Run configuration (TOML); see docs/config.md for every key.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Override one key of the configuration; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// What to do with an earlier run in `output_dir`.
    #[command(flatten)]
    pub earlier: EarlierRunFlags,
    /// Check everything and print what would be started; start nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Number of sample answers to show, before and after training (needs `validation_file`).
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub samples: usize,
    /// Longest sample answer, in tokens.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_new_tokens: usize,
    /// Address that the coordinator listens on; port 0 takes a free port. Default: 127.0.0.1:0, or with hosts an address that all
    /// of them reach.
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// How long a trainer tries to reach the coordinator.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub connect_timeout: u64,
    /// How long a run may take to finish its step and save after Ctrl-C or SIGTERM. Then it is killed.
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub grace_period: u64,
    /// Largest number of restarts after a process or host is lost. A restart goes on from the newest checkpoint, or starts again if
    /// there is none. The count returns to zero after each new checkpoint. Bad input, a full disk, a signal, or the same failure at
    /// the same step for the third time end the run at once. 0 never restarts.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub max_restarts: u32,
    /// Start even if the memory estimate says that the run does not fit.
    #[arg(long)]
    pub no_memory_check: bool,
    /// Record a few steps of every trainer: one Chrome trace and one table per trainer, in `output_dir/profile`.
    #[arg(long)]
    pub profile: bool,
    /// Pin each trainer to the cores of its GPU's NUMA node, or without GPU of an equal share of the nodes. No effect on machines
    /// with one NUMA node.
    #[arg(long, value_enum, default_value_t = NumaBinding::Node, value_name = "node|none")]
    pub numa_binding: NumaBinding,
    /// Show every log line of every process.
    #[arg(long)]
    pub verbose: bool,
    /// Format of the log lines of all processes, on the terminal and in `output_dir/logs`.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Stalls, metrics and traces.
    #[command(flatten)]
    pub observation: ObservationFlags,
}

/// Value of `--numa-binding`, a flag that torchrun has too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NumaBinding {
    /// Pin to NUMA nodes.
    Node,
    /// Do not pin.
    None,
}

/// Loads the run's configuration and makes its paths absolute. With `elsewhere` the paths are on other hosts and are not checked.
pub fn load(options: &Options, elsewhere: bool) -> Result<RunConfig, Fault> {
    let config = RunConfig::load(&options.config, &options.overrides)?;
    if options.samples > 0 && config.validation_file.is_none() {
        return Err(Fault::input("--samples needs validation_file: its prompts are answered")
            .hint("add `validation_file = \"…\"` to the configuration, or leave out --samples"));
    }
    if !elsewhere {
        refuse_entangled(&config, &options.config)?;
        // Before the paths become absolute, so that errors show the user's names.
        readable_files(&config)?;
    }
    absolute(config, elsewhere)
}

/// Makes the paths of a configuration absolute, without checking them.
pub fn absolute(mut config: RunConfig, elsewhere: bool) -> Result<RunConfig, Fault> {
    let here =
        std::env::current_dir().map_err(|error| Fault::failed(format!("no working directory: {error}")))?;
    let here = here.to_str().ok_or_else(|| {
        Fault::input(format!("the working directory {} is not named in UTF-8", here.display()))
            .hint("start the launcher in another folder")
    })?;
    let absolute = |path: &str| absolute_path(Path::new(here), path);
    let validation = config.validation_file.iter_mut().flat_map(DataFiles::iter_mut);
    for place in config.training_file.iter_mut().chain(validation).filter(|place| !place.is_remote()) {
        place.path = absolute(&place.path);
    }
    for model in [Some(&mut config.model), config.from_checkpoint.as_mut()].into_iter().flatten() {
        // Other names may be models on the hub.
        if Path::new(model.as_str()).exists() || (elsewhere && model.starts_with(['.', '/'])) {
            *model = absolute(model);
        }
    }
    config.output_dir = absolute(&config.output_dir);
    Ok(config)
}

/// An absolute path without `.` and superfluous slashes, so that equal paths look equal.
fn absolute_path(here: &Path, path: &str) -> String {
    here.join(path).components().collect::<PathBuf>().to_string_lossy().into_owned()
}

/// The finished model if the run is resumed and already complete, else `None`. Writes nothing.
pub fn complete(mode: OutputMode, config: &RunConfig) -> Result<Option<PathBuf>, Fault> {
    if matches!(mode, OutputMode::Fresh | OutputMode::Overwrite) {
        return Ok(None);
    }
    let sha256 = || open::sha256("training_file", &config.training_file);
    finished::complete(Path::new(&config.output_dir), config, &sha256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_one_form() {
        let here = Path::new("/home/ada");
        for (path, expected) in [
            (".", "/home/ada"),
            ("./runs//1/", "/home/ada/runs/1"),
            ("/data/./x/", "/data/x"),
            // `..` stays: its meaning depends on symbolic links.
            ("../x", "/home/ada/../x"),
        ] {
            assert_eq!(absolute_path(here, path), expected, "{path}");
        }
    }
}
