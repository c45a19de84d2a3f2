//! Every objective against TRL's own trainers on the same weights and pairs: full and LoRA, one to three trainers, with and without
//! prefix sharing. `tests/parity/objectives.py` has the variants, `tests/parity/compare.py` the tolerances.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot set itself up has failed; the tests print measured differences"
)]

use dyad_tests::python::python;
use dyad_tests::{Row, Workspace};

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

/// The names of all variants.
fn variants() -> Vec<String> {
    let list = python("objectives.py", &["list"], &Workspace::empty());
    serde_json::from_str::<Row>(&list).unwrap().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn every_objective_equals_trl_with_all_weights() {
    let variants = variants();
    let others: Vec<&str> =
        variants.iter().map(String::as_str).filter(|name| !KINDS.contains(name)).collect();
    assert_eq!(others.len() + KINDS.len(), variants.len());
    objectives_equal_trl("llama", &others, &[(2, "two", &["--set", "micro_batch_tokens=400"])]);
}

#[test]
fn objectives_of_every_kind_equal_trl_with_any_number_of_trainers_and_layout() {
    let separate = ["--set", "prefix_sharing=false", "--set", "micro_batch_tokens=400"];
    objectives_equal_trl("llama", &KINDS, &[(1, "one", &[]), (3, "three", &separate)]);
}

/// One objective of each kind: of differences, of single outputs, of all pairs of a step, without a reference, with weights of tokens, with
/// a reference that moves, of labelled answers.
const KINDS: [&str; 11] = [
    "nca-pair",
    "mpo",
    "aot-with-sft",
    "alpha-divergence",
    "ld-with-sft",
    "wpo",
    "reference-free",
    "orpo",
    "tr-dpo",
    "kto",
    "apo-zero-unpaired",
];

#[test]
fn objectives_equal_trl_with_adapters() {
    let separate = ["--set", "prefix_sharing=false", "--set", "micro_batch_tokens=300"];
    objectives_equal_trl("qwen2-lora", &KINDS, &[(2, "two", &separate)]);
}
