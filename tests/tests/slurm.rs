//! Slurm, with `srun`, `sbatch` and `scontrol` of our own that run what they are given on this machine: no real Slurm is here.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use dyad_tests::processes::{Process, Watch, wait_for};
use dyad_tests::{Workspace, binary, text};

/// Starts the command after srun's own options, and writes down on which node.
const SRUN: &str = r#"#!/bin/sh
while :; do
  case $1 in
    --nodelist=*) echo "${1#--nodelist=}" >> "$SRUN_NODES" ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
exec "$@"
"#;

/// Keeps the script.
const SBATCH: &str = "#!/bin/sh\ncat > script\necho Submitted batch job 7\n";
const SCONTROL: &str = "#!/bin/sh\necho \"$@\" >> requeued\n";

fn cluster(config: &str) -> Workspace {
    let workspace = Workspace::with_model(16, config);
    std::fs::create_dir(workspace.path("bin")).unwrap();
    for (name, script) in [("srun", SRUN), ("sbatch", SBATCH), ("scontrol", SCONTROL)] {
        workspace.write(&format!("bin/{name}"), script);
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(workspace.path(&format!("bin/{name}")), executable).unwrap();
    }
    workspace
}

/// A command as in a job of two nodes.
fn in_job(workspace: &Workspace, mut command: Command) -> Command {
    let path = format!("{}:{}", workspace.path("bin").display(), std::env::var("PATH").unwrap());
    command.current_dir(workspace.path(".")).env("PATH", path).env("SRUN_NODES", workspace.path("nodes"));
    command.env("SLURM_JOB_ID", "7").env("SLURM_JOB_NODELIST", "n[08-09]").stdin(Stdio::null());
    command
}

#[test]
fn a_run_in_an_allocation_goes_to_its_nodes_by_srun() {
    let workspace = cluster("");
    let mut command = Command::new(binary("launcher"));
    command.args(["--config", "run.toml", "--listen", "127.0.0.1:0"]);
    let output = in_job(&workspace, command).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let mut nodes: Vec<String> =
        std::fs::read_to_string(workspace.path("nodes")).unwrap().lines().map(str::to_owned).collect();
    nodes.sort();
    assert_eq!(nodes, ["n08", "n09"]);
    assert!(
        workspace.path("out/logs/n08-cpu.log").exists() && workspace.path("out/logs/n09-cpu.log").exists()
    );
    assert!(workspace.path("out/final/model.safetensors").exists());
}

#[test]
fn a_batch_job_saves_before_its_time_is_up_is_queued_again_and_resumes() {
    let workspace = cluster("max_steps = 100000\n");
    let mut command = Command::new(binary("launcher"));
    command.args(["slurm", "--nodes", "2", "--config", "run.toml", "--time", "1:00:00", "--submit"]);
    command.args(["--", "--listen", "127.0.0.1:0"]);
    let output = in_job(&workspace, command).output().unwrap();
    assert_eq!(text(&output), "Submitted batch job 7\n");

    let mut command = Command::new("bash");
    command.arg("script").stdout(Stdio::null()).stderr(Stdio::piped());
    let job = in_job(&workspace, command).spawn().unwrap();
    wait_for("the first step", || {
        std::fs::read_to_string(workspace.path("out/metrics.jsonl")).ok().filter(|text| text.contains('\n'))
    });
    let watch = Watch::on(&Process { pid: job.id() as i32, command: "bash script".into() });
    // As --signal=B:USR1 does it: to the script alone.
    assert!(Command::new("kill").args(["-USR1", &job.id().to_string()]).status().unwrap().success());
    let output = job.wait_with_output().unwrap();
    watch.wait_gone();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert_eq!(std::fs::read_to_string(workspace.path("requeued")).unwrap(), "requeue 7\n");
    let steps = workspace.rows("out/metrics.jsonl").len();
    assert!(workspace.path(&format!("out/checkpoint-{steps}")).is_dir(), "{}", text(&output));

    let config = std::fs::read_to_string(workspace.path("run.toml")).unwrap();
    workspace.write("run.toml", &config.replace("100000", &(steps + 1).to_string()));
    let mut command = Command::new("bash");
    command.arg("script").env("SLURM_RESTART_COUNT", "1");
    let output = in_job(&workspace, command).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), steps + 1);
}

#[test]
fn what_sbatch_refuses_is_told() {
    let workspace = cluster("");
    workspace.write("bin/sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n");
    let mut command = Command::new(binary("launcher"));
    command.args(["slurm", "--nodes", "2", "--config", "run.toml", "--partition", "x", "--submit"]);
    let output = in_job(&workspace, command).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output).contains("error: sbatch refuses the job: sbatch: error: invalid partition"),
        "{}",
        text(&output)
    );
}
