//! Nouns agree with the numbers before them: code that prints a count with its noun uses `dyad_proto::counted`.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::{Path, PathBuf};

/// Nouns that follow a count.
const NOUNS: [&str; 44] = [
    "answers",
    "arguments",
    "batches",
    "bytes",
    "characters",
    "checkpoints",
    "columns",
    "connections",
    "cores",
    "days",
    "devices",
    "entries",
    "epochs",
    "errors",
    "evaluations",
    "events",
    "files",
    "GPUs",
    "hosts",
    "hours",
    "layers",
    "lines",
    "messages",
    "minutes",
    "nodes",
    "objects",
    "pairs",
    "parameters",
    "pods",
    "points",
    "processes",
    "ranks",
    "records",
    "restarts",
    "rows",
    "samples",
    "seconds",
    "steps",
    "tensors",
    "threads",
    "times",
    "tokens",
    "trainers",
    "values",
];

/// Collects the source files below a folder, without tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("tests") {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

/// Returns a plural noun that follows a placeholder. Placeholders of constants, which are in capitals, are skipped: their values are
/// larger than one.
fn plural_behind_a_count(line: &str) -> Option<&str> {
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("} ") {
        let placeholder = before.rsplit('{').next().unwrap_or_default();
        let constant =
            !placeholder.is_empty() && placeholder.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        let words = after.strip_prefix("more ").unwrap_or(after);
        let word = words.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        if !constant && NOUNS.contains(&word) {
            return Some(word);
        }
        rest = after;
    }
    None
}

#[test]
fn no_plural_noun_follows_a_count_that_may_be_one() {
    let mut files = Vec::new();
    for folder in [
        "proto/src",
        "proto/telemetry/src",
        "coordinator/src",
        "trainer/src",
        "trainer/data/src",
        "trainer/families/src",
        "trainer/torch/src",
        "launcher/src",
    ] {
        sources(&dyad_tests::root().join(folder), &mut files);
    }
    assert!(files.len() > 200, "{} files", files.len());
    let mut wrong = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let (code, _) = text.split_once("#[cfg(test)]\nmod tests").unwrap_or((&text, ""));
        for (number, line) in code.lines().enumerate() {
            let comment = line.trim_start().starts_with("//");
            if let Some(word) = plural_behind_a_count(line).filter(|_| !comment) {
                wrong.push(format!("{}:{}: {word}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_plural_noun_after_a_count_is_found() {
    for (line, word) in [
        (r#"format!("{} trainers", n)"#, Some("trainers")),
        (r#"format!("a {x} b {n:.1} more lines")"#, Some("lines")),
        (r#"format!("{MOST} nodes")"#, None),
        (r#"format!("{}, {} at most", counted(n, "pair"), steps)"#, None),
        (r#"format!("{dir} holds")"#, None),
    ] {
        assert_eq!(plural_behind_a_count(line), word, "{line}");
    }
}
