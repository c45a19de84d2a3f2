//! How the launcher treats its children, with scripts in their place for ends that real ones do not come to easily.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    /// A folder with a run.toml that passes all checks, and the given scripts for coordinator and trainer.
    fn new(coordinator: &str, trainer: &str) -> Self {
        let stage = Self { dir: tempfile::tempdir().unwrap() };
        for (name, text) in [("coordinator", coordinator), ("trainer", trainer)] {
            let path = stage.path(name);
            std::fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        std::fs::create_dir(stage.path("model")).unwrap();
        std::fs::write(stage.path("model/config.json"), "{}").unwrap();
        std::fs::write(stage.path("pairs.jsonl"), "{}\n").unwrap();
        let config = "model = \"model\"\ntraining_file = \"pairs.jsonl\"\noutput_dir = \"out\"\n";
        std::fs::write(stage.path("run.toml"), config).unwrap();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn launcher(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
        command.current_dir(self.dir.path()).env("DYAD_BIN_DIR", self.dir.path());
        command.args(["--nodes", "1", "--gpus-per-node", "0", "--config", "run.toml"]);
        command
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_coordinator_that_refuses_is_quoted_once() {
    let stage = Stage::new(
        "echo 'error: pairs.jsonl line 1: bad' >&2; echo; echo 'hint: mend it' >&2; exit 2",
        "exit 0",
    );
    let output = stage.launcher().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stderr(&output).matches("pairs.jsonl line 1: bad").count(), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: mend it"));
}

#[test]
fn a_coordinator_that_dies_before_it_listens_is_named() {
    let stage = Stage::new("kill -9 $$", "exit 0");
    let output = stage.launcher().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("coordinator died: killed by signal 9"), "{}", stderr(&output));
    assert!(stderr(&output).contains("coordinator.log"), "{}", stderr(&output));
}

#[test]
fn a_missing_program_says_what_to_build() {
    let stage = Stage::new("exit 0", "exit 0");
    std::fs::remove_file(stage.path("coordinator")).unwrap();
    let output = stage.launcher().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("make build"), "{}", stderr(&output));
}

#[test]
fn a_dry_run_starts_no_program_and_makes_no_folder() {
    let stage = Stage::new("touch started", "touch started");
    let output = stage.launcher().arg("--dry-run").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stage.path("started").exists() && !stage.path("out").exists());
}

#[test]
fn a_second_ctrl_c_ends_processes_that_ignore_the_first() {
    // Never listens, never leaves; says when its trap is set.
    let stubborn =
        "trap '' TERM INT; echo ' WARN ready' >&2; while :; do read -t 1 < /dev/zero; sleep 1; done";
    let stage = Stage::new(stubborn, "exit 0");
    let mut launcher = stage.launcher().stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stderr.take().unwrap()).lines().map_while(Result::ok);
    let interrupt = || {
        let status = Command::new("kill").args(["-INT", &launcher.id().to_string()]).status().unwrap();
        assert!(status.success());
    };
    assert!(lines.any(|line| line.contains("ready")));
    interrupt();
    assert!(lines.any(|line| line.contains("Ctrl-C again")));
    interrupt();
    // Closed only when every child that holds it is gone.
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line == "error: interrupted"), "{rest:?}");
    assert_eq!(launcher.wait().unwrap().code(), Some(130));
}
