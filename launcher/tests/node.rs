//! Tests of `launcher node` with scripts instead of trainers.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

struct Stage {
    dir: tempfile::TempDir,
    /// A listener instead of a coordinator.
    coordinator: TcpListener,
}

impl Stage {
    fn new(trainer: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer");
        std::fs::write(&path, format!("#!/bin/bash\n{trainer}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, coordinator: TcpListener::bind("127.0.0.1:0").unwrap() }
    }

    fn node(&self, args: &[&str]) -> Command {
        let url = format!("http://{}", self.coordinator.local_addr().unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
        command.current_dir(self.dir.path()).env("DYAD_BIN_DIR", self.dir.path());
        command.args(["node", "--gpus", "0", "--coordinator", &url]).args(args);
        command.stderr(Stdio::piped());
        command
    }

    /// Exit status and standard error of `launcher node`.
    fn outcome(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.node(args).env("JOB_COMPLETION_INDEX", "3").output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

fn signal(child: &std::process::Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn the_completion_index_is_the_node_index() {
    let stage = Stage::new("echo \"$@\" >&2; exit 0");
    let (status, text) = stage.outcome(&["--logs", "logs"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("[rank 3] run --coordinator http://127.0.0.1:"), "{text}");
    assert!(text.contains("--name node3-cpu --launch-index 3 --device cpu"), "{text}");
    let log = std::fs::read_to_string(stage.dir.path().join("logs/node3-cpu.log")).unwrap();
    assert!(log.starts_with("run --coordinator"), "{log}");
}

#[test]
fn the_node_ends_with_its_trainers_status_and_error() {
    let cases = [
        (
            "echo 'error: no model' >&2; echo 'hint: mend it' >&2; exit 2",
            2,
            "trainer rank 3 (node3-cpu): no model",
        ),
        ("echo 'error: rank 1 died' >&2; exit 4", 4, "rank 1 died"),
        ("echo 'error: gone' >&2; exit 3", 3, "trainer rank 3 (node3-cpu): gone"),
        ("exit 3", 3, "died: exit status 3"),
        ("exit 4", 4, "stopped because another process failed"),
        ("kill -9 $$", 1, "error: trainer rank 3 (node3-cpu) died: killed by signal 9"),
    ];
    for (script, status, words) in cases {
        let (found, text) = Stage::new(script).outcome(&[]);
        assert!(found == Some(status) && text.contains(words), "{script}: {found:?} {text}");
        assert_eq!(text.matches("error: ").count(), 1, "{text}");
    }
}

#[test]
fn sigterm_lets_trainers_finish_and_ends_with_130() {
    let stage = Stage::new("trap 'echo saved >&2; echo \"error: stopped\" >&2; exit 130' TERM; echo ready >&2; mkfifo f; exec 3<>f
while :; do read -r -u 3; done");
    let mut node = stage.node(&["--node-index", "0"]).spawn().unwrap();
    let mut lines = BufReader::new(node.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line == "[rank 0] ready"));
    signal(&node, "-TERM");
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line == "[rank 0] saved"), "{rest:?}");
    assert_eq!(node.wait().unwrap().code(), Some(130), "{rest:?}");
}

#[test]
fn trainers_that_do_not_leave_are_killed_after_the_grace_period() {
    let stage =
        Stage::new("trap '' TERM; echo ready >&2; mkfifo f; exec 3<>f; while :; do read -r -u 3; done");
    let mut node = stage.node(&["--node-index", "0", "--grace-period", "1"]).spawn().unwrap();
    let mut error = BufReader::new(node.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert!(error.read_line(&mut line).unwrap() > 0);
    }
    signal(&node, "-TERM");
    let mut rest = String::new();
    error.read_to_string(&mut rest).unwrap();
    assert_eq!(node.wait().unwrap().code(), Some(1), "{rest}");
    assert!(rest.contains("trainers have 1 s") && rest.contains("killed by signal 9"), "{rest}");
}

/// A coordinator with TLS warns of every connection without a handshake. So only the trainers connect, and they wait for it themselves.
#[test]
fn the_node_itself_never_connects_to_the_coordinator() {
    let stage = Stage::new("echo \"$@\" >&2; exit 0");
    let (status, text) = stage.outcome(&["--wait-for-coordinator", "7"]);
    assert!(status == Some(0) && text.contains(" --connect-timeout 7 "), "{text}");
    stage.coordinator.set_nonblocking(true).unwrap();
    let knocked = stage.coordinator.accept().map(|(_, peer)| peer);
    assert_eq!(knocked.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn the_hint_names_a_log_only_if_there_is_one() {
    let stage = Stage::new("exit 1");
    let (_, text) = stage.outcome(&["--logs", "logs"]);
    assert!(text.contains("hint: its log is logs/node3-cpu.log"), "{text}");
    let (_, text) = stage.outcome(&[]);
    assert!(text.contains("died: exit status 1") && !text.contains("hint: "), "{text}");
}

#[test]
fn a_node_without_index_is_refused() {
    let output = Stage::new("exit 0").node(&[]).env_remove("JOB_COMPLETION_INDEX").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--node-index"));
}
