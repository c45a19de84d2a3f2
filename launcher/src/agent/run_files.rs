//! Checks the files that a run's configuration names, before any process starts.

use std::path::{Path, PathBuf};

use dyad_proto::inputs::refuse_entangled;
use dyad_proto::ownership::Ownership;
use dyad_proto::run_folder::{NEXT_RUN_CONFIG, model_hint, refuse_earlier_run, refuse_obstacles, traces};
use dyad_proto::{Fault, RunConfig, files, safe_file};
use dyad_sources::places;

use crate::process::programs::program;

/// Locks the output folder for this run and checks all files that the configuration names. A missing folder is created only after
/// all checks pass.
pub fn take(config: &RunConfig, fresh: bool) -> Result<Ownership, Fault> {
    let dir = Path::new(&config.output_dir);
    let owner = dir.is_dir().then(|| Ownership::take(dir)).transpose()?;
    look(config, true, fresh)?;
    owner.map_or_else(|| Ownership::take(dir), Ok)
}

/// Checks the model folders and programs on this machine. With `files` (the coordinator's host), also checks the files of pairs and the
/// output folder; with `fresh`, fails if that folder holds an earlier run.
pub fn look(config: &RunConfig, files: bool, fresh: bool) -> Result<(), Fault> {
    for (key, model) in [("model", Some(&config.model)), ("from_checkpoint", config.from_checkpoint.as_ref())]
    {
        let Some(model) = model else { continue };
        let dir = Path::new(model);
        if dir.exists() || dir.is_absolute() {
            model_folder(key, dir)?;
        }
    }
    if files {
        readable_files(config)?;
        // Check before writing: a refused start must not replace the earlier run's configuration and logs.
        refuse_entangled(config, Path::new(""))?;
        let output_dir = Path::new(&config.output_dir);
        if let Some(what) = files::obstacle(output_dir) {
            return Err(unwritable(output_dir, what));
        }
        if fresh && output_dir.is_dir() {
            let traces = traces(output_dir).map_err(|error| unwritable(output_dir, error))?;
            refuse_earlier_run(output_dir, &traces)?;
        }
    }
    for name in ["coordinator", "trainer"] {
        program(name)?;
    }
    Ok(())
}

/// Fails if the training or validation file cannot be read. Fetches nothing.
pub fn readable_files(config: &RunConfig) -> Result<(), Fault> {
    places::look("training_file", &config.training_file)?;
    config.validation_file.as_ref().map_or(Ok(()), |files| places::look("validation_file", files))
}

fn model_folder(key: &str, dir: &Path) -> Result<(), Fault> {
    // Do not follow links or open files: the trainer reports unreadable ones better.
    let has = |name: &str| dir.join(name).symlink_metadata().is_ok();
    if has("config.json") || has("adapter_config.json") {
        return Ok(());
    }
    let hint = model_hint(dir).unwrap_or_else(|| {
        "expected a Hugging Face model folder; transformers' save_pretrained writes one".into()
    });
    Err(Fault::input(format!("{key} {} holds no config.json", dir.display())).hint(hint))
}

/// Makes the output folder and writes the checked configuration into it for the coordinator. Returns the file's path.
pub fn write_config(config: &RunConfig) -> Result<PathBuf, Fault> {
    let dir = Path::new(&config.output_dir);
    make_logs(dir)?;
    let path = dir.join(NEXT_RUN_CONFIG);
    safe_file::write(&path, (config.to_json()? + "\n").as_bytes())
        .map_err(|error| unwritable(&path, error))?;
    Ok(path)
}

/// Removes the file of [`write_config`] on drop. By then the coordinator has recorded it as `run.json`, unless the run never trained.
#[derive(Debug)]
pub struct NextConfig(pub PathBuf);

impl Drop for NextConfig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the folder `logs` in the output folder.
pub fn make_logs(output_dir: &Path) -> Result<(), Fault> {
    refuse_obstacles(output_dir)?;
    let logs = output_dir.join("logs");
    safe_file::folder(&logs).map_err(|error| unwritable(&logs, error))
}

fn unwritable(path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::input(format!("cannot write output_dir {}: {error}", path.display()))
        .hint("choose a folder that you may write to")
}
