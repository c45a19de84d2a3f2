//! Output streams that are full, closed or never read, and sparse environments, do not disturb a run.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsRawFd;
use std::process::Stdio;

use dyad_tests::processes::{terminate, wait_for};
use dyad_tests::terminal::{Narrowing, Terminal};
use dyad_tests::{Workspace, text};

/// Whether the pipe is full.
#[expect(unsafe_code, reason = "poll")]
fn is_full(pipe: &PipeWriter) -> bool {
    let mut poll = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

#[test]
fn a_full_unread_pipe_blocks_neither_run_nor_signals() {
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
fn closed_or_full_streams_do_not_fail_a_complete_run() {
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
fn with_json_logs_every_line_is_json() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let output = workspace.launch(1, &["--log-format", "json"]);
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("final"), "{said}");
    let odd: Vec<&str> =
        said.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_err()).collect();
    assert!(odd.is_empty(), "{odd:?}");
}

/// Environments as a login shell, a cron job or a container sets them.
#[test]
fn runs_train_with_a_sparse_or_empty_environment() {
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

/// Without HOME the user has no cache folder.
#[test]
fn without_home_reference_scores_are_kept_in_the_output_folder() {
    let workspace = Workspace::with_model(8, "max_steps = 1\nreference_logps = \"cache\"\n");
    let output = workspace.launcher(1, &[]).env_clear().output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(workspace.path("out/reference.sqlite").exists());
}

/// After Ctrl-S the terminal accepts no output; the run goes on and reacts to signals.
#[test]
fn a_terminal_stopped_by_ctrl_s_blocks_neither_run_nor_signals() {
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
