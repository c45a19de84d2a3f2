//! The alerts in `deploy/observability`, in a real Prometheus that scrapes real runs one after the other at one address.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Child, Stdio};

use dyad_tests::processes::{children, interrupt, kill_9, wait_for};
use dyad_tests::tools::{Prometheus, free_port};
use dyad_tests::{Workspace, root};

/// Writes the rules with `for: 2m` shortened to 2 s.
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

/// Waits until Prometheus has scraped steps of the current run.
fn trains(prometheus: &Prometheus) {
    wait_for("a run whose steps are scraped", || {
        let steps = prometheus.query("(dyad_step > 0) and on (instance) (dyad_coordinator_done == 0)");
        (!steps.ok()?.is_empty()).then_some(())
    });
}

/// Waits until the run trains, then kills one of its processes.
fn kill(launcher: &Child, prometheus: &Prometheus, process: &str) {
    trains(prometheus);
    let found = children(launcher).into_iter().find(|child| child.command.contains(process));
    kill_9(found.unwrap().pid);
}

/// Waits until no scrape has succeeded for 8 s, three times as long as an alert needs. Returns the last `done` and `failed`.
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

/// Returns how many alerts have fired within `range`.
fn fired(prometheus: &Prometheus, alert: &str, range: &str) -> usize {
    let alerts = format!("ALERTS{{alertname=~\"{alert}\",alertstate=\"firing\"}}");
    prometheus.query(&format!("count_over_time({alerts}[{range}])")).unwrap().len()
}

#[test]
fn failed_runs_and_killed_coordinators_alert_and_ended_runs_do_not() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    let port = free_port();
    let prometheus = Prometheus::start(&workspace.path("."), port, &rules(&workspace));
    wait_for("a scrape of nothing", || (prometheus.query("up").ok()? == [0.0]).then_some(()));

    // A complete run: its end is scraped although it lasts only a few scrapes.
    let mut run = start(&workspace, port, &["--set", "max_steps=40"]);
    assert!(wait_for("the end of the run", || run.try_wait().unwrap()).success());
    assert_eq!(last_words(&prometheus), (1.0, 0.0));

    // A run stopped on request.
    let mut run = start(&workspace, port, &[]);
    trains(&prometheus);
    interrupt(run.id() as i32);
    assert_eq!(wait_for("the end of the run", || run.try_wait().unwrap()).code(), Some(130));
    assert_eq!(last_words(&prometheus), (1.0, 0.0));
    assert_eq!(fired(&prometheus, "Dyad.*", "1h"), 0);

    // A failed run: its coordinator reports the failure and exits.
    let mut run = start(&workspace, port, &[]);
    kill(&run, &prometheus, "node1-cpu");
    assert_eq!(wait_for("the end of the run", || run.try_wait().unwrap()).code(), Some(1));
    assert_eq!(last_words(&prometheus), (1.0, 1.0));
    wait_for("the alert on a run that failed", || {
        (fired(&prometheus, "DyadRunFailed", "1s") == 1).then_some(())
    });
    assert_eq!(fired(&prometheus, "DyadCoordinatorDown", "1h"), 0);

    // A killed coordinator.
    let mut run = start(&workspace, port, &[]);
    kill(&run, &prometheus, "coordinator --config");
    assert_eq!(wait_for("the end of the run", || run.try_wait().unwrap()).code(), Some(1));
    assert_eq!(last_words(&prometheus), (0.0, 0.0));
    wait_for("the alert on a coordinator that is gone", || {
        (fired(&prometheus, "DyadCoordinatorDown", "1s") == 1).then_some(())
    });

    // The next run at the address ends the alert.
    let mut run = start(&workspace, port, &["--set", "max_steps=40"]);
    assert!(wait_for("the end of the run", || run.try_wait().unwrap()).success());
    assert_eq!(last_words(&prometheus), (1.0, 0.0));
    assert_eq!(fired(&prometheus, "Dyad.*", "1s"), 0);
}
