//! Killed processes: the run stops, no process is left, and the error names the process that died. Also signals, nohup and Ctrl-C.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

use dyad_tests::processes::{
    self, Process, Watch, children, hang_up, interrupt, kill_9, quit, stop, terminate, wait_for,
};
use dyad_tests::{Workspace, binary, text};

/// Starts a long run. Returns it and its processes once it has done a step.
fn long_run(workspace: &Workspace) -> (Child, Vec<Process>) {
    let mut command = workspace.launcher(2, &["--set", "max_steps=100000"]);
    let launcher = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    workspace.wait_for_a_step();
    let processes = children(&launcher);
    assert_eq!(processes.len(), 3, "{processes:?}");
    (launcher, processes)
}

/// The long run of a failed test must not go on next to later tests.
#[test]
fn a_run_ends_with_the_test_that_began_it() {
    let watches = std::thread::spawn(|| {
        let workspace = Workspace::with_model(16, "");
        let (launcher, processes) = long_run(&workspace);
        std::mem::forget(launcher);
        processes.iter().map(Watch::on).collect::<Vec<_>>()
    });
    watches.join().unwrap().iter().for_each(Watch::wait_gone);
}

fn find<'a>(processes: &'a [Process], part: &str) -> &'a Process {
    processes.iter().find(|process| process.command.contains(part)).unwrap()
}

/// Waits until all processes have ended. Returns the launcher's status and stderr.
fn outcome(mut launcher: Child, watches: &[Watch]) -> (Option<i32>, String) {
    let outcome = processes::outcome(&mut launcher);
    watches.iter().for_each(Watch::wait_gone);
    outcome
}

fn watch(processes: &[Process]) -> Vec<Watch> {
    processes.iter().map(Watch::on).collect()
}

#[test]
fn a_killed_trainer_stops_the_run_and_is_named() {
    killed_trainer_is_named("");
}

/// With sharded weights every layer of the other ranks waits for the dead rank's part.
#[test]
fn a_killed_trainer_is_named_with_sharded_weights() {
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
    // The launcher says so in place of the dead coordinator.
    assert!(error.contains("no checkpoint was written yet: start again with --overwrite"), "{error}");
}

/// For example because libtorch was moved.
#[test]
fn a_trainer_that_cannot_start_is_named() {
    let workspace = Workspace::with_model(16, "");
    std::os::unix::fs::symlink(binary("coordinator"), workspace.path("coordinator")).unwrap();
    workspace.write("trainer", "#!/bin/sh\necho 'cannot open shared object file' >&2\nexit 127\n");
    std::fs::set_permissions(workspace.path("trainer"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = workspace.launcher(2, &[]).env("DYAD_BIN_DIR", workspace.path(".")).output().unwrap();
    let error = text(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    let logs = workspace.path("out/logs");
    let named = ["node0-cpu", "node1-cpu"].iter().enumerate().any(|(rank, name)| {
        let line = format!("error: trainer rank {rank} ({name}) died: exit status 127");
        let hint = format!("hint: its log is {}", logs.join(format!("{name}.log")).display());
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

/// Returns a launcher that waits after a complete run for sample answers that never come, and the process it waits for.
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

/// As when a scheduler ends the job after the run is complete.
#[test]
fn sigterm_after_a_run_leaves_it_complete() {
    let workspace = Workspace::with_model(8, "");
    let (launcher, sampler) = stuck_at_samples(&workspace);
    terminate(launcher.id() as i32);
    let (status, error) = outcome(launcher, &[sampler]);
    assert!(status == Some(0) && !error.contains("error: "), "{error}");
}

/// Runs with a trainer that executes the shell line `then` once its work is done. Returns the launcher's status and output.
fn after_its_work(then: &str) -> (Option<i32>, String) {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::os::unix::fs::symlink(binary("coordinator"), workspace.path("coordinator")).unwrap();
    let real = binary("trainer");
    workspace.write("trainer", &format!("#!/bin/sh\n{} \"$@\"\n{then}\n", real.display()));
    std::fs::set_permissions(workspace.path("trainer"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = workspace.launcher(1, &[]).env("DYAD_BIN_DIR", workspace.path(".")).output().unwrap();
    assert!(workspace.path("out/final/model.safetensors").exists());
    (output.status.code(), text(&output))
}

#[test]
fn a_trainer_killed_after_the_run_is_complete_causes_only_a_warning() {
    let (status, said) = after_its_work("kill -KILL $$");
    assert!(status == Some(0) && !said.contains("error: ") && !said.contains("--overwrite"), "{said}");
    let warning = "warning: once the run was complete: trainer rank 0 (node0-cpu) died: killed by signal 9";
    assert!(said.contains(warning), "{said}");
}

#[test]
fn a_trainer_that_hangs_after_the_run_is_complete_is_ended() {
    let (status, said) = after_its_work("trap '' TERM; kill -STOP $$");
    assert!(status == Some(0) && !said.contains("error: "), "{said}");
    assert!(said.contains("warning: trainer rank 0 (node0-cpu) is still there"), "{said}");
}

/// Writing to `/dev/full` fails, as on a full disk.
#[test]
fn a_complete_run_succeeds_even_if_stdout_is_full() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    for args in [&[][..], &["--resume"], &["--auto-resume"]] {
        let output = workspace.launcher(1, args).stdout(full()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output));
    }
    let mut coordinator = std::process::Command::new(binary("coordinator"));
    coordinator.current_dir(workspace.path(".")).args(["--world-size", "1", "--resume"]);
    let output = coordinator.args(["--config", "out/run.json"]).stdout(full()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_launcher_killed_while_sampling_leaves_nothing_behind() {
    let workspace = Workspace::with_model(8, "");
    let (launcher, sampler) = stuck_at_samples(&workspace);
    kill_9(launcher.id() as i32);
    assert_eq!(outcome(launcher, &[sampler]).0, None);
}

/// Returns the number of rows in the metrics, and the step of the newest checkpoint.
fn progress(workspace: &Workspace) -> (u64, Option<u64>) {
    let rows = workspace.rows("out/metrics.jsonl").len() as u64;
    let names = std::fs::read_dir(workspace.path("out")).unwrap().flatten();
    let steps =
        names.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok());
    (rows, steps.max())
}

fn drained_by(config: &str, signal: &str, tell: impl Fn(&Child, &[Process])) {
    let workspace = Workspace::with_model(16, config);
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    tell(&launcher, &processes);
    let (status, error) = outcome(launcher, &watches);
    assert_eq!(status, Some(130), "{error}");
    let (steps, checkpoint) = progress(&workspace);
    assert!(steps > 0);
    assert_eq!(checkpoint, Some(steps), "every step that was begun is reported and saved: {error}");
    let line = error.lines().find(|line| line.starts_with("stopped  ")).unwrap_or_default();
    assert!(line.contains(&format!("by {signal}")) && !error.contains("error:"), "{error}");
    for process in ["coordinator", "node0-cpu", "node1-cpu"] {
        let log = std::fs::read_to_string(workspace.path(&format!("out/logs/{process}.log"))).unwrap();
        assert!(log.contains("\nstopped  ") && !log.contains("error:"), "{process}: {log}");
    }
    assert!(line.contains(&format!("after step {steps}; the checkpoint is ")), "{error}");
    let hint = format!("hint: the same command with --resume goes on from checkpoint-{steps}");
    assert!(error.lines().any(|line| line == hint), "{error}");

    let output = workspace.launch(2, &["--resume", "--set", &format!("max_steps={}", steps + 1)]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(workspace.rows("out/metrics.jsonl").len() as u64, steps + 1);
}

#[test]
fn ctrl_c_finishes_the_step_in_progress_and_leaves_a_checkpoint() {
    drained_by("", "SIGINT after", |launcher, _| interrupt(launcher.id() as i32));
}

#[test]
fn sigterm_at_the_launcher_leaves_a_checkpoint_with_sharded_weights() {
    drained_by("zero_stage = 3\n", "SIGTERM after", |launcher, _| terminate(launcher.id() as i32));
}

/// As a scheduler sends it.
#[test]
fn sigterm_at_one_trainer_ends_the_run_with_a_checkpoint() {
    drained_by("", "a signal to trainer rank 1", |_, processes| terminate(find(processes, "node1-cpu").pid));
}

/// The kernel and the shell both send SIGHUP, so it arrives twice.
#[test]
fn a_terminal_that_closes_ends_the_run_with_a_checkpoint() {
    drained_by("", "SIGHUP after", |launcher, _| {
        hang_up(launcher.id() as i32);
        hang_up(launcher.id() as i32);
    });
}

#[test]
fn under_nohup_a_terminal_that_closes_ends_nothing() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    let plain = workspace.launcher(1, &[]);
    let mut command = std::process::Command::new("nohup");
    command.current_dir(workspace.path(".")).arg(plain.get_program()).args(plain.get_args());
    processes::die_with_me(&mut command);
    let launcher = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    workspace.wait_for_a_step();
    let watches = watch(&children(&launcher));
    children(&launcher).iter().for_each(|process| hang_up(process.pid));
    hang_up(launcher.id() as i32);
    let before = workspace.steps_so_far();
    wait_for("more steps", || (workspace.steps_so_far() > before + 20).then_some(()));
    terminate(launcher.id() as i32);
    let (status, error) = outcome(launcher, &watches);
    assert!(status == Some(130) && error.contains("\nstopped  by SIGTERM after step"), "{error}");
}

#[test]
fn ctrl_c_twice_ends_the_run_at_once() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    // With a suspended coordinator the first Ctrl-C alone would wait forever.
    stop(find(&processes, "coordinator --config").pid);
    interrupt(launcher.id() as i32);
    wait_for_line(&launcher, "press Ctrl-C again");
    interrupt(launcher.id() as i32);
    let (status, error) = outcome(launcher, &watches);
    assert_eq!(status, Some(130), "{error}");
    assert!(error.contains("\nstopped  at once") && !error.contains("error:"), "{error}");
    assert!(error.contains("hint: no checkpoint was written yet: start again with --overwrite"), "{error}");
}

/// Reads stderr until it contains `part`; [`outcome`] reads the rest.
fn wait_for_line(launcher: &Child, part: &str) {
    use std::os::fd::AsFd;
    let mut pipe =
        std::fs::File::from(launcher.stderr.as_ref().unwrap().as_fd().try_clone_to_owned().unwrap());
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains(part) {
        let mut byte = [0];
        assert_eq!(pipe.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&said));
        said.push(byte[0]);
    }
}

/// In a cluster the trainer may start first.
#[test]
fn a_trainer_waits_for_its_coordinator_and_says_so_once() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let port = dyad_tests::tools::free_port();
    let address = format!("http://127.0.0.1:{port}");
    let mut trainer = std::process::Command::new(binary("trainer"));
    trainer.args(["run", "--coordinator", &address, "--name", "t", "--launch-index", "0", "--threads", "1"]);
    let mut trainer = trainer.stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(trainer.stderr.take().unwrap()).lines().map_while(Result::ok);
    let waiting = log.by_ref().find(|line| line.contains("waiting up to 30 s for the coordinator")).unwrap();
    assert!(waiting.contains("refused"), "{waiting}");
    let mut coordinator = std::process::Command::new(binary("coordinator"));
    coordinator.current_dir(workspace.path(".")).args(["--config", "run.toml", "--world-size", "1"]);
    coordinator.args(["--listen", &format!("127.0.0.1:{port}")]).stdout(Stdio::null()).stderr(Stdio::null());
    // The trainer runs in another folder, so relative paths of the configuration would not work there.
    let config = std::fs::read_to_string(workspace.path("run.toml")).unwrap();
    let absolute = |name: &str| format!("\"{}\"", workspace.path(name).display());
    let config = config.replace("\"model\"", &absolute("model")).replace("\"out\"", &absolute("out"));
    workspace.write("run.toml", &config);
    let mut coordinator = coordinator.spawn().unwrap();
    let rest: Vec<String> = log.collect();
    assert!(trainer.wait().unwrap().success() && coordinator.wait().unwrap().success(), "{rest:?}");
    assert!(!rest.iter().any(|line| line.contains("waiting")), "{rest:?}");
}

/// SIGQUIT stops the run at once, without a checkpoint. No process reports it as a failure.
#[test]
fn sigquit_at_the_coordinator_stops_the_run_without_an_error() {
    let workspace = Workspace::with_model(16, "");
    let (launcher, processes) = long_run(&workspace);
    let watches = watch(&processes);
    quit(find(&processes, "coordinator --config").pid);
    let (status, error) = outcome(launcher, &watches);
    assert_eq!(status, Some(130), "{error}");
    assert!(error.contains("\nstopped  ") && error.contains("by SIGQUIT"), "{error}");
    assert!(!error.contains("error:"), "{error}");
    for process in ["coordinator", "node0-cpu", "node1-cpu"] {
        let log = std::fs::read_to_string(workspace.path(&format!("out/logs/{process}.log"))).unwrap();
        assert!(log.contains("\nstopped  by SIGQUIT") && !log.contains("error:"), "{process}: {log}");
    }
}
