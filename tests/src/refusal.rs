//! Runs that must be refused: one line of error, one hint, and not one step done.

use std::fs;

use crate::{Workspace, text};

/// What a refused run said.
#[derive(Debug)]
pub struct Refused {
    /// Exit status.
    pub status: i32,
    /// The line after `error: `.
    pub message: String,
    /// The line after `hint: `.
    pub hint: String,
}

/// Launches trainers, which must be refused.
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

/// A run of one trainer that must be refused.
pub fn refused(workspace: &Workspace, args: &[&str]) -> Refused {
    refused_of(1, workspace, args)
}

/// Refused as invalid input, with these words in the message and these in the hint.
pub fn invalid(workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    invalid_of(1, workspace, args, message, hint);
}

/// The same with several trainers.
pub fn invalid_of(trainers: usize, workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    let refused = refused_of(trainers, workspace, args);
    assert_eq!(refused.status, 2, "{}", refused.message);
    for part in message {
        assert!(refused.message.contains(part), "no {part:?} in: {}", refused.message);
    }
    assert!(refused.hint.contains(hint), "no {hint:?} in: {}", refused.hint);
}

/// The same, for what the launcher knows before it writes or starts anything.
pub fn invalid_at_once(workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    invalid(workspace, args, message, hint);
    assert!(!workspace.path("out").exists());
}
