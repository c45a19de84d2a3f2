//! Dyad against TRL's own trainers on the same weights and pairs, in one, two and three trainer processes. Each test runs TRL
//! again; `tests/parity/compare.py` states the tolerances.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot set itself up has failed; the tests print measured differences"
)]

use std::path::PathBuf;

use dyad_tests::python::python;
use dyad_tests::{Workspace, root};

/// Trains the case with TRL, then with Dyad on one, two and three trainers, and compares.
fn equals_trl(case: &str) -> Workspace {
    equals_trl_on(&[1, 2, 3], case)
}

fn equals_trl_on(worlds: &[usize], case: &str) -> Workspace {
    let workspace = Workspace::empty();
    python("make_case.py", &["--case", case, "--out", "."], &workspace);
    python("run_trl.py", &["--case-dir", ".", "--out", "trl.jsonl"], &workspace);
    for &world in worlds {
        let out = format!("world{world}");
        assert_eq!(workspace.train(world, &out, &[]).len(), 9);
        let (metrics, trained) = (format!("{out}/metrics.jsonl"), format!("{out}/final"));
        let sides =
            ["--trl", "trl.jsonl", "--dyad", &metrics, "--final-trl", "trl-final", "--final-dyad", &trained];
        println!("{case}, {world} trainers\n{}", python("compare.py", &sides, &workspace));
    }
    workspace
}

/// The expected file of the template engine equals the output of the installed transformers.
#[test]
fn expected_template_outputs_equal_those_of_transformers() {
    let expected = root().join("trainer/data/tests/templates/expected.json");
    let now = python("templates.py", &[], &Workspace::empty());
    assert!(
        now == std::fs::read_to_string(expected).unwrap(),
        "write it anew: tests/parity/templates.py > expected.json"
    );
}

/// The expected decisions of early stopping equal those of the installed transformers.
#[test]
fn expected_early_stops_equal_those_of_transformers() {
    let expected = root().join("coordinator/tests/early_stopping.json");
    let now = python("early_stopping.py", &[], &Workspace::empty());
    assert!(
        now == std::fs::read_to_string(expected).unwrap(),
        "write it anew: tests/parity/early_stopping.py > early_stopping.json"
    );
}

#[test]
fn llama_with_llama3_rope_and_untied_head_equals_trl() {
    let workspace = equals_trl("llama");
    python("check_loads.py", &["--dir", "world2/final"], &workspace);
}

#[test]
fn llama_with_tied_head_and_warmup_equals_trl() {
    let workspace = equals_trl("llama-tied");
    python("check_loads.py", &["--dir", "world2/final"], &workspace);
}

#[test]
fn qwen2_with_cosine_schedule_equals_trl() {
    let workspace = equals_trl("qwen2");
    python("check_loads.py", &["--dir", "world2/final"], &workspace);
}

#[test]
fn llama_lora_equals_trl() {
    let workspace = equals_trl("llama-lora");
    python("check_loads.py", &["--dir", "world2/final", "--base", "model"], &workspace);
}

#[test]
fn qwen2_lora_equals_trl_and_its_merged_model_loads() {
    let workspace = equals_trl("qwen2-lora");
    let merged: PathBuf = ["merged", "final", "merged"].iter().collect();
    workspace.train(2, "merged", &["--set", "merge_adapter=true"]);
    python(
        "check_loads.py",
        &["--dir", &merged.to_string_lossy(), "--base", "model", "--merged"],
        &workspace,
    );
}

/// Trains the case on one trainer, and on two with ZeRO stage 2 and a merged model that PEFT's merge must equal.
fn adapters_equal_peft(case: &str) {
    let workspace = equals_trl_on(&[1], case);
    python("check_loads.py", &["--dir", "world1/final", "--base", "model"], &workspace);
    let keys = ["--set", "merge_adapter=true", "--set", "zero_stage=2"];
    workspace.train(2, "merged", &keys);
    python("check_loads.py", &["--dir", "merged/final/merged", "--base", "model", "--merged"], &workspace);
    let sides = ["--trl", "trl.jsonl", "--dyad", "merged/metrics.jsonl", "--final-trl", "trl-final"];
    python("compare.py", &[&sides[..], &["--final-dyad", "merged/final"]].concat(), &workspace);
}

#[test]
fn rank_stabilised_adapters_with_patterns_and_exceptions_equal_peft() {
    adapters_equal_peft("llama-lora-patterns");
}

#[test]
fn dora_that_begins_away_from_the_base_equals_peft() {
    adapters_equal_peft("llama-lora-dora");
}

#[test]
fn new_dora_on_a_tied_model_with_biases_equals_peft() {
    adapters_equal_peft("qwen2-lora-dora");
}

#[test]
fn adapters_with_a_bias_equal_peft() {
    adapters_equal_peft("qwen2-lora-bias");
}

#[test]
fn embedding_and_head_trained_beside_adapters_equal_peft() {
    adapters_equal_peft("llama-lora-saved");
}

#[test]
fn a_tied_embedding_with_norms_and_layers_trained_beside_adapters_equals_peft() {
    adapters_equal_peft("qwen2-lora-saved");
}

/// The pairs are in TRL's form, as messages.
#[test]
fn ipo_equals_trl() {
    equals_trl("llama-ipo");
}

/// The pairs are in TRL's form, as plain text.
#[test]
fn simpo_on_adapters_and_plain_text_equals_trl() {
    let workspace = equals_trl("qwen2-lora-simpo");
    let rows = workspace.rows("world1/metrics.jsonl");
    assert!(rows.iter().all(|row| !row.contains_key("kl")), "no reference model was computed");
}

#[test]
fn supervised_fine_tuning_equals_trl() {
    equals_trl("llama-sft");
}
