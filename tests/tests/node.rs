//! Nodes as a scheduler starts them: a coordinator and one `launcher node` per node, as separate processes.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dyad_tests::processes::wait_for;
use dyad_tests::tools::free_port;
use dyad_tests::{Workspace, binary};
use launcher::security::{Material, RunSecrets, TLS_DIR};

fn coordinator(workspace: &Workspace, port: u16) -> Command {
    let mut command = Command::new(binary("coordinator"));
    command.current_dir(workspace.path("")).args(["--config", "run.toml", "--world-size", "2"]);
    command.args([
        "--listen",
        &format!("127.0.0.1:{port}"),
        "--auto-resume",
        "--tell-trainers",
        "--print-events",
    ]);
    command.stdout(Stdio::piped());
    command
}

fn node(workspace: &Workspace, port: u16, index: &str) -> Child {
    node_at(workspace, &format!("http://127.0.0.1:{port}"), index).spawn().unwrap()
}

fn node_at(workspace: &Workspace, url: &str, index: &str) -> Command {
    let mut command = Command::new(binary("launcher"));
    command.current_dir(workspace.path("")).args(["node", "--gpus", "0", "--logs", "out/logs"]);
    command.args(["--coordinator", url]);
    command.env("JOB_COMPLETION_INDEX", index).stderr(Stdio::piped());
    command
}

#[test]
fn nodes_that_start_before_their_coordinator_train_with_it() {
    let workspace = Workspace::with_model(16, "max_steps = 3\n");
    let port = free_port();
    let nodes = ["0", "1"].map(|index| node(&workspace, port, index));
    let coordinator = coordinator(&workspace, port).spawn().unwrap();
    for node in nodes {
        let output = node.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let output = coordinator.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 3);
    assert!(workspace.path("out/final/model.safetensors").is_file());
    assert!(workspace.path("out/logs/node1-cpu.log").is_file());
    let events: Vec<&str> = text.lines().filter(|line| line.starts_with("{\"body\":")).collect();
    assert_eq!(events.iter().filter(|line| line.starts_with("{\"body\":{\"step\":")).count(), 3, "{text}");
    assert_eq!(events.last(), Some(&"{\"body\":{\"ended\":{\"failure\":null}}}"), "{text}");
}

/// As when a workload is applied again on the volume of a complete run.
#[test]
fn nodes_of_a_complete_run_are_told_so_and_succeed() {
    let workspace = Workspace::with_model(16, "max_steps = 2\n");
    let started = || {
        let port = free_port();
        let nodes = ["0", "1"].map(|index| node(&workspace, port, index));
        let mut coordinator = coordinator(&workspace, port);
        (nodes, coordinator.stderr(Stdio::piped()).spawn().unwrap())
    };
    for said_by_nodes in [" loaded", "this run is complete: there is nothing to do"] {
        let (nodes, coordinator) = started();
        for node in nodes {
            let output = node.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && said.contains(said_by_nodes), "{said}");
        }
        let output = coordinator.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains(" WARN "), "{said}");
        assert_eq!(workspace.rows("out/metrics.jsonl").len(), 2);
    }
}

/// A node that probed the port without TLS would cause a warning there.
#[test]
fn nodes_cause_no_warning_at_a_coordinator_with_tls() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let secrets = RunSecrets::new(Duration::from_secs(3600)).unwrap();
    let folder = |name: &str, material: Material| {
        material.write(&workspace.path(name)).unwrap();
        workspace.path(name)
    };
    let port = free_port();
    let mut coordinator = coordinator(&workspace, port);
    coordinator.env(TLS_DIR, folder("door", secrets.coordinator().unwrap())).stderr(Stdio::piped());
    let coordinator = coordinator.spawn().unwrap();
    let tls = folder("tls", secrets.trainer("trainers").unwrap());
    let url = format!("https://127.0.0.1:{port}");
    let nodes = ["0", "1"].map(|index| node_at(&workspace, &url, index).env(TLS_DIR, &tls).spawn().unwrap());
    for node in nodes {
        let output = node.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let output = coordinator.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && log.contains(" INFO ") && !log.contains(" WARN "), "{log}");
}

/// As a restarted JobSet does: the same command lines again, in the folder of the first attempt.
#[test]
fn a_run_whose_node_died_goes_on_from_its_checkpoint_when_started_again() {
    let workspace = Workspace::with_model(16, "max_steps = 30\nn_checkpoints = 10\n");
    let port = free_port();
    let (mut first, second) = (node(&workspace, port, "0"), node(&workspace, port, "1"));
    let mut early = coordinator(&workspace, port).spawn().unwrap();
    wait_for("a checkpoint", || {
        // A checkpoint under its final name is complete.
        let mut found = std::fs::read_dir(workspace.path("out")).ok()?.flatten();
        found.find(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-"))
    });
    // A node's trainers die with its launcher.
    first.kill().unwrap();
    assert_eq!(early.wait().unwrap().code(), Some(1));
    let output = second.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", String::from_utf8_lossy(&output.stderr));
    first.wait().unwrap();
    let again = coordinator(&workspace, port).spawn().unwrap();
    for node in ["0", "1"].map(|index| node(&workspace, port, index)) {
        let output = node.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(again.wait_with_output().unwrap().stdout).unwrap();
    let data = text.lines().find(|line| line.contains("\"data\":")).unwrap_or_default();
    assert!(!data.is_empty() && !data.contains("\"start_step\":0}"), "{text}");
    let rows = workspace.rows("out/metrics.jsonl");
    assert_eq!(rows.last().and_then(|row| row["step"].as_u64()), Some(30));
    assert_eq!(rows.len(), 30);
}
