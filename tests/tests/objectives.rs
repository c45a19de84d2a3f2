//! Every objective against TRL's own trainers on the same weights and pairs: full and LoRA, one to three trainers, with and without
//! prefix sharing. `tests/parity/objectives.py` has the variants, `tests/parity/compare.py` the tolerances.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot set itself up has failed; the tests print measured differences"
)]

use std::process::Command;

use dyad_tests::{Row, Workspace, root, text};

fn python(script: &str, args: &[&str], workspace: &Workspace) -> String {
    let python = root().join(".venv/parity/bin/python");
    assert!(python.is_file(), "no Python environment with TRL; run `make test`");
    let mut command = Command::new(python);
    command.arg(root().join("tests/parity").join(script)).args(args).current_dir(workspace.path("."));
    let output = command.env("PYTHONDONTWRITEBYTECODE", "1").output().unwrap();
    assert!(output.status.success(), "{script} {args:?}\n{}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A variant's keys as arguments of the launcher.
fn overrides(keys: &Row) -> Vec<String> {
    keys.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]).collect()
}

/// Trains variants of a case (all without names) with TRL, and with Dyad in each of the settings: trainers and further arguments.
fn objectives_equal_trl(case: &str, names: &[&str], settings: &[(usize, &str, &[&str])]) {
    let workspace = Workspace::empty();
    python("make_case.py", &["--case", case, "--out", "."], &workspace);
    let variants: std::collections::BTreeMap<String, Row> =
        serde_json::from_str(&python("objectives.py", &[&["list"], names].concat(), &workspace)).unwrap();
    python("objectives.py", &[&["train"], names].concat(), &workspace);
    let mut runs = Vec::new();
    for (name, keys) in &variants {
        let overrides = overrides(keys);
        for (trainers, setting, args) in settings {
            let run = format!("{name}.{setting}");
            let args: Vec<&str> = overrides.iter().map(String::as_str).chain(args.iter().copied()).collect();
            workspace.train(*trainers, &run, &args);
            runs.push(run);
        }
    }
    let runs: Vec<&str> = ["compare"].into_iter().chain(runs.iter().map(String::as_str)).collect();
    println!("{}", python("objectives.py", &runs, &workspace));
}

#[test]
fn every_objective_equals_trl_with_all_weights() {
    let separate = ["--set", "prefix_sharing=false", "--set", "micro_batch_tokens=400"];
    objectives_equal_trl("llama", &[], &[(1, "one", &[]), (3, "three", &separate)]);
}

/// One objective of each kind: of differences, of single outputs, of all pairs of a step, without a reference, with weights of tokens.
#[test]
fn objectives_equal_trl_with_adapters() {
    let names = [
        "nca-pair",
        "mpo",
        "aot-with-sft",
        "alpha-divergence",
        "ld-with-sft",
        "wpo",
        "reference-free",
        "orpo",
    ];
    let small = ["--set", "micro_batch_tokens=300"];
    let separate = ["--set", "prefix_sharing=false"];
    objectives_equal_trl("qwen2-lora", &names, &[(1, "one", &small), (2, "two", &separate)]);
}
