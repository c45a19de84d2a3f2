//! Runs that stop early: when they stop, which model they keep, and that a resumed run decides the same.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;

use dyad_tests::{Row, Workspace, number, pair, processes, text};
use serde_json::Value;

/// Validation pairs with the preferences of the training pairs reversed: training makes their loss worse.
fn reversed(count: usize) -> String {
    let swap = |line: &str| {
        let mut pair: Value = serde_json::from_str(line).unwrap();
        let keys = pair.as_object_mut().unwrap();
        let (good, bad) =
            (keys.remove("preferred_output").unwrap(), keys.remove("non_preferred_output").unwrap());
        keys.insert("preferred_output".into(), bad);
        keys.insert("non_preferred_output".into(), good);
        format!("{pair}\n")
    };
    dyad_tests::pair_lines(count).lines().map(swap).collect()
}

const CONFIG: &str =
    "validation_file = \"reversed.jsonl\"\nearly_stopping_enabled = true\nlr_scheduler_type = \"constant\"\n";

fn workspace(config: &str) -> Workspace {
    let workspace = Workspace::with_model(16, "");
    let base = dyad_tests::BASE.replace("lr_scheduler_type = \"linear\"\n", "");
    workspace.write("run.toml", &format!("{base}{CONFIG}{config}"));
    workspace.write("reversed.jsonl", &reversed(16));
    workspace
}

fn evaluations(workspace: &Workspace, out: &str) -> Vec<Row> {
    let mut rows = workspace.rows(&format!("{out}/eval_metrics.jsonl"));
    rows.iter_mut().for_each(|row| drop(row.remove("eval_seconds")));
    rows
}

fn json(workspace: &Workspace, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(workspace.path(name)).unwrap()).unwrap()
}

fn same_bytes(workspace: &Workspace, one: &str, other: &str) -> bool {
    fs::read(workspace.path(one)).unwrap() == fs::read(workspace.path(other)).unwrap()
}

#[test]
fn a_run_whose_evaluations_get_worse_stops_early_with_the_best_model() {
    let workspace = workspace("n_epochs = 20\neval_steps = 5\nsave_total_limit = 1\n");
    for (world, keys) in [(1, ""), (2, "zero_stage=2"), (2, "zero_stage=3"), (2, "lora=true")] {
        let out = format!("out{world}{}", keys.replace('=', ""));
        let set = format!("output_dir={out}");
        let mut args = vec!["--set", &set];
        args.extend(keys.split(' ').filter(|key| !key.is_empty()).flat_map(|key| ["--set", key]));
        let output = workspace.launch(world, &args);
        assert_eq!(output.status.code(), Some(0), "{keys}: {}", text(&output));
        let shown = text(&output);
        assert!(shown.contains("stops    early after step 15: 2 evaluations without"), "{shown}");
        assert!(
            shown.contains("final (the run stopped early after step 15; it is the model of step 5)"),
            "{shown}"
        );
        let rows = evaluations(&workspace, &out);
        let column = |key: &str| rows.iter().filter_map(|row| row.get(key)?.as_f64()).collect::<Vec<_>>();
        assert_eq!(column("step"), [0.0, 5.0, 10.0, 15.0]);
        assert_eq!(column("eval_best_step"), [5.0; 3]);
        assert_eq!(column("eval_patience_counter"), [0.0, 1.0, 2.0]);
        assert_eq!(column("eval_best_metric"), [number(&rows[1], "eval_loss"); 3]);
        assert_eq!(workspace.rows(&format!("{out}/metrics.jsonl")).len(), 15);
        let best = json(&workspace, &format!("{out}/dyad_best.json"));
        assert_eq!((&best["checkpoint"], &best["early_stopped"]), (&"checkpoint-5".into(), &true.into()));
        let weights = if keys == "lora=true" { "adapter_model" } else { "model" };
        let file = |folder: &str| format!("{out}/{folder}/{weights}.safetensors");
        assert!(same_bytes(&workspace, &file("final"), &file("checkpoint-5")));
        assert!(!same_bytes(&workspace, &file("final"), &file("checkpoint-15")));
        assert!(
            !workspace.path(&format!("{out}/checkpoint-10")).exists(),
            "save_total_limit keeps the newest and the best"
        );
        let output = workspace.launch(world, &[args.as_slice(), &["--resume"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        assert!(
            text(&output).contains("this run is complete")
                && text(&output).contains("stopped early after step 15")
        );
    }
}

#[test]
fn a_stopped_run_goes_on_if_early_stopping_is_switched_off() {
    let workspace = workspace("max_steps = 25\neval_steps = 5\n");
    assert_eq!(workspace.train(1, "out", &[]).len(), 15);
    let output = workspace.launch(1, &["--resume", "--set", "early_stopping_enabled=false"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 25);
    assert_eq!(json(&workspace, "out/final/dyad_state.json")["early_stopped"], Value::Null);
}

/// The run is stopped and resumed at many places, also between an evaluation and the next one.
#[test]
fn a_run_that_is_interrupted_and_resumed_decides_the_same() {
    let workspace = workspace("n_epochs = 100\neval_steps = 4\nearly_stopping_patience = 3\n");
    workspace.train(2, "whole", &[]);
    let args = ["--set", "output_dir=cut"];
    let mut mode: &[&str] = &[];
    let mut seen = 0;
    loop {
        let mut launcher = workspace.launcher(2, &[&args, mode].concat()).spawn().unwrap();
        let rows = || {
            fs::read_to_string(workspace.path("cut/metrics.jsonl")).unwrap_or_default().matches('\n').count()
        };
        let pid = launcher.id() as i32;
        let ended = processes::wait_for("three more steps, or the end", || {
            let status = launcher.try_wait().unwrap();
            (status.is_some() || rows() >= seen + 3).then_some(status)
        });
        let status = match ended {
            Some(status) => status,
            None => {
                processes::terminate(pid);
                launcher.wait().unwrap()
            }
        };
        seen = rows();
        mode = &["--resume"];
        if status.success() {
            break;
        }
        assert_eq!(status.code(), Some(130));
    }
    assert_eq!(evaluations(&workspace, "cut"), evaluations(&workspace, "whole"));
    assert!(same_bytes(&workspace, "cut/final/model.safetensors", "whole/final/model.safetensors"));
    assert_eq!(json(&workspace, "cut/dyad_best.json"), json(&workspace, "whole/dyad_best.json"));
}

#[test]
fn a_run_to_the_end_keeps_its_best_model_too() {
    let workspace = workspace(
        "max_steps = 8\nn_evals = 4\nearly_stopping_patience = 3\nearly_stopping_warmup_evals = 0\n",
    );
    workspace.train(1, "out", &["--set", "learning_rate=1e-3"]);
    let state = json(&workspace, "out/final/dyad_state.json");
    assert_eq!((&state["step"], &state["best_step"]), (&8.into(), &2.into()));
    // An accuracy that is the same everywhere: the first evaluation stays the best.
    let pairs = pair("Same?", "yes", "no").to_string() + "\n";
    workspace.write("reversed.jsonl", &pairs);
    let accuracy = ["--set", "metric_for_best_model=rewards/accuracies", "--set", "learning_rate=1e-12"];
    workspace.train(1, "accuracy", &accuracy);
    assert_eq!(json(&workspace, "accuracy/dyad_best.json")["metric"], "eval_rewards/accuracies");
}

#[test]
fn a_metric_that_evaluations_lack_ends_the_run_before_its_first_row() {
    let workspace = workspace(
        "max_steps = 8\nn_evals = 4\nmetric_for_best_model = \"rewards/lengths\"\ngreater_is_better = true\n",
    );
    let output = workspace.launch(1, &[]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("have no `eval_rewards/lengths`"), "{}", text(&output));
    assert!(!workspace.path("out/metrics.jsonl").exists());
}
