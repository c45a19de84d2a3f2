//! Stalls: a stalled process or thread is found and named although its connections and heartbeats are alive. A suspended run goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Child, Stdio};
use std::time::Duration;

use dyad_tests::processes::{self, Process, Watch, children, go_on, hold_thread, kill_9, stop, wait_for};
use dyad_tests::{Workspace, binary, text};

/// Starts a long run. Returns it and its processes once it has done a step.
fn long_run(workspace: &Workspace, args: &[&str]) -> (Child, Vec<Process>) {
    let mut command =
        workspace.launcher(2, &[&["--set", "max_steps=100000", "--max-restarts", "0"], args].concat());
    let launcher = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    workspace.wait_for_a_step();
    let processes = children(&launcher);
    assert_eq!(processes.len(), 3, "{processes:?}");
    (launcher, processes)
}

fn find<'a>(processes: &'a [Process], part: &str) -> &'a Process {
    processes.iter().find(|process| process.command.contains(part)).unwrap()
}

/// Waits until the run fails and all processes are gone. Returns its only error.
fn error_of(mut launcher: Child, processes: &[Process]) -> String {
    let watches: Vec<Watch> = processes.iter().map(Watch::on).collect();
    let (status, text) = processes::outcome(&mut launcher);
    watches.iter().for_each(Watch::wait_gone);
    assert_eq!(status, Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    errors[0].to_owned()
}

/// Meanwhile rank 0 waits in a collective and must not be blamed.
#[test]
fn a_stalled_compute_thread_is_named_with_its_last_collective() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace, &["--stall-timeout", "8"]);
    let trainer = find(&processes, "node1-cpu");
    let held = hold_thread(trainer.pid, None);
    let error = error_of(launcher, &processes);
    assert!(error.contains("trainer rank 1 (node1-cpu) on "), "{error}");
    assert!(
        error.contains(&format!("process {}, stands still although its heart beats", trainer.pid)),
        "{error}"
    );
    assert!(error.contains(" during training, step ") && error.contains("collective was all_"), "{error}");
    held.join().unwrap();
}

#[test]
fn a_stalled_tokenising_thread_is_found() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace, &["--stall-timeout", "8"]);
    let held = hold_thread(find(&processes, "node0-cpu").pid, Some("feed"));
    let error = error_of(launcher, &processes);
    assert!(error.contains("trainer rank 0 (node0-cpu) on ") && error.contains("stands still"), "{error}");
    assert!(error.contains("has not taken up the next work") || error.contains("tokenising"), "{error}");
    held.join().unwrap();
}

#[test]
fn a_suspended_coordinator_is_named_and_ended() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace, &["--stall-timeout", "8"]);
    stop(find(&processes, "coordinator --config").pid);
    let error = error_of(launcher, &processes);
    assert!(error.contains("coordinator") && error.contains("silent: no sign of life for 8 s"), "{error}");
}

/// Runs with a `program` that suspends itself at its start if its command line contains `word`. Returns the error.
fn stopped_at_its_start(workspace: &Workspace, program: &str, word: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let other = if program == "trainer" { "coordinator" } else { "trainer" };
    std::os::unix::fs::symlink(binary(other), workspace.path(other)).unwrap();
    let real = binary(program);
    let script =
        format!("#!/bin/sh\ncase \"$*\" in *{word}*) kill -STOP $$;; esac\nexec {} \"$@\"\n", real.display());
    workspace.write(program, &script);
    std::fs::set_permissions(workspace.path(program), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = workspace.launcher(2, &["--stall-timeout", "4"]);
    let output = command.env("DYAD_BIN_DIR", workspace.path(".")).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    said.lines().find(|line| line.starts_with("error: ")).unwrap().to_owned()
}

#[test]
fn a_coordinator_suspended_before_it_listens_is_named() {
    let error = stopped_at_its_start(&Workspace::with_model(16, ""), "coordinator", "--config");
    assert!(error.contains("coordinator on this machine is silent: no sign of life for 4 s"), "{error}");
}

#[test]
fn a_trainer_suspended_before_it_joins_is_named() {
    let error = stopped_at_its_start(&Workspace::with_model(16, ""), "trainer", "node1-cpu");
    let named = "trainer rank 1 (node1-cpu) on this machine is silent: it has not joined the run for 20 s";
    assert!(error.contains(named), "{error}");
}

/// A pipe that is neither written nor closed stands in for a hanging disk.
#[test]
fn a_coordinator_that_hangs_while_reading_names_the_file() {
    let mut coordinator = std::process::Command::new(binary("coordinator"));
    coordinator.args(["--config", "/dev/stdin", "--world-size", "1", "--stall-timeout", "1"]);
    let mut coordinator = coordinator.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Keep the pipe open.
    let _pipe = coordinator.stdin.take();
    let (status, text) = processes::outcome(&mut coordinator);
    assert_eq!(status, Some(1), "{text}");
    let named = "error: reading of /dev/stdin stands still: nothing was read for 1 s";
    assert!(text.contains(named) && text.contains("--stall-timeout"), "{text}");
}

/// The launcher's machine may be gone as well, so trainers must notice by themselves.
#[test]
fn trainers_leave_a_suspended_coordinator() {
    let workspace = Workspace::with_model(16, "");
    let (mut launcher, processes) = long_run(&workspace, &["--stall-timeout", "8"]);
    let trainers: Vec<Watch> =
        processes.iter().filter(|process| process.command.contains("-cpu")).map(Watch::on).collect();
    assert_eq!(trainers.len(), 2);
    stop(launcher.id() as i32);
    stop(find(&processes, "coordinator --config").pid);
    trainers.iter().for_each(Watch::wait_gone);
    kill_9(launcher.id() as i32);
    launcher.wait().unwrap();
}

/// As when a laptop sleeps, or after Ctrl-Z and `fg`: all processes are suspended together for longer than the stall timeout.
#[test]
fn a_run_suspended_as_a_whole_goes_on_when_it_is_resumed() {
    let workspace = Workspace::with_model(16, "");
    let (mut launcher, processes) = long_run(&workspace, &["--stall-timeout", "3"]);
    let all = || processes.iter().map(|process| process.pid).chain([launcher.id() as i32]);
    for _ in 0..2 {
        all().for_each(stop);
        // The test needs time to pass.
        std::thread::sleep(Duration::from_secs(5));
        let before = workspace.steps_so_far();
        all().for_each(go_on);
        wait_for("steps after the sleep", || (workspace.steps_so_far() > before + 50).then_some(()));
    }
    let (gone, log) = (launcher.try_wait().unwrap(), workspace.path("out/logs/coordinator.log"));
    assert!(gone.is_none(), "{}", std::fs::read_to_string(log).unwrap());
    kill_9(launcher.id() as i32);
    launcher.wait().unwrap();
}
