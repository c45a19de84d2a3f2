//! An interrupted and resumed run ends with the same bytes as an uninterrupted one.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;

use dyad_tests::processes::{kill_9, wait_for};
use dyad_tests::{CURVE, Workspace, assert_same_curve, text};

fn resumed_equals_uninterrupted(weights: &str, args: &[&str]) {
    let workspace = Workspace::with_model(80, "n_checkpoints = 5\nrandom_seed = 3\n");
    let whole = workspace.train(2, "whole", args);
    assert_eq!(whole.len(), 10);

    let args = [&["--set", "output_dir=cut"], args].concat();
    let mut launcher = workspace.launcher(2, &args).spawn().unwrap();
    wait_for("the first checkpoint", || workspace.path("cut/checkpoint-2").exists().then_some(()));
    kill_9(launcher.id() as i32);
    launcher.wait().unwrap();
    // Remove later checkpoints and the final model, so that the resume certainly has steps to do.
    for step in [4, 6, 8] {
        let _ = fs::remove_dir_all(workspace.path(&format!("cut/checkpoint-{step}")));
    }
    let _ = fs::remove_dir_all(workspace.path("cut/final"));

    let output = workspace.launch(2, &[args.as_slice(), &["--resume"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    // With cached reference scores steps measure no divergence.
    let keeps_scores = args.iter().any(|arg| arg.starts_with("reference_logps="));
    let mut names = [&CURVE[..], &["num_tokens"]].concat();
    names.retain(|name| *name != "kl" || !keeps_scores);
    assert_same_curve(&whole, &workspace.rows("cut/metrics.jsonl"), &names, 0.0);
    let bytes = |dir: &str| fs::read(workspace.path(&format!("{dir}/final/{weights}"))).unwrap();
    assert!(bytes("whole") == bytes("cut"), "final weights differ");
}

#[test]
fn full_fine_tuning_resumes_bit_equal() {
    resumed_equals_uninterrupted("model.safetensors", &[]);
}

#[test]
fn bfloat16_resumes_bit_equal_from_its_float32_masters() {
    resumed_equals_uninterrupted("model.safetensors", &["--set", "dtype=bfloat16"]);
}

/// The killed run has cached scores of steps that the resumed run repeats.
#[test]
fn cached_reference_scores_resume_bit_equal() {
    let workspace = Workspace::empty();
    for mode in ["cache", "precompute"] {
        let cache = format!("reference_cache={}", workspace.path(mode).display());
        let mode = format!("reference_logps={mode}");
        resumed_equals_uninterrupted("model.safetensors", &["--set", &mode, "--set", &cache]);
    }
}

/// The checkpoint of step 2 holds the reference that has moved twice.
#[test]
fn a_moving_reference_resumes_bit_equal() {
    let moves = ["--set", "sync_ref_model=true", "--set", "ref_model_sync_steps=1"];
    resumed_equals_uninterrupted("model.safetensors", &[&moves[..], &["--set", "zero_stage=3"]].concat());
    let lora = [&moves[..], &["--set", "lora=true", "--set", "lora_r=4"]].concat();
    resumed_equals_uninterrupted("adapter_model.safetensors", &lora);
}

#[test]
fn lora_with_dropout_resumes_bit_equal() {
    let lora = ["--set", "lora=true", "--set", "lora_r=4", "--set", "lora_dropout=0.1"];
    resumed_equals_uninterrupted("adapter_model.safetensors", &lora);
}

#[test]
fn dora_and_modules_that_are_trained_whole_resume_bit_equal() {
    let keys = ["--set", "lora=true", "--set", "lora_r=4", "--set", "use_dora=true", "--set"];
    let keys = [&keys[..], &["modules_to_save=[\"embed_tokens\", \"lm_head\", \"norm\"]"]].concat();
    for more in [["zero_stage=0", "dtype=float32"], ["zero_stage=3", "dtype=bfloat16"]] {
        let more = ["--set", more[0], "--set", more[1]];
        resumed_equals_uninterrupted("adapter_model.safetensors", &[&keys[..], &more].concat());
    }
}

#[test]
fn sharded_states_resume_bit_equal() {
    for (stage, dtype) in [("zero_stage=1", "dtype=bfloat16"), ("zero_stage=3", "dtype=float32")] {
        resumed_equals_uninterrupted("model.safetensors", &["--set", stage, "--set", dtype]);
    }
}

#[test]
fn eight_bit_moments_resume_bit_equal() {
    resumed_equals_uninterrupted(
        "model.safetensors",
        &["--set", "optim=adamw_8bit", "--set", "zero_stage=2"],
    );
}

#[test]
fn a_resume_with_other_moments_is_refused() {
    let workspace = Workspace::with_model(16, "n_checkpoints = 2\n");
    workspace.train(1, "out", &[]);
    fs::remove_dir_all(workspace.path("out/final")).unwrap();
    let output = workspace.launch(1, &["--resume", "--set", "optim=adamw_8bit"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("optim"), "{}", text(&output));
}

#[test]
fn a_resume_on_other_data_is_refused() {
    let workspace = Workspace::with_model(16, "n_checkpoints = 2\n");
    workspace.train(1, "out", &[]);
    fs::remove_dir_all(workspace.path("out/final")).unwrap();
    workspace.write("pairs.jsonl", &dyad_tests::pair_lines(17));
    let output = workspace.launch(1, &["--resume"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("training_file"), "{}", text(&output));
}
