//! Starts from adapters and model folders of every kind: each gives the numbers of transformers and PEFT, or is refused with an
//! error that names the cause. The folder that a run at learning rate 0 writes must give the same numbers again.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use dyad_tests::processes::die_with_me;
use dyad_tests::python::python;
use dyad_tests::{Workspace, binary, number, text};
use serde_json::{Map, Value};

/// Relative. Values are means of summed log-probabilities around -300; rounding of a float32 sum of that size is a tenth of this.
const TOLERANCE: f64 = 1e-5;
/// Runs at a time. A run's trainer and coordinator take turns, so each run keeps one core busy.
const AT_ONCE: usize = 2;
const RUN: &str = "training_file = \"pairs.jsonl\"\nbatch_size = 4\nmax_steps = 1\nlearning_rate = 0.0\nshuffle = false\n\
dtype = \"float32\"\n";

fn script(what: &str, workspace: &Workspace) {
    python("starts.py", &[what, "--dir", "."], workspace);
}

/// Starts a run. Returns a description of what is wrong with its result, or `None`.
fn wrong(workspace: &Workspace, name: &str, start: &Value) -> Option<String> {
    let mut config = format!("{RUN}output_dir = \"out-{name}\"\n");
    for (key, value) in start["run"].as_object().unwrap() {
        // JSON strings, numbers and booleans are valid TOML.
        writeln!(config, "{key} = {value}").unwrap();
    }
    workspace.write(&format!("{name}.toml"), &config);
    let mut command = Command::new(binary("launcher"));
    command.args(["--nodes", "1", "--gpus-per-node", "0", "--max-restarts", "0"]);
    command.args(["--config", &format!("{name}.toml")]).current_dir(workspace.path(".")).stdin(Stdio::null());
    die_with_me(&mut command);
    let output = command.output().unwrap();
    let said = text(&output);
    if let Some(wrong) = checked_wrongly(workspace, name, start["refused"].as_str()) {
        return Some(wrong);
    }
    if let Some(words) = start["refused"].as_str() {
        let refused = output.status.code() == Some(2) && said.contains(words) && said.contains("hint: ");
        return (!refused).then(|| format!("{name}: not refused with {words:?}:\n{said}"));
    }
    if !output.status.success() {
        return Some(format!("{name}: {said}"));
    }
    let row: Map<String, Value> = workspace.rows(&format!("out-{name}/metrics.jsonl")).remove(0);
    for (metric, right) in [("logps/chosen", "chosen"), ("logps/rejected", "rejected")] {
        let (found, right) = (number(&row, metric), start[right].as_f64().unwrap());
        // Written so that NaN fails.
        let close = (found - right).abs() <= TOLERANCE * right.abs();
        if !close {
            return Some(format!("{name}: {metric} {found}, right is {right}"));
        }
    }
    warned_wrongly(workspace, name, start["warns"].as_str())
}

/// `trainer check`, which dry runs and the doctor use, must refuse the same starts as a run, with the same words.
fn checked_wrongly(workspace: &Workspace, name: &str, refused: Option<&str>) -> Option<String> {
    let mut command = Command::new(binary("trainer"));
    command.args(["check", "--config", &format!("{name}.toml")]).current_dir(workspace.path("."));
    let output = command.output().unwrap();
    let said = text(&output);
    let right = match refused {
        Some(words) => output.status.code() == Some(2) && said.contains(words) && said.contains("hint: "),
        None => output.status.success() && said.contains("\"trainable\":"),
    };
    (!right).then(|| format!("{name}: the check does not say {refused:?}:\n{said}"))
}

/// A start must warn exactly once with `words`, or not at all if `words` is `None`.
fn warned_wrongly(workspace: &Workspace, name: &str, words: Option<&str>) -> Option<String> {
    let log = std::fs::read_to_string(workspace.path(&format!("out-{name}/logs/node0-cpu.log"))).unwrap();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    match words {
        None if warnings.is_empty() => None,
        Some(words) if warnings.iter().filter(|line| line.contains(words)).count() == 1 => None,
        words => Some(format!("{name}: warnings are {warnings:?}, expected {words:?}")),
    }
}

#[test]
fn every_start_equals_transformers_and_peft_or_is_refused_by_name() {
    let workspace = Workspace::empty();
    script("make", &workspace);
    let starts: Map<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(workspace.path("starts.json")).unwrap()).unwrap();
    assert!(starts.len() > 90, "{} starts", starts.len());
    let (left, found) = (Mutex::new(starts.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some((name, start)) = left.lock().unwrap().next() else { break };
                    found.lock().unwrap().extend(wrong(&workspace, &name, &start));
                }
            });
        }
    });
    let found = found.into_inner().unwrap();
    assert!(found.is_empty(), "{} starts are wrong:\n{}", found.len(), found.join("\n"));
    script("check", &workspace);
}
