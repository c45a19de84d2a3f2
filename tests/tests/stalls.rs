//! What stands still is found while its connections are open and its heart beats, and named; what only slept goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Child, Stdio};
use std::time::Duration;

use dyad_tests::processes::{self, Process, Watch, children, go_on, hold_thread, kill_9, stop, wait_for};
use dyad_tests::{Workspace, binary, text};

/// A run that would go on for a long time, with its processes, once it has done a step.
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

/// The one error of a run that has failed and left nothing behind.
fn error_of(mut launcher: Child, processes: &[Process]) -> String {
    let watches: Vec<Watch> = processes.iter().map(Watch::on).collect();
    let (status, text) = processes::outcome(&mut launcher);
    watches.iter().for_each(Watch::wait_gone);
    assert_eq!(status, Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    errors[0].to_owned()
}

/// Rank 0 waits in a collective meanwhile, and is not blamed.
#[test]
fn a_computing_thread_that_stands_still_is_named_with_its_last_collective() {
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
fn a_tokenising_thread_that_stands_still_is_found() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace, &["--stall-timeout", "8"]);
    let held = hold_thread(find(&processes, "node0-cpu").pid, Some("feed"));
    let error = error_of(launcher, &processes);
    assert!(error.contains("trainer rank 0 (node0-cpu) on ") && error.contains("stands still"), "{error}");
    assert!(error.contains("has not taken up the next work") || error.contains("tokenising"), "{error}");
    held.join().unwrap();
}

#[test]
fn a_coordinator_that_is_stopped_is_named_and_ended() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace, &["--stall-timeout", "8"]);
    stop(find(&processes, "coordinator --config").pid);
    let error = error_of(launcher, &processes);
    assert!(error.contains("coordinator") && error.contains("silent: no sign of life for 8 s"), "{error}");
}

/// Programs of which one stops itself before it does anything, where its command line has a word.
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
fn a_coordinator_that_is_stopped_before_it_listens_is_named() {
    let error = stopped_at_its_start(&Workspace::with_model(16, ""), "coordinator", "--config");
    assert!(error.contains("coordinator on this machine is silent: no sign of life for 4 s"), "{error}");
}

#[test]
fn a_trainer_that_is_stopped_before_it_joins_is_named() {
    let error = stopped_at_its_start(&Workspace::with_model(16, ""), "trainer", "node1-cpu");
    let named = "trainer rank 1 (node1-cpu) on this machine is silent: it has not joined the run for 20 s";
    assert!(error.contains(named), "{error}");
}

/// A shell's pipe that its writer neither fills nor closes stands in for a disk that hangs.
#[test]
fn a_coordinator_whose_reading_hangs_names_what_it_reads() {
    let mut coordinator = std::process::Command::new(binary("coordinator"));
    coordinator.args(["--config", "/dev/stdin", "--world-size", "1", "--stall-timeout", "1"]);
    let mut coordinator = coordinator.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Held open.
    let _pipe = coordinator.stdin.take();
    let (status, text) = processes::outcome(&mut coordinator);
    assert_eq!(status, Some(1), "{text}");
    let named = "error: reading of /dev/stdin stands still: nothing was read for 1 s";
    assert!(text.contains(named) && text.contains("--stall-timeout"), "{text}");
}

/// The launcher's machine may be gone with it: trainers find out by themselves.
#[test]
fn trainers_leave_a_coordinator_that_is_stopped() {
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

/// A laptop that sleeps, or Ctrl-Z and fg: all clocks stand together, for longer than any silence may be.
#[test]
fn a_run_that_is_stopped_as_a_whole_goes_on_when_it_is_continued() {
    let workspace = Workspace::with_model(16, "");
    let (mut launcher, processes) = long_run(&workspace, &["--stall-timeout", "3"]);
    let all = || processes.iter().map(|process| process.pid).chain([launcher.id() as i32]);
    for _ in 0..2 {
        all().for_each(stop);
        // What is tested is time that passes.
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
