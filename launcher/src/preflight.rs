//! What can be checked before anything starts: configuration, files, model folder, output folder.

use std::path::{Path, PathBuf};

use dyad_proto::run_folder::{refuse_earlier_run, traces};
use dyad_proto::{Fault, RunConfig};

use crate::cli::Options;
use crate::supervise::program;

/// The run's configuration with absolute paths, once everything it names has been looked at.
pub fn check(options: &Options) -> Result<RunConfig, Fault> {
    let mut config = RunConfig::load(&options.config, &options.overrides)?;
    let here =
        std::env::current_dir().map_err(|error| Fault::failed(format!("no working directory: {error}")))?;
    let absolute = |path: &str| here.join(path).to_string_lossy().into_owned();
    readable("training_file", &config.training_file)?;
    config.training_file = absolute(&config.training_file);
    if let Some(path) = &mut config.validation_file {
        readable("validation_file", path)?;
        *path = absolute(path);
    }
    for (key, model) in
        [("model", Some(&mut config.model)), ("from_checkpoint", config.from_checkpoint.as_mut())]
    {
        if let Some(model) = model.filter(|model| Path::new(model.as_str()).exists()) {
            model_folder(key, Path::new(model.as_str()))?;
            *model = absolute(model);
        }
    }
    config.output_dir = absolute(&config.output_dir);
    // Before anything is written: a refused start must not replace the earlier run's configuration and logs.
    let output_dir = Path::new(&config.output_dir);
    if !options.resume && !options.overwrite && output_dir.is_dir() {
        let traces = traces(output_dir).map_err(|error| unwritable(output_dir, &error))?;
        refuse_earlier_run(output_dir, &traces)?;
    }
    for name in ["coordinator", "trainer"] {
        program(name)?;
    }
    Ok(config)
}

fn readable(key: &str, path: &str) -> Result<(), Fault> {
    std::fs::File::open(path).map(drop).map_err(|error| {
        Fault::input(format!("cannot read {key} {path}: {error}"))
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

/// Makes the output folder and writes the checked configuration into it.
pub fn write_config(config: &RunConfig) -> Result<PathBuf, Fault> {
    let dir = Path::new(&config.output_dir);
    std::fs::create_dir_all(dir.join("logs")).map_err(|error| unwritable(dir, &error))?;
    let path = dir.join("run.json");
    std::fs::write(&path, config.to_json()? + "\n").map_err(|error| unwritable(&path, &error))?;
    Ok(path)
}

fn unwritable(path: &Path, error: &std::io::Error) -> Fault {
    Fault::input(format!("cannot write output_dir {}: {error}", path.display()))
        .hint("choose a folder that you may write to")
}
