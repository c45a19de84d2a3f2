//! The alerts that `deploy/observability` ships, in a real Prometheus that scrapes real runs at one address, one after the other.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Child, Stdio};

use dyad_tests::processes::{children, interrupt, kill_9, wait_for};
use dyad_tests::tools::{Prometheus, free_port};
use dyad_tests::{Workspace, root};

/// The rules, two minutes shortened to what a test waits for.
fn rules(workspace: &Workspace) -> std::path::PathBuf {
    let rules = root().join("deploy/observability/prometheus/rules.yml");
    let rules = std::fs::read_to_string(rules).unwrap();
    assert_eq!(rules.matches("for: 2m").count(), 2);
    workspace.write("rules.yml", &rules.replace("for: 2m", "for: 2s"));
    workspace.path("rules.yml")
}

fn start(workspace: &Workspace, port: u16, args: &[&str]) -> Child {
    let listen = format!("--metrics-listen=127.0.0.1:{port}");
    let mut launcher = workspace.launcher(2, &[&[listen.as_str(), "--overwrite"], args].concat());
    launcher.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Returns once steps of the run that is there now are scraped.
fn trains(prometheus: &Prometheus) {
    wait_for("a run whose steps are scraped", || {
        let steps = prometheus.query("(dyad_step > 0) and on (instance) (dyad_coordinator_done == 0)");
        (!steps.ok()?.is_empty()).then_some(())
    });
}

/// Kills a process of a run that trains.
fn kill(launcher: &Child, prometheus: &Prometheus, process: &str) {
    trains(prometheus);
    let found = children(launcher).into_iter().find(|child| child.command.contains(process));
    kill_9(found.unwrap().pid);
}

/// What was read last at the address, once nobody has answered there for as long as it takes to notice that three times.
fn last_words(prometheus: &Prometheus) -> (f64, f64) {
    wait_for("a coordinator that has been gone for a while", || {
        (prometheus.query("max_over_time(up[8s])").ok()? == [0.0]).then_some(())
    });
    let last = |name: &str| {
        let values = prometheus.query(&format!("last_over_time(dyad_coordinator_{name}[1h])")).unwrap();
        assert_eq!(values.len(), 1, "{name}");
        values[0]
    };
    (last("done"), last("failed"))
}

/// How many alerts fire, or have fired in so many seconds.
fn fired(prometheus: &Prometheus, alert: &str, range: &str) -> usize {
    let alerts = format!("ALERTS{{alertname=~\"{alert}\",alertstate=\"firing\"}}");
    prometheus.query(&format!("count_over_time({alerts}[{range}])")).unwrap().len()
}

#[test]
fn a_run_that_ended_alerts_nobody_and_a_coordinator_that_was_killed_does() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    let port = free_port();
    let prometheus = Prometheus::start(&workspace.path("."), port, &rules(&workspace));
    wait_for("a scrape of nothing", || (prometheus.query("up").ok()? == [0.0]).then_some(()));

    // Complete, and read to the end although it is over within a few scrapes.
    let mut run = start(&workspace, port, &["--set", "max_steps=40"]);
    assert!(wait_for("the end of the run", || run.try_wait().unwrap()).success());
    assert_eq!(last_words(&prometheus), (1.0, 0.0));

    // Stopped on request.
    let mut run = start(&workspace, port, &[]);
    trains(&prometheus);
    interrupt(run.id() as i32);
    assert_eq!(wait_for("the end of the run", || run.try_wait().unwrap()).code(), Some(130));
    assert_eq!(last_words(&prometheus), (1.0, 0.0));
    assert_eq!(fired(&prometheus, "Dyad.*", "1h"), 0);

    // Failed: its coordinator has said so and left.
    let mut run = start(&workspace, port, &[]);
    kill(&run, &prometheus, "node1-cpu");
    assert_eq!(wait_for("the end of the run", || run.try_wait().unwrap()).code(), Some(1));
    assert_eq!(last_words(&prometheus), (1.0, 1.0));
    wait_for("the alert on a run that failed", || {
        (fired(&prometheus, "DyadRunFailed", "1s") == 1).then_some(())
    });
    assert_eq!(fired(&prometheus, "DyadCoordinatorDown", "1h"), 0);

    // Killed.
    let mut run = start(&workspace, port, &[]);
    kill(&run, &prometheus, "coordinator --config");
    assert_eq!(wait_for("the end of the run", || run.try_wait().unwrap()).code(), Some(1));
    assert_eq!(last_words(&prometheus), (0.0, 0.0));
    wait_for("the alert on a coordinator that is gone", || {
        (fired(&prometheus, "DyadCoordinatorDown", "1s") == 1).then_some(())
    });

    // The next run at that address ends it.
    let mut run = start(&workspace, port, &["--set", "max_steps=40"]);
    assert!(wait_for("the end of the run", || run.try_wait().unwrap()).success());
    assert_eq!(last_words(&prometheus), (1.0, 0.0));
    assert_eq!(fired(&prometheus, "Dyad.*", "1s"), 0);
}
