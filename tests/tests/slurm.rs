//! Runs on a Slurm of two nodes: Debian's own slurmctld and slurmd. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::Path;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use dyad_tests::processes::wait_for;
use dyad_tests::slurm::Slurm;
use dyad_tests::{Workspace, binary, text};

/// Submits a long run. Returns the job's number once the run has done a step.
fn long_job(slurm: &Slurm, workspace: &Workspace) -> String {
    let mut command = slurm.command(&binary("launcher").display().to_string());
    command.current_dir(workspace.path(".")).stdin(Stdio::null());
    command.args([
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--config",
        "run.toml",
        "--time",
        "1:00:00",
        "--submit",
    ]);
    // Both nodes are this machine, so TLS would be off by default.
    let output = command.args(["--", "--listen", "127.0.0.1:0", "--tls", "on"]).output().unwrap();
    let said = text(&output);
    let job = said.trim().strip_prefix("Submitted batch job ").unwrap_or_else(|| panic!("{said}")).to_owned();
    wait_for("the first step", || {
        let log = || std::fs::read_to_string(workspace.path(&format!("dyad-{job}.log"))).unwrap_or_default();
        assert!(!log().contains("error: "), "{}", log());
        (workspace.steps_so_far() > 0).then_some(())
    });
    let coordinators = coordinators_of_trainers(&workspace.path("."));
    assert!(
        coordinators.len() == 2 && coordinators.iter().all(|url| url.starts_with("https://")),
        "{coordinators:?}"
    );
    job
}

/// Returns the coordinator addresses of the trainers that run in this folder.
fn coordinators_of_trainers(folder: &Path) -> Vec<String> {
    let folder = folder.canonicalize().unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let here =
        processes.filter(|process| std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == folder));
    here.filter_map(|process| {
        let words = std::fs::read_to_string(process.join("cmdline")).ok()?;
        let words: Vec<&str> = words.split('\0').collect();
        let after = |flag: &str| words.iter().skip_while(|word| **word != flag).nth(1);
        after("--launch-index").and(after("--coordinator")).map(|url| (*url).to_owned())
    })
    .collect()
}

#[test]
fn a_run_in_an_allocation_goes_to_its_nodes_by_srun() {
    let (workspace, slurm) = (Workspace::with_model(16, ""), Slurm::start());
    let mut command = slurm.command("salloc");
    command.current_dir(workspace.path(".")).stdin(Stdio::null()).args(["--quiet", "--nodes=2"]);
    command.arg(binary("launcher")).args(["--config", "run.toml", "--listen", "127.0.0.1:0"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    for name in ["n1", "n2"] {
        assert!(workspace.path(&format!("out/logs/{name}-cpu.log")).exists(), "{}", text(&output));
    }
    assert!(workspace.path("out/final/model.safetensors").exists());
}

#[test]
fn a_batch_job_saves_before_its_time_limit_and_resumes_when_requeued() {
    let (workspace, slurm) = (Workspace::with_model(16, "max_steps = 100000\n"), Slurm::start());
    let job = long_job(&slurm, &workspace);
    // As --signal=B:USR1@300 does before the time limit: only the script gets the signal.
    assert!(slurm.command("scancel").args(["--batch", "--signal=USR1", &job]).status().unwrap().success());
    wait_for("the job back in the queue", || (slurm.state(&job) == "PENDING").then_some(()));
    let steps = workspace.rows("out/metrics.jsonl").len();
    assert!(workspace.path(&format!("out/checkpoint-{steps}")).is_dir());

    let config = std::fs::read_to_string(workspace.path("run.toml")).unwrap();
    workspace.write("run.toml", &config.replace("100000", &(steps + 1).to_string()));
    // Slurm itself would wait two minutes. Nodes refuse a job in the same second in which its first attempt ended.
    let ended = unix_seconds();
    wait_for("the second after", || (unix_seconds() > ended).then_some(()));
    let update = format!("JobId={job}");
    assert!(slurm.command("scontrol").args(["update", &update, "StartTime=now"]).status().unwrap().success());
    let end = wait_for("the end of the job", || slurm.end(&job));
    let log = std::fs::read_to_string(workspace.path(&format!("dyad-{job}.log"))).unwrap();
    assert_eq!(end, "COMPLETED", "{log}\n{}", slurm.logs());
    assert!(log.contains(&format!("resumed after step {steps}")), "{log}");
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), steps + 1);
    assert!(workspace.path("out/final/model.safetensors").exists());
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn a_cancelled_job_leaves_a_checkpoint() {
    let (workspace, slurm) = (Workspace::with_model(16, "max_steps = 100000\n"), Slurm::start());
    let job = long_job(&slurm, &workspace);
    assert!(slurm.command("scancel").arg(&job).status().unwrap().success());
    assert_eq!(wait_for("the end of the job", || slurm.end(&job)), "CANCELLED");
    let steps = workspace.rows("out/metrics.jsonl").len();
    let log = std::fs::read_to_string(workspace.path(&format!("dyad-{job}.log"))).unwrap();
    assert!(workspace.path(&format!("out/checkpoint-{steps}")).is_dir(), "{log}");
}

#[test]
fn a_refusal_by_sbatch_is_reported() {
    let (workspace, slurm) = (Workspace::with_model(16, ""), Slurm::start());
    let mut command = slurm.command(&binary("launcher").display().to_string());
    command.current_dir(workspace.path(".")).args([
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--config",
        "run.toml",
    ]);
    let output = command.args(["--partition", "nowhere", "--submit"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).starts_with("error: sbatch refuses the job: "), "{}", text(&output));
    assert!(text(&output).contains("invalid partition"), "{}", text(&output));
}
