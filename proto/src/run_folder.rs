//! What a run leaves in its output folder, and the rule that the next run must not fall into it unasked.

use std::io;
use std::path::{Path, PathBuf};

use crate::Fault;

/// One row per optimizer step.
pub const METRICS: &str = "metrics.jsonl";
/// One row per evaluation.
pub const EVALUATION_METRICS: &str = "eval_metrics.jsonl";
/// Event files for TensorBoard.
pub const TENSORBOARD: &str = "tb";

/// What earlier runs left, in a stable order. A run that was refused before its first row has left nothing.
pub fn traces(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let left = match name(&path) {
            METRICS | EVALUATION_METRICS => entry.metadata()?.len() > 0,
            TENSORBOARD | "final" => true,
            _ => checkpoint_step(&path).is_some() || is_unfinished(&path),
        };
        if left {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Refuses a folder that holds a run, by the first of its traces; what was never finished is no run.
pub fn refuse_earlier_run(dir: &Path, traces: &[PathBuf]) -> Result<(), Fault> {
    match traces.iter().find(|path| !is_unfinished(path)) {
        None => Ok(()),
        Some(trace) => {
            Err(Fault::input(format!("output_dir {} already holds a run ({})", dir.display(), name(trace)))
                .hint("--resume continues it, --overwrite removes it; or choose another output_dir"))
        }
    }
}

/// The step of a folder named `checkpoint-N`.
#[must_use]
pub fn checkpoint_step(path: &Path) -> Option<u64> {
    name(path).strip_prefix("checkpoint-")?.parse().ok()
}

/// A folder that a run died over.
#[must_use]
pub fn is_unfinished(path: &Path) -> bool {
    name(path).starts_with(".tmp-")
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_run_wrote_counts() {
        let dir = tempfile::tempdir().unwrap();
        let refused = || refuse_earlier_run(dir.path(), &traces(dir.path()).unwrap());
        for name in ["run.json", "notes.txt", ".tmp-final"] {
            std::fs::write(dir.path().join(name), "{}").unwrap();
        }
        std::fs::write(dir.path().join(METRICS), "").unwrap();
        assert_eq!(refused(), Ok(()));
        for trace in [METRICS, EVALUATION_METRICS, "final", "checkpoint-3"] {
            std::fs::write(dir.path().join(trace), "{}\n").unwrap();
            let message = refused().unwrap_err().message;
            assert!(message.ends_with(&format!("already holds a run ({trace})")), "{message}");
            std::fs::remove_file(dir.path().join(trace)).unwrap();
        }
    }
}
