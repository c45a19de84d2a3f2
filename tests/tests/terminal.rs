//! Output of a run on a terminal, read from the terminal's screen.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::Child;

use dyad_tests::Workspace;
use dyad_tests::processes::{interrupt, wait_for};
use dyad_tests::terminal::{Narrowing, Terminal};

/// Texts that only the live line contains.
const MARKS: [&str; 5] = ["/1000000", "<", "█", "░", "loss "];

/// Starts a long run that prints a line above the live line now and then.
fn long_run(columns: usize, narrowing: Narrowing) -> (Workspace, Terminal, Child) {
    let workspace = Workspace::with_model(16, "max_steps = 1000000\nsave_steps = 7\nsave_total_limit = 2\n");
    let command = workspace.launcher(1, &[]);
    let (terminal, launcher) = Terminal::run(command, columns, narrowing);
    (workspace, terminal, launcher)
}

/// Returns the step in the live line. `None` if the live line is not the last row, or if parts of an earlier one remain; both may happen
/// until the next redraw.
fn live(rows: &[String]) -> Option<u64> {
    let marked: Vec<&String> =
        rows.iter().filter(|row| MARKS.iter().any(|mark| row.contains(mark))).collect();
    let [line] = marked[..] else { return None };
    rows.last().filter(|last| *last == line)?;
    let (before, _) = line.split_once("/1000000")?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Waits until the live line shows a later step than `after`, and returns it.
fn next_step(terminal: &Terminal, after: u64) -> u64 {
    let mut rows = Vec::new();
    let later = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("a later step in the live line", || {
            rows = terminal.rows();
            live(&rows).filter(|step| *step > after)
        })
    }));
    later
        .unwrap_or_else(|_| panic!("no later step than {after} alone in the live line:\n{}", rows.join("\n")))
}

/// Stops the run with SIGINT, and checks its last lines and that no part of the live line is left.
fn stops(workspace: &Workspace, terminal: Terminal, mut launcher: Child) {
    interrupt(launcher.id() as i32);
    let status = wait_for("the end of the run", || launcher.try_wait().unwrap());
    let screen = terminal.settle();
    assert_eq!(status.code(), Some(130), "{screen:?}");
    assert!(!screen.rows.iter().any(|row| MARKS.iter().any(|mark| row.contains(mark))), "{screen:?}");
    let step = workspace.steps_so_far();
    let checkpoint = workspace.path(&format!("out/checkpoint-{step}"));
    let stopped = format!("stopped  by SIGINT after step {step}; the checkpoint is {}", checkpoint.display());
    let hint = format!("hint: the same command with --resume goes on from checkpoint-{step}");
    assert_eq!(screen.lines[screen.lines.len() - 2..], [stopped, hint]);
    assert!(!screen.lines.iter().any(|line| line.contains("error")), "{screen:?}");
    let devices = screen.lines.iter().find(|line| line.starts_with("devices  ")).unwrap();
    // A narrow terminal may have cut this line.
    assert!("devices  1 trainer on the CPU: as".starts_with(&devices[..17]), "{devices}");
}

#[test]
fn a_resized_reflowing_terminal_shows_one_live_line_and_nothing_stale() {
    let (workspace, terminal, launcher) = long_run(80, Narrowing::Reflows);
    let mut step = next_step(&terminal, 0);
    for columns in [33, 200, 17, 120, 60, 25, 80] {
        terminal.resize(columns);
        step = next_step(&terminal, step);
        step = next_step(&terminal, step);
    }
    // Log lines above the live line are complete.
    let saved = wait_for("a checkpoint", || {
        let saved: Vec<String> =
            terminal.lines().into_iter().filter(|line| line.starts_with("saved    ")).collect();
        (saved.len() > 1).then_some(saved)
    });
    for line in saved {
        let (_, step) = line.split_once("/out/checkpoint-").unwrap();
        assert!(step.parse::<u64>().unwrap().is_multiple_of(7), "{line}");
    }
    stops(&workspace, terminal, launcher);
}

#[test]
fn a_resized_cutting_terminal_shows_one_live_line_and_nothing_stale() {
    // Start wide, so that no log line is cut.
    let (workspace, terminal, launcher) = long_run(240, Narrowing::Cuts);
    let mut step = next_step(&terminal, 0);
    for columns in [40, 120, 17, 240] {
        terminal.resize(columns);
        step = next_step(&terminal, step);
        step = next_step(&terminal, step);
    }
    stops(&workspace, terminal, launcher);
}

#[test]
fn on_a_narrow_terminal_finished_lines_stay_intact() {
    let workspace =
        Workspace::with_model(8, "max_steps = 1\nn_evals = 1\nvalidation_file = \"pairs.jsonl\"\n");
    let (terminal, mut launcher) =
        Terminal::run(workspace.launcher(1, &["--samples", "0"]), 30, Narrowing::Reflows);
    let status = wait_for("the end of the run", || launcher.try_wait().unwrap());
    let screen = terminal.settle();
    assert!(status.success(), "{screen:?}");
    let labels = [
        "devices  ",
        "model    ",
        "data     ",
        "scored   ",
        "eval     ",
        "saved    ",
        "held-out pairs ",
        "  ",
        "trained  1 step, ",
        "plot     ",
    ];
    for line in &screen.lines {
        assert!(labels.iter().any(|label| line.starts_with(label)), "{line:?} in {screen:?}");
    }
    assert!(
        screen.lines.iter().any(|line| line.starts_with("data     8 pairs, 1 step per epoch, 1 step")),
        "{screen:?}"
    );
}
