//! `metrics.svg` of running, stopped, failed and refused runs.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::Stdio;

use dyad_tests::processes::{children, interrupt, kill_9, outcome, wait_for};
use dyad_tests::{Workspace, text};

/// Draws the rows that a run has left in `out/`, and returns the SVG.
fn drawn_now(workspace: &Workspace) -> String {
    let dir = workspace.path("again");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(workspace.path("out/metrics.jsonl"), dir.join("metrics.jsonl")).unwrap();
    // A run without evaluations has no such file.
    let _ = std::fs::copy(workspace.path("out/eval_metrics.jsonl"), dir.join("eval_metrics.jsonl"));
    std::fs::read_to_string(launcher::show::plot::draw(&dir).unwrap().unwrap()).unwrap()
}

fn ended_by(end: impl Fn(&std::process::Child), status: i32) {
    let workspace = Workspace::with_model(16, "max_steps = 1000000\n");
    let mut launcher =
        workspace.launcher(2, &[]).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let svg = workspace.path("out/metrics.svg");
    wait_for("a plot of the run that goes on", || svg.exists().then_some(()));
    let early = std::fs::read_to_string(&svg).unwrap();
    assert!(early.starts_with("<svg") && early.trim_end().ends_with("</svg>"), "{early}");
    assert!(launcher.try_wait().unwrap().is_none());
    let before = workspace.steps_so_far();
    wait_for("more steps", || (workspace.steps_so_far() > before + 5).then_some(()));
    end(&launcher);
    let (code, error) = outcome(&mut launcher);
    assert_eq!(code, Some(status), "{error}");
    assert!(workspace.steps_so_far() > 5);
    assert!(std::fs::read_to_string(&svg).unwrap() == drawn_now(&workspace), "the plot lacks rows: {error}");
}

#[test]
fn a_run_that_is_stopped_leaves_a_plot_of_all_its_steps() {
    ended_by(|launcher| interrupt(launcher.id() as i32), 130);
}

#[test]
fn a_run_that_fails_leaves_a_plot_of_all_its_steps() {
    let kill = |launcher: &std::process::Child| {
        let processes = children(launcher);
        kill_9(processes.iter().find(|process| process.command.contains("node1-cpu")).unwrap().pid);
    };
    ended_by(kill, 1);
}

#[test]
fn a_run_that_is_refused_leaves_an_earlier_plot_alone() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    assert!(workspace.launch(1, &[]).status.success());
    let svg = workspace.path("out/metrics.svg");
    assert!(std::fs::read_to_string(&svg).unwrap().contains("</svg>"));
    std::fs::write(&svg, "mine").unwrap();
    let refused = workspace.launch(1, &["--set", "random_seed=7"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert_eq!(std::fs::read_to_string(&svg).unwrap(), "mine");
}
