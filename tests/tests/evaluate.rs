//! `launcher evaluate`: the metrics are those that a run measures, for models and adapters, on any number of trainers.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::process::{Command, Output};

use dyad_tests::{Row, Workspace, binary, number, text};

const CONFIG: &str = "validation_file = \"held.jsonl\"\nmax_steps = 4\nn_evals = 1\n";

fn workspace() -> Workspace {
    let workspace = Workspace::with_model(16, CONFIG);
    workspace.write("held.jsonl", &dyad_tests::pair_lines(7));
    workspace
}

fn evaluate(workspace: &Workspace, args: &[&str]) -> Output {
    let mut command = Command::new(binary("launcher"));
    command.current_dir(workspace.path(".")).arg("evaluate").args(["--gpus-per-node", "0"]).args(args);
    // Temporary folders of the evaluation, to see that none is left.
    command.env("TMPDIR", workspace.path("tmp"));
    let _ = fs::create_dir(workspace.path("tmp"));
    let output = command.output().unwrap();
    assert_eq!(fs::read_dir(workspace.path("tmp")).unwrap().count(), 0, "{}", text(&output));
    output
}

fn metrics(workspace: &Workspace, args: &[&str]) -> Row {
    let output = evaluate(workspace, &[args, &["--file", "held.jsonl", "--json"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// All keys of the run's last evaluation, except durations.
fn assert_equal(found: &Row, run: &Row) {
    let mut compared = 0;
    for key in run.keys().filter(|key| key.starts_with("eval_") && !key.ends_with("seconds")) {
        let (ours, theirs) = (number(found, key), number(run, key));
        // Another split into micro-batches and ranks, and saved weights that are equal: only the order of sums differs.
        assert!((ours - theirs).abs() <= 1e-6 * theirs.abs().max(1.0), "{key}: {ours} and {theirs}");
        compared += 1;
    }
    assert!(compared >= 8, "{run:?}");
}

#[test]
fn a_trained_model_and_its_start_have_the_metrics_that_the_run_measured() {
    let workspace = workspace();
    workspace.train(2, "out", &[]);
    let last = workspace.rows("out/eval_metrics.jsonl").pop().unwrap();
    let before: Vec<_> =
        fs::read_dir(workspace.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    for args in [["--nodes", "1"], ["--nodes", "3"]] {
        let with_start = ["--model", "out/final", "--reference", "model", "--set", "dtype=float32"];
        assert_equal(&metrics(&workspace, &[&with_start[..], &args].concat()), &last);
        // The configuration of the run names its start.
        let of_run = ["--model", "out/final", "--config", "run.toml"];
        let found = metrics(&workspace, &[&of_run[..], &args].concat());
        assert_equal(&found, &last);
        assert_eq!(found["compared_with"], "model");
    }
    let sharded = ["--model", "out/final", "--config", "run.toml", "--nodes", "2", "--set", "zero_stage=3"];
    assert_equal(&metrics(&workspace, &sharded), &last);
    let after: Vec<_> =
        fs::read_dir(workspace.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(before.len() + 1, after.len(), "only the folder of this test: {after:?}");
}

#[test]
fn an_adapter_is_compared_with_its_base_and_with_other_adapters() {
    let workspace = workspace();
    let lora = ["--set", "lora=true", "--set", "lora_r=4"];
    workspace.train(1, "first", &lora);
    let first = workspace.rows("first/eval_metrics.jsonl").pop().unwrap();
    let found = metrics(&workspace, &["--model", "first/final", "--set", "dtype=float32", "--nodes", "2"]);
    assert_equal(&found, &first);
    assert_eq!(found["compared_with"], "the adapter's base");
    // A run that continues the adapter is compared with it.
    let more = ["--set", "lora=true", "--set", "from_checkpoint=first/final"];
    workspace.train(1, "second", &more);
    let second = workspace.rows("second/eval_metrics.jsonl").pop().unwrap();
    let args = ["--model", "second/final", "--reference", "first/final", "--set", "dtype=float32"];
    assert_equal(&metrics(&workspace, &args), &second);
}

#[test]
fn without_a_reference_rewards_are_zero_and_the_table_says_why() {
    let workspace = workspace();
    let output =
        evaluate(&workspace, &["--model", "model", "--file", "held.jsonl", "--output", "result.json"]);
    assert!(output.status.success(), "{}", text(&output));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("the model itself: rewards and kl are 0"), "{shown}");
    assert!(shown.contains("  loss                    0.6931"), "{shown}");
    let result: Row =
        serde_json::from_str(&fs::read_to_string(workspace.path("result.json")).unwrap()).unwrap();
    assert_eq!(number(&result, "eval_rewards/margins"), 0.0);
    let likelihood = metrics(&workspace, &["--model", "model", "--set", "training_method=sft"]);
    assert!(number(&likelihood, "eval_loss") > 1.0 && !likelihood.contains_key("eval_kl"), "{likelihood:?}");
}

#[test]
fn what_cannot_be_evaluated_is_refused_by_name() {
    let workspace = workspace();
    for (args, words) in [
        (&["--model", "nowhere/model/x", "--file", "held.jsonl"][..], "nowhere/model/x"),
        (&["--model", "model", "--file", "absent.jsonl"], "absent.jsonl"),
        (
            &["--model", "model", "--file", "held.jsonl", "--output", "no/such/folder.json"],
            "its folder is missing",
        ),
        (&["--model", "model", "--file", "held.jsonl", "--set", "dpo_bets=1"], "dpo_bets"),
    ] {
        let output = evaluate(&workspace, args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output));
        assert!(text(&output).contains(words), "{args:?}: {}", text(&output));
    }
}
