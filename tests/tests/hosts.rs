//! Runs on four hosts: network namespaces with an address and an sshd each. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use dyad_tests::cluster::{Cluster, NAMES};
use dyad_tests::processes::{interrupt, kill_9, outcome, wait_for};
use dyad_tests::{CURVE, Workspace, assert_same_curve, number, text};

/// Four hosts with a shared folder.
struct Stage {
    workspace: Workspace,
    cluster: Cluster,
    hostfile: String,
}

impl Stage {
    fn new() -> Self {
        let (workspace, cluster) = (Workspace::with_model(64, ""), Cluster::start());
        let hostfile = cluster.hostfile().display().to_string();
        Self { workspace, cluster, hostfile }
    }

    fn launcher(&self, args: &[&str]) -> Command {
        let common =
            ["--nodes", "4", "--hostfile", &self.hostfile, "--config", "run.toml", "--host-timeout", "6"];
        let mut command = self.cluster.launcher(&[&common, args].concat());
        // Most tests check how a run ends; a restart would hide that.
        if !args.contains(&"--max-restarts") {
            command.args(["--max-restarts", "0"]);
        }
        command.current_dir(self.workspace.path("."));
        command
    }

    fn launch(&self, args: &[&str]) -> Output {
        self.launcher(args).output().unwrap()
    }

    /// Starts a long run. Returns it once it has written a checkpoint.
    fn long_run(&self, output_dir: &str, args: &[&str]) -> Child {
        let target = format!("output_dir={output_dir}");
        let endless = ["--set", "max_steps=100000", "--set", "n_checkpoints=50000", "--set", &target];
        let mut command = self.launcher(&[&endless, args].concat());
        let mut launcher = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let dir = self.workspace.path(output_dir);
        wait_for("a checkpoint", || {
            if launcher.try_wait().unwrap().is_some() {
                panic!("the launcher ended: {:?}", outcome(&mut launcher));
            }
            newest_checkpoint(&dir)
        });
        launcher
    }

    /// Returns the key folder of each trainer, and checks that trainers use TLS and that only the owner can read the keys.
    fn key_folders(&self) -> Vec<PathBuf> {
        let mut folders = Vec::new();
        for (_, trainer) in self.cluster.processes() {
            if !trainer.command.contains("--launch-index") {
                continue;
            }
            assert!(trainer.command.contains("--coordinator https://10.78.0."), "{trainer:?}");
            let environment = std::fs::read(format!("/proc/{}/environ", trainer.pid)).unwrap();
            let environment = String::from_utf8_lossy(&environment).into_owned();
            let mut variables = environment.split('\0');
            let folder =
                PathBuf::from(variables.find_map(|text| text.strip_prefix("DYAD_TLS_DIR=")).unwrap());
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(folder.parent().unwrap()), mode(&folder.join("key.pem"))), (0o700, 0o600));
            folders.push(folder);
        }
        folders
    }

    fn nothing_is_left(&self) {
        let left = std::cell::RefCell::new(Vec::new());
        wait_for("an end of all processes", || {
            left.replace(self.cluster.processes());
            left.borrow().is_empty().then_some(())
        });
    }
}

fn newest_checkpoint(dir: &Path) -> Option<u64> {
    let names =
        std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter_map(|name| name.strip_prefix("checkpoint-")?.parse().ok()).max()
}

#[test]
fn four_hosts_compute_what_one_machine_computes() {
    let stage = Stage::new();
    let here = stage.workspace.train(4, "here", &[]);
    let output = stage.launch(&["--set", "output_dir=there", "--env", "DYAD_LOG=debug"]);
    assert!(output.status.success(), "{}", text(&output));
    let there = stage.workspace.rows("there/metrics.jsonl");
    // Sums over threads and over the network are added in another order.
    assert_same_curve(&here, &there, &CURVE, 1e-5);
    for name in NAMES {
        let log =
            std::fs::read_to_string(stage.workspace.path(&format!("there/logs/{name}-cpu.log"))).unwrap();
        assert!(log.contains("joined") && log.contains("DEBUG"), "--env reaches the trainer: {log}");
    }
    let coordinator = std::fs::read_to_string(stage.workspace.path("there/logs/coordinator.log")).unwrap();
    assert!(coordinator.contains("trainer joined"), "{coordinator}");
    stage.nothing_is_left();

    // The host that has the folder refuses a second run in it.
    let output = stage.launch(&["--set", "output_dir=there"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(
        text(&output).contains("host a: output_dir") && text(&output).contains("already holds a run"),
        "{}",
        text(&output)
    );
    stage.nothing_is_left();
}

#[test]
fn a_host_that_is_cut_off_is_named_and_the_run_can_resume() {
    let stage = Stage::new();
    let mut launcher = stage.long_run("cut", &[]);
    stage.cluster.link("c", "down");
    let (status, error) = outcome(&mut launcher);
    assert_eq!(status, Some(1), "{error}");
    let line = error.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert_eq!(line, "error: trainer rank 2 (c-cpu): host c is cut off: no answer for 6 s", "{error}");
    assert!(error.contains("last lines of trainer rank 2 (c-cpu):"), "{error}");
    assert!(error.lines().any(|line| line.starts_with("hint: ") && line.contains("--resume")), "{error}");
    // Also on the host that is cut off.
    stage.nothing_is_left();

    let doctor = stage.cluster.launcher(&["doctor", "--hostfile", &stage.hostfile]).output().unwrap();
    assert_eq!(doctor.status.code(), Some(3), "{}", text(&doctor));
    assert!(
        text(&doctor).contains("ssh          FAIL  host c cannot be reached over ssh: "),
        "{}",
        text(&doctor)
    );

    stage.cluster.link("c", "up");
    let done = newest_checkpoint(&stage.workspace.path("cut")).unwrap();
    let last = format!("max_steps={}", done + 2);
    let output = stage.launch(&["--resume", "--set", "output_dir=cut", "--set", &last]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains(&format!("resumed after step {done}")), "{}", text(&output));
    let steps: Vec<u64> =
        stage.workspace.rows("cut/metrics.jsonl").iter().map(|row| number(row, "step") as u64).collect();
    assert_eq!(steps, (1..=done + 2).collect::<Vec<u64>>(), "resumed after {done}");
    stage.nothing_is_left();
}

#[test]
fn a_run_that_loses_a_host_waits_for_it_and_goes_on() {
    let stage = Stage::new();
    let mut launcher = stage.long_run("back", &["--max-restarts", "1"]);
    stage.cluster.link("c", "down");
    let mut lines = BufReader::new(launcher.stderr.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find(|line| line.starts_with("restart  ")).unwrap();
    assert!(line.starts_with("restart  1 of 1: trainer rank 2 (c-cpu): host c is cut off"), "{line}");
    stage.cluster.link("c", "up");
    assert!(lines.any(|line| line.contains("resumed after step ")));
    interrupt(launcher.id() as i32);
    let rest: Vec<String> = lines.collect();
    assert_eq!(launcher.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(
        rest.iter().any(|line| line.starts_with("stopped  by SIGINT") && line.contains("(after 1 restart)")),
        "{rest:?}"
    );
    stage.nothing_is_left();
}

#[test]
fn a_killed_launcher_leaves_nothing_on_any_host_and_ctrl_c_a_checkpoint() {
    let stage = Stage::new();
    let mut launcher = stage.long_run("killed", &[]);
    let keys = stage.key_folders();
    assert_eq!(keys.len(), 4);
    kill_9(launcher.id() as i32);
    assert_eq!(outcome(&mut launcher).0, None);
    stage.nothing_is_left();
    assert!(keys.iter().all(|folder| !folder.exists()), "{keys:?}");

    let mut launcher = stage.long_run("stopped", &["--coordinator-on", "here"]);
    let keys = stage.key_folders();
    interrupt(launcher.id() as i32);
    let (status, error) = outcome(&mut launcher);
    assert_eq!(status, Some(130), "{error}");
    let steps = stage.workspace.rows("stopped/metrics.jsonl").len() as u64;
    assert_eq!(newest_checkpoint(&stage.workspace.path("stopped")), Some(steps), "{error}");
    stage.nothing_is_left();
    assert!(keys.iter().all(|folder| !folder.exists()), "{keys:?}");
}

#[test]
fn doctor_passes_four_hosts_and_reports_a_broken_model() {
    let stage = Stage::new();
    let doctor = |args: &[&str]| {
        let common = ["doctor", "--hostfile", &stage.hostfile, "--config", "run.toml"];
        let mut command = stage.cluster.launcher(&[&common, args].concat());
        command.current_dir(stage.workspace.path(".")).output().unwrap()
    };
    let output = doctor(&[]);
    let table = text(&output);
    assert!(output.status.success(), "{table}");
    for row in [
        "ssh          ok    4 hosts answer",
        "network      ok    every host reaches every other",
        "coordinator  ok    would listen on 10.78.0.1 (eth0)",
    ] {
        assert!(table.contains(row), "{table}");
    }
    std::fs::remove_file(stage.workspace.path("model/tokenizer.json")).unwrap();
    let output = doctor(&[]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("model        FAIL  no tokenizer.json in "), "{}", text(&output));
    stage.nothing_is_left();
}
