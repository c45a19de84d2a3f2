//! Checks a run or model with `trainer check`, which uses the trainer's own loading code.

use std::io::Write;
use std::process::{Command, Stdio};

use dyad_families::{ModelFindings, Sizes};
use dyad_proto::{Fault, RunConfig};
use serde::Deserialize;

use crate::process::programs::{missing_hint, program};
use crate::show::console;

/// Sizes of a model; `name` is a hub id or a model folder.
pub fn model(name: &str) -> Result<Sizes, Fault> {
    asked(&["--model", name], "").and_then(|text| read(&text))
}

/// Checks model, tokenizer, template and first pairs of a run. Prints warnings.
pub fn run(config: &RunConfig) -> Result<ModelFindings, Fault> {
    asked(&["--config", "-"], &config.to_json()?).and_then(|text| read(&text))
}

fn read<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, Fault> {
    serde_json::from_str(text).map_err(|error| {
        Fault::failed(format!("the trainer program's answer cannot be read: {error}"))
            .hint("launcher and trainer are of different builds")
    })
}

fn asked(arguments: &[&str], input: &str) -> Result<String, Fault> {
    let path = program("trainer")?;
    let cannot = |error: std::io::Error| {
        Fault::failed(format!("cannot start {}: {error}", path.display())).hint(missing_hint())
    };
    let mut command = Command::new(&path);
    command.arg("check").args(arguments).env("DYAD_LOG", "warn").env("NO_COLOR", "1");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    // Cannot deadlock: the trainer reads all input before it writes. Ignore errors: a trainer that fails to start reports why.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(cannot)?;
    let said = String::from_utf8_lossy(&output.stderr);
    said.lines().filter_map(warning).for_each(console::warn);
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Fault::reported(&said, output.status.code()).unwrap_or_else(|| {
        let last = said.lines().next_back().unwrap_or("it says nothing");
        Fault::failed(format!("{} check ended with {}: {last}", path.display(), output.status))
            .hint(missing_hint())
    }))
}

/// Text of a log line of level WARN, without time and module; `None` for other lines.
fn warning(line: &str) -> Option<&str> {
    let (_, text) = line.split_once(" WARN ")?;
    Some(match text.split_once(": ") {
        Some((module, rest)) if module.contains("::") && !module.contains(' ') => rest,
        _ => text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_shown_without_time_and_module() {
        for (line, expected) in [
            (
                "2026-11-29T10:00:00Z  WARN trainer::load: longer than the model",
                Some("longer than the model"),
            ),
            ("2026-11-29T10:00:00Z  WARN a: b is c", Some("a: b is c")),
            ("2026-11-29T10:00:00Z  INFO trainer::load: loaded", None),
        ] {
            assert_eq!(warning(line), expected, "{line}");
        }
    }
}
