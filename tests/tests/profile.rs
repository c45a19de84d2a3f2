//! `--profile`: its files, and that its times add up.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_tests::{CURVE, Workspace, assert_same_curve, text};
use serde_json::Value;

fn report(workspace: &Workspace, name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(workspace.path(name)).unwrap()).unwrap()
}

fn seconds(rows: &Value) -> f64 {
    rows.as_array().unwrap().iter().map(|row| row["seconds"].as_f64().unwrap()).sum()
}

/// Whether the CPU supports blocked matrix products and no variable limits it.
fn blocks_serve() -> bool {
    std::env::var_os("DYAD_CPU_CAPABILITY").is_none()
        && std::env::var_os("ATEN_CPU_CAPABILITY").is_none()
        && std::arch::is_x86_feature_detected!("avx512f")
}

#[test]
fn every_rank_writes_a_trace_and_a_table_and_the_numbers_are_unchanged() {
    let workspace = Workspace::with_model(40, "");
    let plain = workspace.train(2, "plain", &[]);
    let profiled = workspace.train(2, "out", &["--profile"]);
    assert_same_curve(&plain, &profiled, &CURVE, 0.0);
    assert!(!workspace.path("plain/profile").exists());
    for rank in 0..2 {
        let report = report(&workspace, &format!("out/profile/rank{rank}.json"));
        let summary = &report["summary"];
        assert_eq!(summary["steps"], 3);
        // The phases and the remaining time add up to the step, except for rounding.
        let step = summary["step_seconds"].as_f64().unwrap();
        assert!((seconds(&summary["phases"]) - step).abs() < 1e-6 * step + 1e-9, "{summary}");
        assert!(seconds(&summary["classes"]) < step * 1.5);
        for phase in
            ["forward_policy", "forward_reference", "head", "backward", "optimizer", "all_reduce_wait"]
        {
            let named = |row: &&Value| row["name"] == phase;
            assert!(summary["phases"].as_array().unwrap().iter().find(named).is_some(), "no {phase}");
        }
        assert!(report["roofline"]["flops_per_second"].as_f64().unwrap() > 1e9);
        let table = std::fs::read_to_string(workspace.path(&format!("out/profile/rank{rank}.txt"))).unwrap();
        // Without AVX-512 libtorch computes linear layers.
        let product = if blocks_serve() { "dyad::product" } else { "aten::" };
        for part in ["of the roofline", "by part of the step", "matrix product", product, "0 padding"] {
            assert!(table.contains(part), "no {part:?} in {table}");
        }
        let trace = self::report(&workspace, &format!("out/profile/rank{rank}.trace.json"));
        assert!(trace["traceEvents"].as_array().unwrap().len() > 1000);
    }
}

/// An unusable profile folder is an error before the first step; a profile that fails later does not fail the run.
#[test]
fn an_unusable_profile_folder_is_refused_before_the_first_step() {
    let workspace = Workspace::with_model(40, "");
    std::fs::create_dir(workspace.path("out")).unwrap();
    std::fs::write(workspace.path("out/profile"), "").unwrap();
    for (what, dir) in [("profile is no folder", "out/profile"), ("rank0.json: it is no file", "other")] {
        if dir == "other" {
            std::fs::remove_file(workspace.path("out/profile")).unwrap();
            std::fs::create_dir_all(workspace.path("out/profile/rank0.json/x")).unwrap();
        }
        let output = workspace.launch(1, &["--profile"]);
        let said = text(&output);
        assert!(output.status.code() == Some(2) && said.contains(what), "{said}");
        assert!(said.contains("hint: ") && !said.contains("step 1"), "{said}");
    }
}

#[test]
fn a_profile_that_cannot_be_written_does_not_fail_the_run() {
    let workspace = Workspace::with_model(400, "max_steps = 40\n");
    let plain = workspace.train(1, "plain", &[]);
    let mut command = workspace.launcher(1, &["--profile"]);
    command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let out = workspace.path("out/profile");
    std::fs::create_dir_all(&out).unwrap();
    let launcher = command.spawn().unwrap();
    dyad_tests::processes::wait_for("the first step", || {
        (workspace.path("out/metrics.jsonl").exists()).then_some(())
    });
    // Whether this happens before or after the end of the recorded steps, the run completes.
    let _ = std::fs::remove_dir_all(&out);
    let _ = std::fs::write(&out, "in the way");
    let output = launcher.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_same_curve(&plain, &workspace.rows("out/metrics.jsonl"), &CURVE, 0.0);
    assert!(workspace.path("out/final/model.safetensors").exists());
}

#[test]
fn a_run_too_short_to_profile_says_so() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let output = workspace.launch(1, &["--profile"]);
    assert!(output.status.success(), "{}", text(&output));
    let log = std::fs::read_to_string(workspace.path("out/logs/node0-cpu.log")).unwrap();
    assert!(log.contains("nothing was profiled"), "{log}");
}

/// One of the two steps is recorded.
#[test]
fn a_short_run_is_profiled_for_the_steps_it_has() {
    let workspace = Workspace::with_model(16, "");
    workspace.train(1, "out", &["--profile"]);
    assert_eq!(report(&workspace, "out/profile/rank0.json")["summary"]["steps"], 1);
}

/// Twelve pairs on three prompts: with sharing each prompt is computed once per step.
#[test]
fn pairs_that_share_a_prompt_compute_it_once_and_change_no_number() {
    let workspace = Workspace::with_model(36, "batch_size = 12\nshuffle = false\n");
    let lines = std::fs::read_to_string(workspace.path("pairs.jsonl")).unwrap();
    let mut pairs: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for at in 0..pairs.len() {
        pairs[at]["input"] = pairs[at / 12 * 12 + at % 3]["input"].clone();
    }
    let lines: Vec<String> = pairs.iter().map(Value::to_string).collect();
    workspace.write("pairs.jsonl", &lines.join("\n"));
    workspace.write(
        "run.toml",
        &std::fs::read_to_string(workspace.path("run.toml")).unwrap().replace("batch_size = 8\n", ""),
    );
    let shared = workspace.train(1, "shared", &["--profile"]);
    let separate = workspace.train(1, "separate", &["--profile", "--set", "prefix_sharing=false"]);
    // As in `invariance.rs`: attention over other shapes rounds differently in every layer.
    assert_same_curve(&shared, &separate, &CURVE, 1e-4);
    let tokens = |out: &str| report(&workspace, &format!("{out}/profile/rank0.json"))["tokens"].clone();
    let (shared, separate) = (tokens("shared"), tokens("separate"));
    assert_eq!(separate["computed"], separate["unshared"]);
    assert_eq!(shared["unshared"], separate["unshared"]);
    assert_eq!((&shared["repeated_prompt"], &shared["padding"]), (&0.into(), &0.into()));
    // Twelve pairs have 24 answers and three prompts, so sharing saves 21 of 24 prompts.
    let saved = separate["computed"].as_u64().unwrap() - shared["computed"].as_u64().unwrap();
    assert_eq!(saved, separate["repeated_prompt"].as_u64().unwrap());
    assert!(saved * 10 > separate["computed"].as_u64().unwrap() * 4, "{shared} {separate}");
}
