//! `--dry-run`: what would be started, and what the configuration comes to.

use std::fmt::Write;

use dyad_proto::{Fault, RunConfig};

use crate::plan::Trainer;

/// Text for standard output.
pub fn describe(config: &RunConfig, trainers: &[Trainer]) -> Result<String, Fault> {
    let pairs = count_lines(&config.training_file)?;
    let steps_per_epoch = pairs.div_ceil(u64::from(config.batch_size)).max(1);
    let steps = config.max_steps.unwrap_or(u64::from(config.n_epochs) * steps_per_epoch);
    let mut out = String::new();
    let _ = writeln!(out, "would start 1 coordinator and {} trainers on this machine:", trainers.len());
    for trainer in trainers {
        let _ = writeln!(
            out,
            "  rank {}  {}  device {}  threads {}",
            trainer.launch_index, trainer.name, trainer.device, trainer.threads
        );
    }
    let _ = writeln!(out, "{pairs} pairs, at most {steps_per_epoch} steps per epoch, at most {steps} steps");
    let _ = writeln!(out, "results go to {}", config.output_dir);
    let _ = writeln!(out, "configuration (* differs from the default):");
    let values =
        |config: &RunConfig| serde_json::to_value(config).ok().and_then(|value| value.as_object().cloned());
    if let (Some(chosen), Some(defaults)) = (values(config), values(&RunConfig::default())) {
        for key in RunConfig::keys() {
            let mark = if chosen.get(key) == defaults.get(key) { ' ' } else { '*' };
            let value = chosen.get(key).filter(|value| !value.is_null());
            let _ = writeln!(
                out,
                "{mark} {key} = {}",
                value.map_or_else(|| "(unset)".into(), ToString::to_string)
            );
        }
    }
    Ok(out)
}

fn count_lines(path: &str) -> Result<u64, Fault> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Fault::input(format!("cannot read {path}: {error}")))?;
    Ok(text.lines().filter(|line| !line.trim().is_empty()).count() as u64)
}
