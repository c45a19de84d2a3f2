//! `launcher slurm`: batch scripts. Inside an allocation, [`crate::hosts::slurm_allocation`] finds the nodes, and `srun` starts the agents
//! as job steps ([`crate::hosts::transport`]).

pub mod options;
pub mod script;

use std::process::Stdio;

use dyad_proto::{Fault, RunConfig};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::process::programs::own_folder;
use crate::show::console::{print, warn};
use crate::slurm::options::SlurmOptions;

/// Prints or submits the script.
pub async fn run(options: &SlurmOptions) -> Result<(), Fault> {
    // Check now: otherwise the job would fail hours later, when it starts.
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
        // Ignore a closed pipe: sbatch's exit status and message tell more.
        let _ = stdin.write_all(script.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(|error| Fault::failed(format!("sbatch: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Fault::input(format!("sbatch refuses the job: {}", said.trim().replace('\n', "; ")))
            .hint("sbatch refuses an option of this command line; `sinfo` and `sacctmgr show assoc` list the valid values"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
