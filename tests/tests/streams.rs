//! Who reads what a run says changes nothing in the run.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsRawFd;
use std::process::Stdio;

use dyad_tests::processes::{terminate, wait_for};
use dyad_tests::terminal::{Narrowing, Terminal};
use dyad_tests::{Workspace, text};

/// Whether the pipe takes no more.
#[expect(unsafe_code, reason = "poll")]
fn is_full(pipe: &PipeWriter) -> bool {
    let mut poll = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

#[test]
fn a_pipe_that_nobody_reads_stops_no_run_and_no_signal() {
    let workspace = Workspace::with_model(16, "max_steps = 1000000\n");
    let (_unread, pipe): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
    let mut command = workspace.launcher(2, &["--verbose"]);
    command.env("DYAD_LOG", "trace");
    command.stdout(Stdio::from(pipe.try_clone().unwrap())).stderr(Stdio::from(pipe.try_clone().unwrap()));
    let mut launcher = command.spawn().unwrap();
    wait_for("a full pipe", || is_full(&pipe).then_some(()));
    let before = workspace.steps_so_far();
    wait_for("more steps", || (workspace.steps_so_far() > before + 20).then_some(()));
    terminate(launcher.id() as i32);
    let ended = wait_for("the end of the run", || launcher.try_wait().unwrap());
    assert_eq!(ended.code(), Some(130));
    let log = std::fs::read_to_string(workspace.path("out/logs/coordinator.log")).unwrap();
    assert!(log.contains("\nstopped  by SIGTERM after step"), "the log lacks the end");
}

#[test]
fn streams_that_are_closed_or_full_fail_no_run_that_is_complete() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    for (index, streams) in
        ["> /dev/full", "2> /dev/full", "<&- >&- 2>&-", "2>&1 | head -1"].iter().enumerate()
    {
        let command = workspace.launcher(1, &["--verbose", "--set", &format!("output_dir=out{index}")]);
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| format!("'{}'", word.to_str().unwrap()))
            .collect();
        let mut shell = std::process::Command::new("bash");
        shell.current_dir(workspace.path(".")).args([
            "-o",
            "pipefail",
            "-c",
            &format!("{} {streams}", words.join(" ")),
        ]);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{streams}: {}", text(&output));
        assert!(workspace.path(&format!("out{index}/final/model.safetensors")).exists(), "{streams}");
    }
}

#[test]
fn where_log_lines_are_json_every_line_is() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let output = workspace.launch(1, &["--log-format", "json"]);
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("final"), "{said}");
    let odd: Vec<&str> =
        said.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_err()).collect();
    assert!(odd.is_empty(), "{odd:?}");
}

/// What a login shell, a cron job or a container leaves in the environment, or does not.
#[test]
fn an_environment_with_little_or_nothing_in_it_trains() {
    let workspace = Workspace::with_model(
        8,
        "max_steps = 1\nreference_logps = \"cache\"\nreference_cache = \"kept.sqlite\"\n",
    );
    let variables: [&[(&str, &str)]; 4] =
        [&[("TERM", "dumb")], &[("LC_ALL", "C")], &[("LANG", "tr_TR.UTF-8"), ("TERM", "")], &[]];
    for (index, variables) in variables.into_iter().enumerate() {
        let mut command = workspace.launcher(2, &["--set", &format!("output_dir=out{index}")]);
        let output = command.env_clear().envs(variables.iter().copied()).output().unwrap();
        assert!(output.status.success(), "{variables:?}: {}", text(&output));
        assert!(text(&output).contains("final"), "{variables:?}: {}", text(&output));
    }
}

/// Without HOME there is no cache folder of the user's.
#[test]
fn reference_scores_are_kept_with_the_run_where_there_is_no_home() {
    let workspace = Workspace::with_model(8, "max_steps = 1\nreference_logps = \"cache\"\n");
    let output = workspace.launcher(1, &[]).env_clear().output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(workspace.path("out/reference.sqlite").exists());
}

/// Ctrl-S: the terminal takes nothing more, and the run goes on and obeys.
#[test]
fn a_terminal_that_is_stopped_stops_no_run_and_no_signal() {
    let workspace = Workspace::with_model(16, "max_steps = 1000000\n");
    let (mut terminal, mut launcher) =
        Terminal::run(workspace.launcher(1, &["--verbose"]), 80, Narrowing::Reflows);
    workspace.wait_for_a_step();
    terminal.stop_output();
    let before = workspace.steps_so_far();
    wait_for("more steps", || (workspace.steps_so_far() > before + 100).then_some(()));
    terminate(launcher.id() as i32);
    let ended = wait_for("the end of the run", || launcher.try_wait().unwrap());
    assert_eq!(ended.code(), Some(130));
}
