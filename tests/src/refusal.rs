//! Checks that a run is refused: with one error line and one hint, and before the first step.

use std::fs;

use crate::{Workspace, text};

/// Output of a refused run.
#[derive(Debug)]
pub struct Refused {
    /// Exit status.
    pub status: i32,
    /// The line after `error: `.
    pub message: String,
    /// The line after `hint: `.
    pub hint: String,
}

/// Launches a run with `trainers` trainers and panics unless it is refused.
pub fn refused_of(trainers: usize, workspace: &Workspace, args: &[&str]) -> Refused {
    let output = workspace.launch(trainers, args);
    let error = String::from_utf8_lossy(&output.stderr);
    let starting = |mark: &str| -> Vec<String> {
        error.lines().filter_map(|line| line.strip_prefix(mark)).map(str::to_owned).collect()
    };
    let (errors, hints) = (starting("error: "), starting("hint: "));
    assert_eq!((errors.len(), hints.len()), (1, 1), "{error}");
    assert_eq!(error.matches("error:").count(), 1, "told twice: {error}");
    assert!(!text(&output).contains("panicked") && !text(&output).contains("backtrace"), "{}", text(&output));
    let rows = fs::read_to_string(workspace.path("out/metrics.jsonl")).unwrap_or_default();
    assert!(rows.is_empty(), "steps were done: {rows}");
    Refused { status: output.status.code().unwrap(), message: errors[0].clone(), hint: hints[0].clone() }
}

/// Like [`refused_of`] with one trainer.
pub fn refused(workspace: &Workspace, args: &[&str]) -> Refused {
    refused_of(1, workspace, args)
}

/// Panics unless the run is refused as invalid input, and its message contains every part and its hint contains `hint`.
pub fn invalid(workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    invalid_of(1, workspace, args, message, hint);
}

/// Like [`invalid`] with several trainers.
pub fn invalid_of(trainers: usize, workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    let refused = refused_of(trainers, workspace, args);
    assert_eq!(refused.status, 2, "{}", refused.message);
    for part in message {
        assert!(refused.message.contains(part), "no {part:?} in: {}", refused.message);
    }
    assert!(refused.hint.contains(hint), "no {hint:?} in: {}", refused.hint);
}

/// Like [`invalid`]; also checks that the launcher has not created `out/`.
pub fn invalid_at_once(workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    invalid(workspace, args, message, hint);
    assert!(!workspace.path("out").exists());
}
