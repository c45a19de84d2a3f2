//! Facts about a machine that its agent collects for `launcher doctor`.

use std::path::Path;
use std::process::Command;

use dyad_proto::RunConfig;
use serde::{Deserialize, Serialize};

use crate::agent::machine::{Gpu, Hello, nvidia_smi};
use crate::agent::run_files;
use crate::process::programs::{libtorch_stamp, own_folder, program_hash};
use crate::process::trainer_check;

/// Optional checks that `launcher doctor` asks for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Examine {
    /// Configuration of the planned run, as JSON.
    pub config_json: Option<String>,
}

/// Facts about one machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineFacts {
    /// The agent's greeting.
    pub hello: Hello,
    /// Name and shortened SHA-256 of each program; `None` if it cannot be read.
    pub programs: Vec<(String, Option<String>)>,
    /// Build of the installed libtorch.
    pub libtorch: Option<String>,
    /// Whether the trainer starts, so all its libraries are found.
    pub trainer_starts: Result<(), String>,
    /// Version of the NVIDIA driver.
    pub driver: Option<String>,
    /// GPUs that nvidia-smi lists.
    pub gpus: Vec<Gpu>,
    /// Total and free bytes of /dev/shm.
    pub shared_memory: Option<(u64, u64)>,
    /// Free bytes at the output folder, and the error if it cannot be written to; `None` without a configuration.
    pub output: Option<(u64, Option<String>)>,
    /// The model of the run, or why it cannot be used; `None` without a configuration.
    pub model: Option<Result<String, Unusable>>,
    /// The training file, if it and the validation file can be read, else the error; `None` without a configuration.
    pub pairs: Option<Result<String, String>>,
}

/// The trainer program's error about a model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unusable {
    /// What is wrong.
    pub message: String,
    /// What to do about it; may be empty.
    pub hint: String,
}

impl MachineFacts {
    /// Collects the facts of this machine.
    #[must_use]
    pub fn here(examine: &Examine) -> Self {
        let folder = own_folder().unwrap_or_default();
        let config = examine.config_json.as_ref().and_then(|json| RunConfig::from_json(json).ok());
        let programs = ["launcher", "coordinator", "trainer"];
        Self {
            hello: Hello::of_this_machine(),
            programs: programs.map(|name| (name.to_owned(), program_hash(&folder, name))).to_vec(),
            libtorch: libtorch(&folder),
            trainer_starts: starts(&folder.join("trainer")),
            driver: driver(),
            gpus: nvidia_smi(),
            shared_memory: space(Path::new("/dev/shm")),
            output: config.as_ref().map(|config| output(Path::new(&config.output_dir))),
            model: config.as_ref().map(model),
            pairs: config.as_ref().map(pairs),
        }
    }
}

fn libtorch(folder: &Path) -> Option<String> {
    let dir = folder.join("../../.libtorch");
    if let Some((set, stamp)) = libtorch_stamp(&dir) {
        return Some(format!("{set} {}", stamp.chars().take(12).collect::<String>()));
    }
    // A copy made by --push has no stamp, but the stamp's hash is in its folder name.
    let name = dir.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned();
    name.starts_with("libtorch-").then_some(name)
}

fn starts(trainer: &Path) -> Result<(), String> {
    let output = Command::new(trainer).arg("--version").output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("it ends at once").to_owned())
}

fn driver() -> Option<String> {
    let text = dyad_proto::files::of_kernel("/sys/module/nvidia/version").ok()?;
    Some(text.trim().to_owned())
}

/// Total bytes of a path's file system, and those free for this user.
#[expect(unsafe_code, reason = "statvfs")]
fn space(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: the call fills the struct, for which zeroes are valid; the path ends with a zero byte.
    let found = unsafe {
        let mut found: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut found) == 0).then_some(found)
    }?;
    Some((found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize))
}

/// Free bytes and write error. If the folder does not exist yet, its nearest existing parent is checked.
fn output(dir: &Path) -> (u64, Option<String>) {
    let there = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let free = space(there).map_or(0, |(_, free)| free);
    let probe = there.join(format!(".dyad-write-test-{}", std::process::id()));
    let written = dyad_proto::safe_file::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe));
    (free, written.err().map(|error| format!("{}: {error}", there.display())))
}

/// Checks the model with the trainer program, as at the start of a run.
fn model(config: &RunConfig) -> Result<String, Unusable> {
    let report = trainer_check::run(config)
        .map_err(|fault| Unusable { message: fault.to_string(), hint: fault.hint })?;
    let name =
        if config.model.is_empty() { config.from_checkpoint.as_deref() } else { Some(config.model.as_str()) };
    let found = format!("{} ({}", name.unwrap_or_default(), report.model.model_type);
    Ok(match report.to_download.as_slice() {
        [] => format!("{found}, tokenizer, template)"),
        names => format!("{found}; to be downloaded: {})", names.join(", ")),
    })
}

fn pairs(config: &RunConfig) -> Result<String, String> {
    run_files::readable_files(config).map_err(|fault| fault.message)?;
    Ok(config.training_file.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_this_machine_are_collected() {
        let facts = MachineFacts::here(&Examine::default());
        assert!(facts.hello.cores > 0 && facts.hello.free_memory > 0 && facts.model.is_none());
        assert!(space(Path::new("/")).is_some_and(|(all, free)| all >= free));
        let (_, wrong) = output(Path::new("/proc/nowhere/at/all"));
        assert!(wrong.is_some());
    }
}
