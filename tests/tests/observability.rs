//! Traces of real runs, as a collector receives them.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::{BTreeMap, HashSet};
use std::net::TcpListener;
use std::process::{Output, Stdio};

use dyad_tests::collector::{Collector, Span};
use dyad_tests::processes::{children, go_on, interrupt, kill_9, stop, wait_for};
use dyad_tests::{CURVE, Row, Workspace, assert_same_curve, number, text};
use serde_json::Value;

/// Twelve steps, one checkpoint, evaluations before and after.
const CONFIG: &str = "n_epochs = 3\nn_checkpoints = 2\nvalidation_file = \"pairs.jsonl\"\n";
const STEPS: u64 = 12;

fn traced(workspace: &Workspace, endpoint: &str, args: &[&str]) -> Output {
    let mut launcher = workspace.launcher(2, args);
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint).output().unwrap()
}

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

fn one<'a>(spans: &'a [Span], what: &str, is_it: impl Fn(&Span) -> bool) -> &'a Span {
    let found: Vec<&Span> = spans.iter().filter(|span| is_it(span)).collect();
    assert_eq!(found.len(), 1, "{what} among {:?}", spans.iter().map(|span| &span.name).collect::<Vec<_>>());
    found[0]
}

/// Returns the root spans of steps, by step.
fn roots(spans: &[Span]) -> BTreeMap<u64, &Span> {
    named(spans, "step")
        .into_iter()
        .map(|span| (span.attribute("train.step").parse().unwrap(), span))
        .collect()
}

#[test]
fn each_step_is_one_trace_with_the_coordinator_and_every_rank() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(32, CONFIG);
    let output = traced(&workspace, collector.endpoint(), &["--trace-every", "5"]);
    assert!(output.status.success(), "{}", text(&output));
    let rows = workspace.rows("out/metrics.jsonl");
    assert_eq!(rows.len() as u64, STEPS);
    let spans = collector.spans();

    let run = one(&spans, "the run", |span| span.name == "run");
    let roots = roots(&spans);
    // The first three steps and then every fifth are sampled; a step that happened to be slow is sampled too.
    for (step, reason) in [(1, "first"), (2, "first"), (3, "first"), (5, "periodic"), (10, "periodic")] {
        let root = roots[&step];
        assert_eq!(root.attribute("train.sampled_by"), reason);
        check_step(&spans, root, step, run, &rows);
    }
    let unsampled: Vec<&&Span> =
        roots.values().filter(|root| root.attribute("train.sampled_by") == "slow").collect();
    assert_eq!(roots.len(), 5 + unsampled.len());
    // No process has exported a span of another step.
    let traces: HashSet<&str> = roots.values().map(|root| root.trace.as_str()).collect();
    for span in named(&spans, "train_step") {
        assert!(traces.contains(span.trace.as_str()), "{span:?}");
    }
    assert_eq!(named(&spans, "train_step").len(), 2 * roots.len());
}

fn check_step(spans: &[Span], root: &Span, step: u64, run: &Span, rows: &[Row]) {
    assert_eq!((root.service.as_str(), root.parent.as_str()), ("coordinator", ""));
    assert_ne!(root.trace, run.trace);
    assert_eq!(root.links, [(run.trace.clone(), run.id.clone())]);
    assert_eq!(root.attribute("train.run.id"), run.attribute("train.run.id"));
    let loss: f64 = root.attribute("train.loss").parse().unwrap();
    // Rows are parsed from decimal digits, which may change the last bit.
    let row = number(&rows[step as usize - 1], "loss");
    assert!((loss - row).abs() <= 1e-12 * row.abs(), "{loss} and {row}");
    let trace: Vec<Span> = spans.iter().filter(|span| span.trace == root.trace).cloned().collect();
    let ids: HashSet<&str> = trace.iter().map(|span| span.id.as_str()).collect();
    assert_eq!(ids.len(), trace.len(), "ids are unique");
    let aggregate = one(&trace, "aggregate", |span| span.name == "aggregate");
    assert_eq!((aggregate.service.as_str(), &aggregate.parent), ("coordinator", &root.id));
    let mut instances = HashSet::new();
    for rank in ["0", "1"] {
        let own =
            one(&trace, "a rank", |span| span.name == "train_step" && span.attribute("train.rank") == rank);
        assert_eq!((own.service.as_str(), &own.parent), ("trainer", &root.id));
        assert_eq!(own.attribute("train.step"), step.to_string());
        assert!(own.start <= own.end && root.start <= own.end && own.start <= root.end);
        instances.insert(own.instance.clone());
        let below = |name: &str, parent: &Span| -> Vec<Span> {
            let is_it =
                |span: &&Span| span.name == name && span.parent == parent.id && span.instance == own.instance;
            trace.iter().filter(is_it).cloned().collect()
        };
        for phase in
            ["fetch", "forward_policy", "forward_reference", "head", "backward", "optimizer", "report"]
        {
            let phases = below(phase, own);
            assert!(!phases.is_empty(), "no {phase} of rank {rank} in step {step}");
            assert!(phases.iter().all(|span| own.start <= span.start && span.end <= own.end), "{phase}");
        }
        let reductions: Vec<Span> =
            below("backward", own).iter().flat_map(|backward| below("all_reduce", backward)).collect();
        let buckets: HashSet<&str> = reductions.iter().map(|span| span.attribute("train.bucket")).collect();
        assert!(!buckets.is_empty() && buckets.len() == reductions.len(), "{reductions:?}");
        assert!(
            reductions.iter().all(|span| span.attribute("train.bucket.size").parse::<u64>().unwrap() > 0)
        );
    }
    assert_eq!(instances.len(), 2, "each rank is a process of its own");
}

#[test]
fn the_run_is_a_trace_from_the_launcher_to_the_trainers() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(32, CONFIG);
    let output = traced(&workspace, collector.endpoint(), &[]);
    assert!(output.status.success(), "{}", text(&output));
    let spans = collector.spans();
    let launch = one(&spans, "the launcher's span", |span| span.name == "launch");
    let run = one(&spans, "the run", |span| span.name == "run");
    assert_eq!((launch.service.as_str(), launch.parent.as_str()), ("launcher", ""));
    assert_eq!((run.service.as_str(), &run.parent, &run.trace), ("coordinator", &launch.id, &launch.trace));
    assert_eq!(run.error, None);
    assert_eq!(one(&spans, "prepare", |span| span.name == "prepare").parent, run.id);
    let trainers = named(&spans, "trainer");
    assert_eq!(trainers.len(), 2);
    for trainer in trainers {
        assert_eq!((&trainer.parent, &trainer.trace), (&run.id, &run.trace));
        for part in ["rendezvous", "load", "measure", "checkpoint", "evaluate"] {
            assert!(
                named(&spans, part).iter().any(|span| span.parent == trainer.id),
                "no {part} below {trainer:?}"
            );
        }
    }
    // The coordinator's span of each call is a child of the caller's span.
    for (method, callers) in [("dyad.v1.Coordinator/Train", 2), ("dyad.v1.Coordinator/WatchRun", 1)] {
        let calls = named(&spans, method);
        let (clients, servers): (Vec<&Span>, Vec<&Span>) = calls.into_iter().partition(|span| span.kind == 3);
        assert_eq!((clients.len(), servers.len()), (callers, callers), "{method}");
        for server in &servers {
            assert_eq!((server.service.as_str(), server.kind), ("coordinator", 2));
            assert!(clients.iter().any(|client| client.id == server.parent && client.trace == server.trace));
        }
        for client in &clients {
            assert_eq!((&client.parent, &client.trace), (&launch.id, &launch.trace));
            assert_eq!(client.attribute("rpc.system.name"), "grpc");
            assert_eq!(client.attribute("rpc.method"), method);
            assert_eq!(client.attribute("rpc.response.status_code"), "OK");
            assert_eq!(client.attribute("server.address"), "127.0.0.1");
            client.attribute("server.port").parse::<u16>().unwrap();
        }
    }
}

#[test]
fn the_environment_decides_what_is_exported() {
    let workspace = Workspace::with_model(8, "");
    for (variable, value) in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_SAMPLER", "always_off")] {
        let collector = Collector::start();
        let mut launcher = workspace.launcher(2, &["--overwrite"]);
        launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()).env(variable, value);
        let output = launcher.output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(collector.spans().len(), 0, "{variable}={value}");
    }
    let collector = Collector::start();
    let mut launcher = workspace.launcher(2, &["--overwrite"]);
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    launcher
        .env("OTEL_SERVICE_NAME", "mine")
        .env("TRACEPARENT", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let output = launcher.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let spans = collector.spans();
    assert!(spans.iter().all(|span| span.service == "mine"));
    let launch = one(&spans, "the launcher's span", |span| span.name == "launch");
    assert_eq!(
        (launch.trace.as_str(), launch.parent.as_str()),
        ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    );
}

/// Lost spans change neither the numbers nor the end of a run.
#[test]
fn an_unreachable_or_silent_collector_delays_nothing() {
    let workspace = Workspace::with_model(32, "n_epochs = 3\n");
    let plain = workspace.train(2, "plain", &[]);
    let refusing = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    // The kernel accepts connections, but nothing ever answers.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    for (name, address) in [("refused", refusing), ("mute", mute.local_addr().unwrap())] {
        let mut launcher =
            workspace.launcher(2, &["--trace-every", "1", "--set", &format!("output_dir={name}")]);
        launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"));
        // Ten minutes: a process that waited for an export would exceed the timeout of `wait_for`.
        launcher.env("OTEL_EXPORTER_OTLP_TIMEOUT", "600000").env("OTEL_BSP_MAX_QUEUE_SIZE", "64");
        launcher.env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16");
        let mut child = launcher.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let status = wait_for("the end of the run", || child.try_wait().unwrap());
        assert!(status.success(), "{name}");
        assert_same_curve(&plain, &workspace.rows(&format!("{name}/metrics.jsonl")), &CURVE, 0.0);
    }
}

#[test]
fn the_step_in_which_a_run_fails_is_traced_as_failed() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(16, "");
    let mut launcher = workspace.launcher(2, &["--set", "max_steps=100000", "--trace-every", "0"]);
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    let mut child = launcher.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    workspace.wait_for_a_step();
    let victim = children(&child).into_iter().find(|process| process.command.contains("node1-cpu")).unwrap();
    kill_9(victim.pid);
    assert_eq!(wait_for("the end of the run", || child.try_wait().unwrap()).code(), Some(1));
    let spans = collector.spans();
    let root = one(&spans, "the failed step", |span| {
        span.name == "step" && span.attribute("train.sampled_by") == "failed"
    });
    assert!(root.error.as_ref().unwrap().contains("node1-cpu"), "{root:?}");
    let run = one(&spans, "the run", |span| span.name == "run");
    assert_eq!(run.error, root.error);
    // The survivor was in that step, or in the next one if it had finished its part.
    let survivor =
        one(&spans, "the survivor's step", |span| span.name == "train_step" && span.error.is_some());
    assert_eq!(survivor.attribute("train.rank"), "0");
    let number = |span: &Span| span.attribute("train.step").parse::<u64>().unwrap();
    let later = number(survivor) - number(root);
    assert!(later <= 1, "{survivor:?} {root:?}");
    assert_eq!((survivor.trace == root.trace, survivor.parent == root.id), (later == 0, later == 0));
}

/// A suspended trainer makes a step slow. Its spans are exported although it was not sampled at its start.
#[test]
fn a_slow_step_is_traced_though_it_was_not_sampled() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(16, "");
    let mut launcher = workspace.launcher(2, &["--set", "max_steps=100000", "--trace-every", "0"]);
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()).env("OTEL_BSP_SCHEDULE_DELAY", "100");
    let mut child = launcher.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("enough steps for a median", || (workspace.steps_so_far() > 20).then_some(()));
    let victim = children(&child).into_iter().find(|process| process.command.contains("node1-cpu")).unwrap();
    stop(victim.pid);
    // This sleep makes the step slow; it waits for nothing.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    go_on(victim.pid);
    let slow = wait_for("the slow step's spans", || {
        let spans = collector.spans();
        let slow = |span: &&Span| {
            span.name == "step"
                && span.attribute("train.sampled_by") == "slow"
                && span.attribute("train.step.duration").parse::<f64>().unwrap() > 1.0
        };
        let root = spans.iter().find(slow)?.clone();
        let ranks = spans.iter().filter(|span| span.name == "train_step" && span.parent == root.id).count();
        (ranks == 2).then_some(root)
    });
    assert_eq!(slow.service, "coordinator");
    interrupt(child.id() as i32);
    wait_for("the end of the run", || child.try_wait().unwrap());
}

#[test]
fn log_lines_are_json_with_trace_ids_on_request() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(16, "");
    let mut launcher = workspace.launcher(2, &["--log-format", "json"]);
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()).env("DYAD_LOG", "info,trainer=debug");
    let output = launcher.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let spans = collector.spans();
    let known: HashSet<(&str, &str)> =
        spans.iter().map(|span| (span.trace.as_str(), span.id.as_str())).collect();
    let own = String::from_utf8(output.stderr).unwrap();
    let read = |name: &str| std::fs::read_to_string(workspace.path(&format!("out/logs/{name}.log"))).unwrap();
    for (program, log) in
        [("launcher", own), ("coordinator", read("coordinator")), ("trainer", read("node1-cpu"))]
    {
        let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(!lines.is_empty(), "{program}");
        for line in &lines {
            assert!(
                ["timestamp", "level", "target", "fields"].iter().all(|key| line.get(key).is_some()),
                "{line}"
            );
        }
        let ids =
            lines.iter().filter_map(|line| Some((line["trace_id"].as_str()?, line["span_id"].as_str()?)));
        let ids: Vec<(&str, &str)> = ids.collect();
        assert!(ids.iter().any(|id| known.contains(id)), "no exported span in the lines of {program}: {log}");
    }
    // A line of a step carries the ids of that rank's span.
    let steps: HashSet<&str> = named(&spans, "train_step").iter().map(|span| span.id.as_str()).collect();
    let log = read("node1-cpu");
    let of_a_step = |line: &&str| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["fields"]["message"] == "step" && line["span_id"].as_str().is_some_and(|id| steps.contains(id))
    };
    assert!(log.lines().any(|line| of_a_step(&line)), "{log}");
}

/// The launcher reads the coordinator's error and prints it once, as its own line.
#[test]
fn a_failure_is_one_json_line_on_request() {
    let workspace = Workspace::with_model(8, "");
    workspace.write("pairs.jsonl", "not json\n");
    let output = workspace.launch(2, &["--log-format", "json"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let words: Vec<&Value> =
        lines.iter().map(|line| &line["fields"]).filter(|line| !line["exit_status"].is_null()).collect();
    assert!(words.len() == 1 && lines.last().unwrap()["target"] == "launcher", "{said}");
    assert!(words[0]["message"].as_str().unwrap().contains("pairs.jsonl line 1: "), "{said}");
    assert!(!words[0]["hint"].as_str().unwrap().is_empty() && words[0]["exit_status"] == 2, "{said}");
    let log = std::fs::read_to_string(workspace.path("out/logs/coordinator.log")).unwrap();
    assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
    assert!(log.contains("\"exit_status\":2"), "{log}");
}
