//! What can be checked before anything starts: configuration, files, model folder, output folder.

use std::path::{Path, PathBuf};

use dyad_proto::inputs::refuse_entangled;
use dyad_proto::ownership::Ownership;
use dyad_proto::run_folder::{NEXT_RUN_CONFIG, begun_by, refuse_earlier_run, refuse_obstacles, traces};
use dyad_proto::{Fault, RunConfig, files, finished, pair_file, safe_file};
use sha2::{Digest, Sha256};

use crate::cli::Options;
use crate::programs::program;

/// The run's configuration with absolute paths. With `elsewhere` the paths are those of other hosts, and nothing is looked at.
pub fn load(options: &Options, elsewhere: bool) -> Result<RunConfig, Fault> {
    let config = RunConfig::load(&options.config, &options.overrides)?;
    if options.samples > 0 && config.validation_file.is_none() {
        return Err(Fault::input("--samples needs validation_file: its prompts are answered")
            .hint("add `validation_file = \"…\"` to the configuration, or leave out --samples"));
    }
    if !elsewhere {
        refuse_entangled(&config, &options.config)?;
        // By the names that the user gave.
        readable_files(&config)?;
    }
    absolute(config, elsewhere)
}

/// The same, of a configuration that was read, without looking at what it names.
pub fn absolute(mut config: RunConfig, elsewhere: bool) -> Result<RunConfig, Fault> {
    let here =
        std::env::current_dir().map_err(|error| Fault::failed(format!("no working directory: {error}")))?;
    let here = here.to_str().ok_or_else(|| {
        Fault::input(format!("the working directory {} is not named in UTF-8", here.display()))
            .hint("start the launcher in another folder")
    })?;
    let absolute = |path: &str| absolute_path(Path::new(here), path);
    config.training_file = absolute(&config.training_file);
    config.validation_file = config.validation_file.map(|path| absolute(&path));
    for model in [Some(&mut config.model), config.from_checkpoint.as_mut()].into_iter().flatten() {
        // Anything else may be the name of a model on the hub.
        if Path::new(model.as_str()).exists() || (elsewhere && model.starts_with(['.', '/'])) {
            *model = absolute(model);
        }
    }
    config.output_dir = absolute(&config.output_dir);
    Ok(config)
}

/// Without `.` and slashes that change nothing, so that a path is always shown and compared in one form.
fn absolute_path(here: &Path, path: &str) -> String {
    here.join(path).components().collect::<PathBuf>().to_string_lossy().into_owned()
}

/// Takes the output folder, which only one run may write into, and looks at everything that the configuration names. A folder that is
/// not there yet is only made once all else is right.
pub fn take(config: &RunConfig, fresh: bool) -> Result<Ownership, Fault> {
    let dir = Path::new(&config.output_dir);
    let owner = dir.is_dir().then(|| Ownership::take(dir)).transpose()?;
    look(config, true, fresh)?;
    owner.map_or_else(|| Ownership::take(dir), Ok)
}

/// Looks on this machine at everything that the configuration names: the model, and where the coordinator runs (`files`) the pairs
/// and the output folder, in which an earlier run is in the way of a fresh one.
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
        // Before anything is written: a refused start must not replace the earlier run's configuration and logs.
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

fn readable_files(config: &RunConfig) -> Result<(), Fault> {
    readable("training_file", &config.training_file)?;
    config.validation_file.as_ref().map_or(Ok(()), |path| readable("validation_file", path))
}

fn readable(key: &str, path: &str) -> Result<(), Fault> {
    let cannot = |why: String| Fault::input(format!("cannot read {key} {path}: {why}"));
    if ["/dev/fd/", "/dev/std", "/proc/self/"].iter().any(|start| path.starts_with(start)) {
        // The coordinator is another process, with other streams.
        return Err(cannot("it is a stream of this process".into()).hint("write the pairs into a file first"));
    }
    files::open(Path::new(path)).map(drop).map_err(|error| {
        cannot(error.to_string())
            .hint("paths in the configuration are relative to the folder that the launcher is started in")
    })
}

fn model_folder(key: &str, dir: &Path) -> Result<(), Fault> {
    let has = |name: &str| dir.join(name).is_file();
    if has("config.json") || has("adapter_config.json") {
        return Ok(());
    }
    Err(Fault::input(format!("{key} {} holds no config.json", dir.display()))
        .hint("expected a Hugging Face model folder; transformers' save_pretrained writes one"))
}

/// What is to become of an earlier run in the output folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Earlier {
    /// There must be none.
    Refused,
    /// It goes.
    Removed,
    /// It goes on.
    Resumed,
    /// It goes on where there is something to go on from, or is tried again.
    Tried,
}

impl Earlier {
    /// As the options have it; what a job of a scheduler has begun, the same job goes on with.
    pub fn of(options: &Options, output_dir: &Path) -> Result<Self, Fault> {
        if options.auto_resume && options.job.is_none() && (options.resume || options.overwrite) {
            return Err(Fault::input("--auto-resume beside --resume or --overwrite needs --job")
                .hint("give --job ID, by which what this job has begun is told from what lay there before"));
        }
        let own = options.job.as_ref().is_none_or(|job| begun_by(output_dir, job));
        Ok(match (options.resume, options.overwrite) {
            _ if options.auto_resume && own => Self::Tried,
            (true, _) => Self::Resumed,
            (_, true) => Self::Removed,
            _ => Self::Refused,
        })
    }
}

/// The finished model of a run that goes on and has nothing left to do. Nothing is written.
pub fn complete(earlier: Earlier, config: &RunConfig) -> Result<Option<PathBuf>, Fault> {
    if matches!(earlier, Earlier::Refused | Earlier::Removed) {
        return Ok(None);
    }
    let file = &config.training_file;
    let sha256 = || {
        let text = pair_file::read("training_file", Path::new(file))?;
        Ok(Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect())
    };
    finished::complete(Path::new(&config.output_dir), config, &sha256)
}

/// Makes the output folder and writes the checked configuration into it, for the coordinator to read.
pub fn write_config(config: &RunConfig) -> Result<PathBuf, Fault> {
    let dir = Path::new(&config.output_dir);
    make_logs(dir)?;
    let path = dir.join(NEXT_RUN_CONFIG);
    safe_file::write(&path, (config.to_json()? + "\n").as_bytes())
        .map_err(|error| unwritable(&path, error))?;
    Ok(path)
}

/// What [`write_config`] wrote, which goes when the run is over: by then it is `run.json`, or the run was none.
#[derive(Debug)]
pub struct NextConfig(pub PathBuf);

impl Drop for NextConfig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the folder of logs.
pub fn make_logs(output_dir: &Path) -> Result<(), Fault> {
    refuse_obstacles(output_dir)?;
    let logs = output_dir.join("logs");
    safe_file::folder(&logs).map_err(|error| unwritable(&logs, error))
}

fn unwritable(path: &Path, error: impl std::fmt::Display) -> Fault {
    Fault::input(format!("cannot write output_dir {}: {error}", path.display()))
        .hint("choose a folder that you may write to")
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
            // What `..` means depends on links: it is left to the file system.
            ("../x", "/home/ada/../x"),
        ] {
            assert_eq!(absolute_path(here, path), expected, "{path}");
        }
    }
}
