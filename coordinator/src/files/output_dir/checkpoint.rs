//! Finds the checkpoint to resume from: the newest undamaged one. Damaged ones are skipped with a warning.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use dyad_proto::checkpoint_state::CheckpointState;
use dyad_proto::manifest::{Damage, Manifest};
use dyad_proto::run_folder::{MANIFEST, OPTIMIZER, STATE, checkpoint_step};
use dyad_proto::{Fault, counted, files};
use serde_json::Value;

use super::unusable;

/// An undamaged checkpoint.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) path: PathBuf,
    pub(super) state: CheckpointState,
}

/// The newest undamaged checkpoint of a folder. Reads all its bytes, and those of every newer one that is damaged.
pub(super) fn newest(dir: &Path) -> Result<Checkpoint, Fault> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| unusable(dir, &error))? {
        let entry = entry.map_err(|error| unusable(dir, &error))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    let lookalikes = found.iter().filter(|path| is_lookalike(path));
    lookalikes.for_each(|path| tracing::warn!("{} is passed over: {}", path.display(), misnamed(path)));
    let mut checkpoints: Vec<(u64, PathBuf)> =
        found.into_iter().filter_map(|path| Some((checkpoint_step(&path)?, path))).collect();
    checkpoints.sort();
    let mut damaged = Vec::new();
    while let Some((step, path)) = checkpoints.pop() {
        match examine(&path, step) {
            Ok(state) => {
                passed_over(&damaged, &path);
                return Ok(Checkpoint { path, state });
            }
            Err(damage) => damaged.push((path, damage)),
        }
    }
    Err(none(dir, &damaged))
}

fn passed_over(damaged: &[(PathBuf, Damage)], taken: &Path) {
    for (path, damage) in damaged {
        let (path, taken) = (path.display(), taken.display());
        tracing::warn!("{path} is damaged ({damage}); going on from {taken}, the one before");
    }
}

fn none(dir: &Path, damaged: &[(PathBuf, Damage)]) -> Fault {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let each: Vec<String> =
        damaged.iter().map(|(path, damage)| format!("{}: {damage}", name(path))).collect();
    if each.is_empty() {
        return Fault::input(format!("output_dir {} holds no checkpoint to resume from", dir.display()))
            .hint("start without --resume; --overwrite removes what an earlier run left");
    }
    let message = format!("output_dir {} holds no whole checkpoint: {}", dir.display(), each.join("; "));
    Fault::input(message).hint("put back what is damaged from a copy, or start again with --overwrite")
}

/// Whether the name is like `checkpoint-0006`: a step number that Dyad writes in another way.
fn is_lookalike(path: &Path) -> bool {
    lookalike_step(path).is_some() && checkpoint_step(path).is_none()
}

fn lookalike_step(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
}

fn misnamed(path: &Path) -> String {
    let step = lookalike_step(path).unwrap_or_default();
    format!("Dyad's name of a checkpoint is checkpoint-{step}; rename it to go on from there")
}

/// The checkpoint's state, if every file in the folder is as it was written.
fn examine(path: &Path, step: u64) -> Result<CheckpointState, Damage> {
    let state = read_state(path)?;
    if state.step != step {
        return Err(Damage::new(STATE, format!("says step {}", state.step)));
    }
    match Manifest::read(path)? {
        Some(manifest) => {
            if let Some(file) = [STATE, OPTIMIZER].into_iter().find(|file| !manifest.contains(file)) {
                return Err(Damage::new(MANIFEST, format!("does not name {file}")));
            }
            let bytes = manifest.bytes();
            tracing::info!(path = %path.display(), mib = bytes >> 20, "checking the checkpoint");
            manifest.verify(path)?;
        }
        None if state.run.fingerprint.is_of_this_version() => {
            return Err(Damage::new(MANIFEST, "is missing"));
        }
        None => {
            plausible(path)?;
            tracing::warn!(
                "{} has no checksums (an earlier version wrote it): only the sizes in its files could be checked",
                path.display()
            );
        }
    }
    Ok(state)
}

fn read_state(path: &Path) -> Result<CheckpointState, Damage> {
    let text = files::read_to_string(&path.join(STATE)).map_err(|error| unreadable(STATE, &error))?;
    serde_json::from_str(&text).map_err(|error| Damage::new(STATE, format!("is torn: {error}")))
}

fn unreadable(file: &str, error: &io::Error) -> Damage {
    match error.kind() {
        io::ErrorKind::NotFound => Damage::new(file, "is missing"),
        _ => Damage::new(file, format!("cannot be read: {error}")),
    }
}

/// Checks a checkpoint without checksums: all files must exist, with the lengths that their headers give.
fn plausible(path: &Path) -> Result<(), Damage> {
    let adapter = path.join("adapter_config.json").exists();
    let (config, weights) = if adapter {
        ("adapter_config.json", vec!["adapter_model.safetensors".to_owned()])
    } else {
        ("config.json", model_files(path)?)
    };
    json(path, config)?;
    weights.iter().map(String::as_str).chain([OPTIMIZER]).try_for_each(|file| whole(&path.join(file), file))
}

fn model_files(path: &Path) -> Result<Vec<String>, Damage> {
    const INDEX: &str = "model.safetensors.index.json";
    if !path.join(INDEX).exists() {
        return Ok(vec!["model.safetensors".into()]);
    }
    let index = json(path, INDEX)?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let mut files: Vec<String> =
        map.into_iter().flat_map(|map| map.values().filter_map(Value::as_str)).map(str::to_owned).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn json(path: &Path, file: &str) -> Result<Value, Damage> {
    let text = files::read_to_string(&path.join(file)).map_err(|error| unreadable(file, &error))?;
    serde_json::from_str(&text).map_err(|error| Damage::new(file, format!("is torn: {error}")))
}

/// Checks that a safetensors file ends where its header says.
fn whole(path: &Path, file: &str) -> Result<(), Damage> {
    let read = || -> io::Result<(u64, Option<u64>)> {
        let mut source = files::open(path)?;
        let bytes = source.metadata()?.len();
        let mut length = [0; 8];
        source.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        let mut header = Vec::new();
        source.take(length.min(bytes)).read_to_end(&mut header)?;
        Ok((bytes, data_end(&header).map(|end| 8 + length + end)))
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Damage::new(file, "is cut short")),
        Err(error) => Err(unreadable(file, &error)),
        Ok((_, None)) => Err(Damage::new(file, "has a torn header")),
        Ok((found, Some(expected))) if found != expected => {
            Err(Damage::new(file, format!("has {}, not {expected}", counted(found, "byte"))))
        }
        Ok(_) => Ok(()),
    }
}

/// End of the last tensor, in bytes after the header; `None` if the header cannot be parsed.
fn data_end(header: &[u8]) -> Option<u64> {
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).ok()?;
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    let ends = tensors.map(|(_, tensor)| tensor.get("data_offsets")?.get(1)?.as_u64());
    ends.collect::<Option<Vec<_>>>().map(|ends| ends.into_iter().max().unwrap_or(0))
}
