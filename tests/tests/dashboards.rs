//! `deploy/observability` with a real Prometheus that scrapes a real run; TensorBoard's reader on a run's event files.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use dyad_tests::collector::Collector;
use dyad_tests::processes::{interrupt, wait_for};
use dyad_tests::tools::{Prometheus, free_port, get, tool};
use dyad_tests::{Workspace, number, root, text};
use serde_json::Value;

fn deployed(name: &str) -> PathBuf {
    root().join("deploy/observability").join(name)
}

fn dashboards() -> Vec<(String, Value)> {
    let files = std::fs::read_dir(deployed("grafana/dashboards")).unwrap().flatten();
    let read = |path: PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
    };
    let mut found: Vec<(String, Value)> = files.map(|file| read(file.path())).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().unwrap_or_else(|| panic!("no list {name} in {value}"))
}

/// Returns `(place, field)` of every target whose data source has type `kind`.
fn targets(kind: &str, field: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (file, board) in dashboards() {
        for panel in list(&board, "panels") {
            for target in list(panel, "targets").iter().filter(|target| target["datasource"]["type"] == kind)
            {
                let place = format!("{file}: {}", panel["title"].as_str().unwrap());
                found.push((place, target[field].as_str().unwrap().to_owned()));
            }
        }
    }
    found
}

/// Replaces Grafana's variables in a query, and shortens its time ranges for the test.
fn filled_in(expression: &str) -> String {
    let filled = expression.replace("$instance", ".*").replace("$run", ".*").replace("$__range", "1m");
    let filled = filled.replace("$__rate_interval", "4s").replace("$__interval", "4s");
    filled.replace("[5m]", "[4s]").replace("[1h:1m]", "[1m:1s]")
}

/// Starts a long run with checkpoints and evaluations.
fn long_run(workspace: &Workspace, collector: &Collector, port: u16) -> Child {
    let listen = format!("127.0.0.1:{port}");
    let args = ["--metrics-listen", &listen, "--trace-every", "10"];
    let mut launcher = workspace.launcher(2, &args);
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()).env("OTEL_BSP_SCHEDULE_DELAY", "200");
    launcher.env("DYAD_PEAK_FLOPS", "1e11").stdout(Stdio::null()).stderr(Stdio::null());
    launcher.spawn().unwrap()
}

#[test]
fn every_panel_and_alert_has_data_from_a_real_run() {
    let collector = Collector::start();
    // Some panels show a likelihood term and early stopping. This patience lets no run stop early.
    let config = "max_steps = 20000\nn_checkpoints = 200\nn_evals = 200\nvalidation_file = \"pairs.jsonl\"\n\
                  rpo_alpha = 0.1\nearly_stopping_enabled = true\nearly_stopping_patience = 199\n\
                  early_stopping_warmup_evals = 0\n";
    let workspace = Workspace::with_model(32, config);
    let port = free_port();
    let mut run = long_run(&workspace, &collector, port);
    let prometheus = Prometheus::start(&workspace.path("."), port, &deployed("prometheus/rules.yml"));
    let panels = targets("prometheus", "expr");
    assert!(panels.len() > 40, "{} queries", panels.len());
    for (place, expression) in panels {
        let expression = filled_in(&expression);
        // These runs have no GPU; the coordinator's tests cover these metrics.
        if expression.contains("dyad_gpu_") {
            assert_eq!(prometheus.query(&expression), Ok(Vec::new()), "{place}");
            continue;
        }
        wait_for(&format!("data of {place}: {expression}"), || {
            let values = prometheus.query(&expression).ok()?;
            values.iter().any(|value| value.is_finite()).then_some(())
        });
    }
    check_rules(&prometheus);
    wait_for("an exemplar with a trace behind it", || {
        let end = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 60;
        let window = format!("&start={}&end={end}", end - 600);
        let path = format!("/api/v1/query_exemplars?query=dyad_step_duration_seconds_bucket{window}");
        let answer: Value = serde_json::from_str(&get(prometheus.port, &path)?).ok()?;
        let exemplars = answer["data"].as_array()?.iter().flat_map(|series| list(series, "exemplars"));
        let ids: HashSet<&str> = exemplars.filter_map(|one| one["labels"]["trace_id"].as_str()).collect();
        collector
            .spans()
            .iter()
            .any(|span| span.name == "step" && ids.contains(span.trace.as_str()))
            .then_some(())
    });
    interrupt(run.id() as i32);
    wait_for("the end of the run", || run.try_wait().unwrap());
}

/// Every rule is evaluated without an error, and every metric that it names exists.
fn check_rules(prometheus: &Prometheus) {
    let rules = wait_for("rules that have been evaluated", || {
        let data = prometheus.api("rules", "type=alert").ok()?;
        let rules = list(data["groups"].get(0)?, "rules").to_vec();
        rules.iter().all(|rule| rule["health"] != "unknown").then_some(rules)
    });
    assert!(rules.len() >= 9, "{rules:?}");
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        for metric in metrics_of(rule["query"].as_str().unwrap()) {
            wait_for(&format!("{metric} of {}", rule["name"]), || {
                prometheus.query(&format!("count({metric})")).ok()?.first().copied()
            });
        }
    }
}

fn metrics_of(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("dyad_")).map(str::to_owned).collect()
}

#[test]
fn alerts_fire_when_they_should_and_not_before() {
    let promtool = |args: &[&str]| {
        let mut command = Command::new(tool("prometheus/usr/bin/promtool"));
        let output = command.current_dir(deployed("prometheus")).args(args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    };
    promtool(&["test", "rules", "rules_test.yml"]);
    promtool(&["check", "config", "prometheus.yml"]);
    // Every alert has a test case in which it fires.
    let rules = std::fs::read_to_string(deployed("prometheus/rules.yml")).unwrap();
    let tests = std::fs::read_to_string(deployed("prometheus/rules_test.yml")).unwrap();
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let cases = tests.split("alertname: ").skip(1).filter(|case| case.lines().next() == Some(alert));
        assert!(cases.clone().any(|case| case.contains("exp_labels")), "{alert} never fires in a test");
    }
}

/// Uses the grammar of Grafana's own editor.
#[test]
fn every_trace_query_parses() {
    let queries: Vec<String> = targets("tempo", "query").into_iter().map(|(_, query)| query).collect();
    assert!(queries.len() >= 4, "{queries:?}");
    let check = |queries: &[String]| {
        Command::new(tool("venv/bin/node")).arg(tool("traceql/check.mjs")).args(queries).output().unwrap()
    };
    let output = check(&queries);
    assert!(output.status.success(), "{}", text(&output));
    assert!(!check(&["{ name == ".to_owned()]).status.success(), "the check accepts anything");
}

/// Ids are unique, panels do not overlap, and every data source exists.
#[test]
fn dashboards_have_unique_ids_known_sources_and_no_overlap() {
    let sources = std::fs::read_to_string(deployed("grafana/provisioning/datasources/dyad.yaml")).unwrap();
    let mut uids = HashSet::new();
    for (file, board) in dashboards() {
        assert_eq!(format!("{}.json", board["uid"].as_str().unwrap()), file);
        assert!(uids.insert(board["uid"].clone()) && board["title"].as_str().unwrap().starts_with("Dyad / "));
        assert!(board["schemaVersion"].as_u64().unwrap() >= 36);
        let mut ids = HashSet::new();
        let mut taken: HashSet<(u64, u64)> = HashSet::new();
        for panel in list(&board, "panels") {
            let title = format!("{file}: {}", panel["title"]);
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: id is taken");
            assert!(panel["description"].as_str().unwrap().len() > 10, "{title} says nothing");
            let known = ["timeseries", "stat", "table", "heatmap", "text"];
            assert!(known.contains(&panel["type"].as_str().unwrap()), "{title}");
            let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
            assert!(at("x") + at("w") <= 24, "{title} is wider than the page");
            for x in at("x")..at("x") + at("w") {
                for y in at("y")..at("y") + at("h") {
                    assert!(taken.insert((x, y)), "{title} lies over another panel");
                }
            }
            let mut refs = HashSet::new();
            for target in list(panel, "targets") {
                assert!(refs.insert(target["refId"].as_str().unwrap()), "{title}: refId is taken");
                let uid = target["datasource"]["uid"].as_str().unwrap();
                assert!(sources.contains(&format!("uid: {uid}\n")), "{title}: no data source {uid}");
            }
        }
    }
    assert_eq!(uids.len(), 4);
}

/// Returns the variables `$name` and `${name}` of a text, without Grafana's own, which begin with two underscores.
fn variables_of(text: &str) -> BTreeSet<&str> {
    let names = text.split('$').skip(1).map(|rest| {
        let rest = rest.strip_prefix('{').unwrap_or(rest);
        rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
    });
    names.filter(|name| !name.is_empty() && !name.starts_with("__")).collect()
}

#[test]
fn every_dashboard_filters_by_the_chosen_runs_and_links_to_tensorboard() {
    for (file, board) in dashboards() {
        let variables = list(&board["templating"], "list");
        let known: BTreeSet<&str> = variables.iter().filter_map(|one| one["name"].as_str()).collect();
        assert_eq!(variables[0]["query"]["query"], "label_values(dyad_run_info, run)", "{file}");
        let text = board.to_string();
        let unknown: Vec<&str> = variables_of(&text).difference(&known).copied().collect();
        assert!(unknown.is_empty(), "{file}: no variable {unknown:?}");
        let links = list(&board, "links").iter();
        assert!(
            links.filter_map(|link| link["url"].as_str()).any(|url| url.contains("${tensorboard}")),
            "{file}"
        );
        for note in list(&board["annotations"], "list") {
            assert!(note["expr"].as_str().unwrap().contains("run=~\"$run\""), "{file}: {note}");
        }
    }
    for (place, expression) in targets("prometheus", "expr") {
        let (series, asked) =
            (expression.matches("{instance=~").count(), expression.matches("run=~\"$run\"").count());
        assert!(series > 0 && series == asked, "{place}: {expression}");
        assert_eq!(metrics_in(&expression), series, "{place}: a series is asked for without its labels");
    }
    for (place, query) in targets("tempo", "query") {
        assert!(query.contains("span.train.run.id =~ \"$run\""), "{place}: {query}");
    }
    let (_, overview) = dashboards().into_iter().find(|(file, _)| file == "dyad-run.json").unwrap();
    let text = list(&overview, "panels").iter().find(|panel| panel["type"] == "text").unwrap();
    let text = text["options"]["content"].as_str().unwrap();
    assert!(text.contains("tensorboard --logdir ${output_dir}/tb") && text.contains("${host}"), "{text}");
}

/// Returns how many metric names an expression contains.
fn metrics_in(expression: &str) -> usize {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("dyad_")).count()
}

/// TensorBoard's own reader finds TRL's tags and the values of the metrics files. A resumed run continues them.
#[test]
fn tensorboard_reads_what_a_run_wrote() {
    let workspace =
        Workspace::with_model(32, "n_evals = 2\nn_checkpoints = 2\nvalidation_file = \"pairs.jsonl\"\n");
    let rows = workspace.train(2, "out", &[]);
    let evaluations = workspace.rows("out/eval_metrics.jsonl");
    let read = || -> Value {
        let mut python = Command::new(tool("venv/bin/python"));
        python.arg(root().join("tests/observability/read_events.py")).arg(workspace.path("out/tb"));
        let output = python.output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let events = read();
    let check = |tag: &str, rows: &[dyad_tests::Row], key: &str| {
        let points = list(&events, tag);
        assert_eq!(points.len(), rows.len(), "{tag}");
        for (point, row) in points.iter().zip(rows) {
            assert_eq!(point[0].as_f64().unwrap(), number(row, "step"), "{tag}");
            assert_eq!(point[1].as_f64().unwrap() as f32, number(row, key) as f32, "{tag}");
        }
    };
    for key in [
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "kl",
    ] {
        check(&format!("train/{key}"), &rows, key);
    }
    for key in ["loss", "rewards/accuracies", "logps/rejected", "kl"] {
        check(&format!("eval/{key}"), &evaluations, &format!("eval_{key}"));
    }
    let resumed = workspace.train(2, "out", &["--resume"]);
    let events = read();
    let steps: Vec<u64> =
        list(&events, "train/loss").iter().map(|point| point[0].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=resumed.len() as u64).collect::<Vec<_>>(), "each step once");
}

/// Runs neither Kustomize nor Compose: checks that the files they would read exist, and that every dashboard is listed.
#[test]
fn manifests_name_existing_files() {
    let folder = deployed("kubernetes");
    let kustomization = std::fs::read_to_string(folder.join("kustomization.yaml")).unwrap();
    let listed = kustomization.lines().filter_map(|line| line.trim().strip_prefix("- "));
    let files: Vec<&str> = listed
        .map(|item| item.split_once('=').map_or(item, |(_, path)| path))
        .filter(|item| item.ends_with(".yaml") || item.ends_with(".yml") || item.ends_with(".json"))
        .collect();
    for file in &files {
        assert!(folder.join(file).is_file(), "{file}");
    }
    for (board, _) in dashboards() {
        assert!(files.iter().any(|file| file.ends_with(&board)), "{board} is not deployed");
    }
    let compose = std::fs::read_to_string(deployed("compose.yaml")).unwrap();
    let mounts = compose.lines().filter_map(|line| line.trim().strip_prefix("- ./"));
    let mounts: Vec<&str> = mounts.filter_map(|mount| mount.split(':').next()).collect();
    assert_eq!(mounts.len(), 4);
    assert!(mounts.iter().all(|mount| deployed(mount).is_dir()), "{mounts:?}");
}
