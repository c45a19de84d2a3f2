//! A run that loses a process restarts by itself and ends with the same numbers.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::process::Stdio;

use dyad_tests::processes::{children, kill_9, wait_for};
use dyad_tests::{CURVE, Workspace, assert_same_curve, text};

/// Kills a process of a run of two trainers once the file `ready` exists. Returns the launcher's output at the end of the run.
fn killed(workspace: &Workspace, victim: &str, ready: &str, args: &[&str]) -> String {
    let mut command = workspace.launcher(2, &[&["--max-restarts", "3"], args].concat());
    let launcher = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    wait_for(ready, || workspace.path(ready).exists().then_some(()));
    // The log file exists before the process.
    let process =
        wait_for(victim, || children(&launcher).into_iter().find(|process| process.command.contains(victim)));
    kill_9(process.pid);
    let output = launcher.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

fn same(workspace: &Workspace, whole: &str, other: &str) {
    let rows = |dir: &str| workspace.rows(&format!("{dir}/metrics.jsonl"));
    assert_same_curve(&rows(whole), &rows(other), &[&CURVE[..], &["num_tokens"]].concat(), 0.0);
    let weights = |dir: &str| fs::read(workspace.path(&format!("{dir}/final/model.safetensors"))).unwrap();
    assert!(weights(whole) == weights(other), "final weights differ");
}

const STEPS: &str = "max_steps = 300\nn_checkpoints = 15\n";

#[test]
fn a_run_whose_process_is_killed_goes_on_from_its_checkpoint_bit_equal() {
    let workspace = Workspace::with_model(16, STEPS);
    workspace.train(2, "whole", &[]);
    for (victim, out) in [("node1-cpu", "trainer"), ("coordinator --config", "coordinator")] {
        let said = killed(
            &workspace,
            victim,
            &format!("{out}/checkpoint-20"),
            &["--set", &format!("output_dir={out}")],
        );
        let line = said.lines().find(|line| line.starts_with("restart  1 of 3: ")).unwrap_or_default();
        assert!(
            line.contains("killed by signal 9") && line.contains("; going on from checkpoint-"),
            "{said}"
        );
        assert!(said.contains("restarts 1, the last one after: "), "{said}");
        same(&workspace, "whole", out);
    }
}

#[test]
fn a_run_that_is_killed_before_its_first_checkpoint_begins_anew() {
    let workspace = Workspace::with_model(16, "max_steps = 150\n");
    workspace.train(2, "whole", &[]);
    let said = killed(&workspace, "node0-cpu", "out/metrics.jsonl", &[]);
    assert!(said.contains("; there is no checkpoint yet, so it begins anew"), "{said}");
    same(&workspace, "whole", "out");
}

/// It must not resume from the checkpoints that it should remove.
#[test]
fn a_killed_overwriting_run_does_not_resume_from_the_old_checkpoints() {
    let workspace = Workspace::with_model(16, "max_steps = 100\nn_checkpoints = 2\n");
    workspace.train(2, "whole", &["--set", "random_seed=1"]);
    workspace.train(2, "out", &[]);
    let run_once = workspace.path("out/logs/node0-cpu.log");
    fs::remove_file(run_once).unwrap();
    let overwrite = ["--overwrite", "--set", "random_seed=1"];
    // The process has started, but has probably not written a row.
    killed(&workspace, "node0-cpu", "out/logs/node0-cpu.log", &overwrite);
    same(&workspace, "whole", "out");
}

/// A requeued job runs the same command as at its first start. It must resume its own run and no other.
#[test]
fn a_requeued_job_resumes_only_its_own_run() {
    let workspace = Workspace::with_model(16, "max_steps = 6\nn_checkpoints = 3\n");
    workspace.train(1, "whole", &["--set", "random_seed=1"]);
    workspace.train(1, "out", &[]);
    let weights = |dir: &str| fs::read(workspace.path(&format!("{dir}/final/model.safetensors"))).unwrap();
    let job = |id: &str, more: &[&str]| {
        let output =
            workspace.launch(1, &[&["--auto-resume", "--job", id, "--set", "random_seed=1"], more].concat());
        (output.status.code(), text(&output))
    };
    // The run in the folder belongs to another job, also after this job's first start was refused.
    let (status, said) = job("c/7", &[]);
    assert!(status == Some(2) && said.contains("already holds a run"), "{said}");
    let (status, said) = job("c/7", &["--overwrite"]);
    assert!(status == Some(0) && !said.contains("resumed"), "{said}");
    assert!(weights("whole") == weights("out"));
    // The run is complete, and the job is queued again.
    let written = || fs::metadata(workspace.path("out/final/model.safetensors")).unwrap().modified().unwrap();
    let before = written();
    let (status, said) = job("c/7", &["--overwrite"]);
    assert!(status == Some(0) && said.contains("this run is complete: "), "{said}");
    assert_eq!(written(), before);
    // The run is interrupted.
    fs::remove_dir_all(workspace.path("out/final")).unwrap();
    let (status, said) = job("c/7", &["--overwrite"]);
    assert!(status == Some(0) && said.contains("resumed after step "), "{said}");
    same(&workspace, "whole", "out");
    // Another job starts a new run.
    let (status, said) = job("c/8", &["--overwrite"]);
    assert!(status == Some(0) && !said.contains("resumed") && !said.contains("complete: "), "{said}");
    let (status, said) = job("c/7", &[]);
    assert!(status == Some(2) && said.contains("already holds a run"), "{said}");
    let output = workspace.launch(1, &["--auto-resume", "--overwrite"]);
    assert!(output.status.code() == Some(2) && text(&output).contains("needs --job"), "{}", text(&output));
}

#[test]
fn a_permanent_failure_is_not_restarted() {
    let workspace = Workspace::with_model(16, "");
    let args = ["--max-restarts", "3", "--set", "max_seq_length=3"];
    let output = workspace.launch(2, &args);
    let said = text(&output);
    assert!(output.status.code() == Some(2) && !said.contains("restart"), "{said}");
}
