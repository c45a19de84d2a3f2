//! Whoever is killed, everything stops, nothing is left, and the error names who died.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

use dyad_tests::processes::{Process, Watch, children, interrupt, kill_9, wait_for};
use dyad_tests::{Workspace, binary, text};

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
    killed_trainer_is_named("");
}

/// Every layer of the others waits for its part of the weights.
#[test]
fn a_killed_trainer_is_named_where_weights_are_sharded() {
    killed_trainer_is_named("zero_stage = 3\n");
}

fn killed_trainer_is_named(config: &str) {
    let workspace = Workspace::with_model(16, config);
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

/// For example because libtorch is not where it was.
#[test]
fn a_trainer_that_cannot_start_is_named() {
    let workspace = Workspace::with_model(16, "");
    std::os::unix::fs::symlink(binary("coordinator"), workspace.path("coordinator")).unwrap();
    workspace.write("trainer", "#!/bin/sh\necho 'cannot open shared object file' >&2\nexit 127\n");
    std::fs::set_permissions(workspace.path("trainer"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = workspace.launcher(2, &[]).env("DYAD_BIN_DIR", workspace.path(".")).output().unwrap();
    let error = text(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    let named = ["node0-cpu", "node1-cpu"].iter().enumerate().any(|(rank, name)| {
        let line = format!("error: trainer rank {rank} ({name}) died: exit status 127");
        let hint = format!("hint: its log is {name}.log in output_dir/logs");
        error.lines().any(|it| it == line) && error.lines().any(|it| it == hint)
    });
    assert!(named && error.matches("error: ").count() == 1, "{error}");
    let log = std::fs::read_to_string(workspace.path("out/logs/node0-cpu.log")).unwrap();
    assert!(log.contains("cannot open shared object file"), "{log}");
}

#[test]
fn a_killed_launcher_leaves_nothing_behind() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    kill_9(launcher.id() as i32);
    assert_eq!(outcome(launcher, &watches).0, None);
}

/// A launcher whose run is complete and that waits for sample answers which never come, and the process it waits for.
fn stuck_at_samples(workspace: &Workspace) -> (Child, Watch) {
    std::os::unix::fs::symlink(binary("coordinator"), workspace.path("coordinator")).unwrap();
    let real = binary("trainer");
    let stuck = "exec sleep infinity";
    workspace.write(
        "trainer",
        &format!("#!/bin/sh\ncase $1 in generate) {stuck} ;; *) exec {} \"$@\" ;; esac\n", real.display()),
    );
    std::fs::set_permissions(workspace.path("trainer"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let args = ["--set", "max_steps=1", "--set", "validation_file=pairs.jsonl", "--samples", "1"];
    let mut command = workspace.launcher(1, &args);
    command.env("DYAD_BIN_DIR", workspace.path(".")).stderr(Stdio::piped()).stdout(Stdio::null());
    let launcher = command.spawn().unwrap();
    let sampler = wait_for("the sampling process", || {
        children(&launcher).into_iter().find(|process| process.command.starts_with("sleep"))
    });
    (launcher, Watch::on(&sampler))
}

#[test]
fn ctrl_c_ends_the_sampling_after_a_run() {
    let workspace = Workspace::with_model(8, "");
    let (launcher, sampler) = stuck_at_samples(&workspace);
    interrupt(launcher.id() as i32);
    let (status, error) = outcome(launcher, &[sampler]);
    assert_eq!(status, Some(130), "{error}");
    let hint = format!("hint: the model lies in {}", workspace.path("out/final").display());
    assert!(error.lines().any(|line| line == hint), "{error}");
    assert!(workspace.path("out/final/model.safetensors").exists());
}

#[test]
fn a_launcher_killed_while_sampling_leaves_nothing_behind() {
    let workspace = Workspace::with_model(8, "");
    let (launcher, sampler) = stuck_at_samples(&workspace);
    kill_9(launcher.id() as i32);
    assert_eq!(outcome(launcher, &[sampler]).0, None);
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
