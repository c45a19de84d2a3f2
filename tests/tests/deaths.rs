//! Whoever is killed, everything stops, nothing is left, and the error names who died.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::Read;
use std::process::{Child, Stdio};

use dyad_tests::Workspace;
use dyad_tests::processes::{Process, Watch, children, interrupt, kill_9, wait_for};

/// A run that would go on for a long time, with its processes, once it has done a step.
fn long_run(workspace: &Workspace) -> (Child, Vec<Process>) {
    let mut command = workspace.launcher(2, &["--set", "max_steps=100000"]);
    let launcher = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    wait_for("the first step", || {
        std::fs::read_to_string(workspace.path("out/metrics.jsonl")).ok().filter(|text| text.contains('\n'))
    });
    let processes = children(&launcher);
    assert_eq!(processes.len(), 3, "{processes:?}");
    (launcher, processes)
}

fn find<'a>(processes: &'a [Process], part: &str) -> &'a Process {
    processes.iter().find(|process| process.command.contains(part)).unwrap()
}

/// Ends of all processes, then the launcher's status and what it wrote to standard error.
fn outcome(mut launcher: Child, watches: &[Watch]) -> (Option<i32>, String) {
    let mut error = String::new();
    launcher.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    let status = launcher.wait().unwrap();
    watches.iter().for_each(Watch::wait_gone);
    (status.code(), error)
}

fn watch(processes: &[Process]) -> Vec<Watch> {
    processes.iter().map(Watch::on).collect()
}

#[test]
fn a_killed_trainer_stops_the_run_and_is_named() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    kill_9(find(&processes, "node1-cpu").pid);
    let (status, error) = outcome(launcher, &watches);
    assert_eq!(status, Some(1), "{error}");
    let line = error.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(line.contains("trainer rank 1 (node1-cpu)") && line.contains("died"), "{error}");
    assert_eq!(error.matches("error: ").count(), 1, "{error}");
}

#[test]
fn a_killed_coordinator_stops_the_run_and_is_named() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    kill_9(find(&processes, "coordinator --config").pid);
    let (status, error) = outcome(launcher, &watches);
    assert_eq!(status, Some(1), "{error}");
    let line = error.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(line.contains("coordinator") && line.contains("died"), "{error}");
    assert_eq!(error.matches("error: ").count(), 1, "{error}");
}

#[test]
fn a_killed_launcher_leaves_nothing_behind() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    kill_9(launcher.id() as i32);
    assert_eq!(outcome(launcher, &watches).0, None);
}

#[test]
fn ctrl_c_stops_the_run_in_good_order() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    interrupt(launcher.id() as i32);
    let (status, error) = outcome(launcher, &watches);
    assert_eq!(status, Some(130), "{error}");
}
