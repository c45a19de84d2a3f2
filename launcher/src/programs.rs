//! Dyad's own programs: where they are, and how a trainer is called.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use dyad_proto::{Fault, called};
use tokio::process::Command;

use crate::plan::Trainer;

/// oneDNN compiles about 25 kernels for every new number of tokens, two MiB each, and keeps 1024. A few steps' worth is
/// enough, as the next step has another number anyway.
const KERNEL_CACHE: (&str, &str) = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64");

/// Folder of this program.
pub fn own_folder() -> Result<PathBuf, Fault> {
    let own =
        std::env::current_exe().map_err(|error| Fault::failed(format!("cannot find myself: {error}")))?;
    Ok(own.parent().unwrap_or(Path::new("/")).to_owned())
}

/// A program of Dyad, beside this one unless `DYAD_BIN_DIR` says otherwise.
pub fn program(name: &str) -> Result<PathBuf, Fault> {
    let dir = std::env::var_os("DYAD_BIN_DIR").map_or_else(own_folder, |dir| Ok(dir.into()))?;
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Fault::failed(format!("no program {}", path.display())).hint(missing_hint()))
}

/// What to do where one of the programs is missing, or cannot be started: it depends on how Dyad came here.
pub fn missing_hint() -> &'static str {
    if std::env::var_os("DYAD_BIN_DIR").is_some() {
        return "DYAD_BIN_DIR names the folder that holds launcher, coordinator and trainer of one build";
    }
    if called::by_pip() {
        return "install it anew: pip install --force-reinstall --no-deps dyad";
    }
    match own_folder() {
        Ok(folder) if is_checkout(&folder) => "run `make build` first",
        _ => "put launcher, coordinator and trainer of one build into one folder",
    }
}

/// A folder that `make build` builds into.
fn is_checkout(folder: &Path) -> bool {
    let root = folder.join("../..");
    folder.ends_with("target/release") && root.join("Makefile").is_file() && root.join("Cargo.toml").is_file()
}

/// How a trainer is called, whoever starts it. `beside`: how many trainers its machine has.
pub fn trainer(
    trainer: &Trainer,
    coordinator: &str,
    connect_timeout: u64,
    beside: usize,
) -> Result<Command, Fault> {
    let mut command = Command::new(program("trainer")?);
    command.args(["run", "--coordinator", coordinator, "--name", &trainer.name]);
    command.args(["--launch-index", &trainer.launch_index.to_string(), "--device", &trainer.device]);
    command.args(["--connect-timeout", &connect_timeout.to_string()]);
    let threads = trainer.threads.to_string();
    // Every thread pool of the process keeps to its share of the cores.
    command.args(["--threads", &threads]).env("OMP_NUM_THREADS", &threads).env("RAYON_NUM_THREADS", &threads);
    if std::env::var_os(KERNEL_CACHE.0).is_none() {
        command.env(KERNEL_CACHE.0, KERNEL_CACHE.1);
    }
    // torchrun's name.
    command.env("LOCAL_WORLD_SIZE", beside.to_string()).stdout(Stdio::null());
    Ok(command)
}
