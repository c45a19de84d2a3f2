//! Errors in the traces of a run: a complete or stopped run has none, a failed run has some, and refused or leaving clients cause none in
//! the run's own spans.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use dyad_proto::security::client::Access;
use dyad_proto::security::token::JoinToken;
use dyad_proto::wire::WatchRunRequest;
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_tests::collector::{Collector, Span};
use dyad_tests::processes::{children, die_with_me, interrupt, kill_9, wait_for};
use dyad_tests::tools::free_port;
use dyad_tests::{Workspace, binary, text};

const TRAIN: &str = "dyad.v1.Coordinator/Train";
const WATCH: &str = "dyad.v1.Coordinator/WatchRun";
const STATUS: &str = "rpc.response.status_code";
const CLIENT: i32 = 3;
const SERVER: i32 = 2;

fn errors<'a>(spans: impl IntoIterator<Item = &'a Span>) -> Vec<&'a Span> {
    spans.into_iter().filter(|span| span.error.is_some()).collect()
}

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

/// Returns the statuses of a method's calls, at the client or at the server.
fn statuses<'a>(spans: &'a [Span], method: &str, end: i32) -> Vec<&'a str> {
    named(spans, method).iter().filter(|span| span.kind == end).map(|span| span.attribute(STATUS)).collect()
}

fn outcome<'a>(spans: &'a [Span], name: &str) -> &'a str {
    let found = named(spans, name);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].attribute("train.outcome")
}

/// Starts a launcher that traces every step.
fn start(workspace: &Workspace, collector: &Collector, args: &[&str]) -> Child {
    let mut launcher = workspace.launcher(2, &[&["--trace-every", "1"], args].concat());
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    launcher.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn end(launcher: &mut Child) -> Option<i32> {
    wait_for("the end of the run", || launcher.try_wait().unwrap()).code()
}

fn complete(spans: &[Span]) {
    assert!(errors(spans).is_empty(), "{:#?}", errors(spans));
    for (method, calls) in [(TRAIN, 2), (WATCH, 1)] {
        for end in [CLIENT, SERVER] {
            assert_eq!(statuses(spans, method, end), vec!["OK"; calls], "{method} {end}");
        }
    }
    assert_eq!((outcome(spans, "run"), outcome(spans, "launch")), ("complete", "complete"));
}

#[test]
fn a_run_that_is_complete_has_no_span_with_an_error() {
    let collector = Collector::start();
    let config = "n_epochs = 2\nn_checkpoints = 2\nn_evals = 2\nvalidation_file = \"pairs.jsonl\"\n";
    let workspace = Workspace::with_model(32, config);
    assert_eq!(end(&mut start(&workspace, &collector, &[])), Some(0));
    complete(&collector.spans());
    // Started again, it has nothing to do.
    let again = Collector::start();
    for flag in ["--resume", "--auto-resume"] {
        assert_eq!(end(&mut start(&workspace, &again, &[flag])), Some(0));
        assert!(errors(&again.spans()).is_empty(), "{flag}: {:#?}", errors(&again.spans()));
    }
}

/// The run stops between two steps: it has finished every step that it began.
#[test]
fn a_run_that_is_stopped_on_request_and_resumed_has_no_span_with_an_error() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    let collector = Collector::start();
    let mut launcher = start(&workspace, &collector, &[]);
    workspace.wait_for_a_step();
    interrupt(launcher.id() as i32);
    assert_eq!(end(&mut launcher), Some(130));
    let spans = collector.spans();
    assert!(errors(&spans).is_empty(), "{:#?}", errors(&spans));
    assert_eq!((outcome(&spans, "run"), outcome(&spans, "launch")), ("stopped", "stopped"));
    let done = workspace.rows("out/metrics.jsonl").len();
    assert_eq!(named(&spans, "step").len(), done, "a step that was never begun has no span");
    let resumed = Collector::start();
    let last = format!("max_steps={}", done + 2);
    let go_on = ["--resume", "--set", last.as_str()];
    assert_eq!(end(&mut start(&workspace, &resumed, &go_on)), Some(0));
    complete(&resumed.spans());
}

#[test]
fn a_killed_trainer_leaves_errors_in_the_run_and_in_its_broken_calls() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    let mut launcher = start(&workspace, &collector, &[]);
    workspace.wait_for_a_step();
    kill_trainer(&launcher);
    assert_eq!(end(&mut launcher), Some(1));
    let spans = collector.spans();
    for name in ["run", "launch"] {
        assert_eq!(outcome(&spans, name), "failed");
        let error = named(&spans, name)[0].error.clone().unwrap();
        assert!(error.contains("node1-cpu"), "{name}: {error}");
    }
    // The survivor aborts its call. The killed trainer exports no span, and the coordinator sees its broken connection.
    assert_eq!(statuses(&spans, TRAIN, CLIENT), ["ABORTED"]);
    let servers: Vec<&Span> = named(&spans, TRAIN).into_iter().filter(|span| span.kind == SERVER).collect();
    assert_eq!((servers.len(), errors(servers.iter().copied()).len()), (2, 1), "{servers:#?}");
    // The launcher received the outcome of the run.
    assert_eq!(statuses(&spans, WATCH, CLIENT), ["OK"]);
}

fn kill_trainer(launcher: &Child) {
    let trainer = children(launcher).into_iter().find(|process| process.command.contains("node1-cpu"));
    kill_9(trainer.unwrap().pid);
}

#[test]
fn after_a_restart_only_the_failed_attempt_has_spans_with_errors() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(16, "max_steps = 300\nn_checkpoints = 15\n");
    let mut launcher = start(&workspace, &collector, &["--max-restarts", "3"]);
    wait_for("a checkpoint", || workspace.path("out/checkpoint-20").exists().then_some(()));
    kill_trainer(&launcher);
    assert_eq!(end(&mut launcher), Some(0));
    let spans = collector.spans();
    let launches = named(&spans, "launch");
    let outcomes: Vec<&str> = launches.iter().map(|span| span.attribute("train.outcome")).collect();
    assert_eq!(outcomes, ["failed", "complete"]);
    let run = |launch: &Span| {
        let run = spans.iter().find(|span| span.name == "run" && span.trace == launch.trace);
        run.unwrap().attribute("train.run.id").to_owned()
    };
    let failed = |launch: &Span| {
        let id = run(launch);
        let own = spans.iter().filter(|span| span.name == "step" && span.attribute("train.run.id") == id);
        let traces: Vec<&str> = own.map(|span| span.trace.as_str()).chain([launch.trace.as_str()]).collect();
        errors(spans.iter().filter(|span| traces.contains(&span.trace.as_str()))).len()
    };
    assert!(failed(launches[0]) > 0);
    assert_eq!(failed(launches[1]), 0);
}

/// Starts a coordinator without a launcher, with traces.
fn coordinator(workspace: &Workspace, collector: &Collector, port: u16, args: &[&str]) -> Child {
    let mut command = Command::new(binary("coordinator"));
    command.current_dir(workspace.path("")).args(["--config", "run.toml"]).args(args);
    command.args(["--listen", &format!("127.0.0.1:{port}")]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    die_with_me(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// As a scheduler starts them. The second time the run is complete, and the coordinator tells the nodes so.
#[test]
fn nodes_and_a_coordinator_that_find_the_run_complete_have_no_span_with_an_error() {
    let workspace = Workspace::with_model(16, "max_steps = 2\n");
    for _ in 0..2 {
        let (collector, port) = (Collector::start(), free_port());
        let args = ["--world-size", "2", "--auto-resume", "--tell-trainers"];
        let mut coordinator = coordinator(&workspace, &collector, port, &args);
        let nodes = ["0", "1"].map(|index| {
            let mut node = Command::new(binary("launcher"));
            node.current_dir(workspace.path("")).args(["node", "--gpus", "0", "--node-index", index]);
            node.args(["--coordinator", &format!("http://127.0.0.1:{port}")]).stderr(Stdio::piped());
            node.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
            node.spawn().unwrap()
        });
        for node in nodes {
            let output = node.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", text(&output));
        }
        assert_eq!(end(&mut coordinator), Some(0));
        let spans = collector.spans();
        assert!(errors(&spans).is_empty(), "{:#?}", errors(&spans));
        assert_eq!(
            (statuses(&spans, TRAIN, CLIENT), statuses(&spans, TRAIN, SERVER)),
            (vec!["OK"; 2], vec!["OK"; 2])
        );
    }
}

/// A refused client has an error in its own span. The coordinator has none, also if a watcher disconnects.
#[test]
fn refused_clients_and_leaving_watchers_cause_no_error_in_the_run() {
    let collector = Collector::start();
    let workspace = Workspace::with_model(8, "max_steps = 2\n");
    let token = JoinToken::lasting().unwrap();
    workspace.write("token", token.text());
    workspace.write("other", JoinToken::lasting().unwrap().text());
    for file in ["token", "other"] {
        std::fs::set_permissions(workspace.path(file), std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let port = free_port();
    let mut run = coordinator(&workspace, &collector, port, &["--world-size", "1", "--token-file", "token"]);
    let url = format!("http://127.0.0.1:{port}");
    let mut stranger = Command::new(binary("trainer"));
    stranger.current_dir(workspace.path("")).args(["run", "--name", "stranger", "--launch-index", "0"]);
    stranger.args(["--coordinator", &url, "--token-file", "other"]);
    let output = stranger.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()).output().unwrap();
    assert!(!output.status.success(), "{}", text(&output));
    let spans = collector.spans();
    assert_eq!(statuses(&spans, TRAIN, CLIENT), ["UNAUTHENTICATED"]);
    assert_eq!(errors(&spans).len(), 1, "{spans:#?}");

    let access = Access::new(&url, None, Some(&workspace.path("token"))).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = access.endpoint().unwrap().connect().await.unwrap();
        let call = access.request(WatchRunRequest {}).unwrap();
        let mut events = CoordinatorClient::new(channel).watch_run(call).await.unwrap().into_inner();
        assert!(events.message().await.unwrap().is_some());
    });
    drop(runtime);
    wait_for("the end of the call", || {
        let spans = collector.spans();
        (statuses(&spans, WATCH, SERVER) == ["CANCELLED"]).then_some(())
    });
    interrupt(run.id() as i32);
    assert_eq!(end(&mut run), Some(130));
    let spans = collector.spans();
    assert_eq!((errors(&spans).len(), outcome(&spans, "run")), (1, "stopped"), "{:#?}", errors(&spans));
    assert!(statuses(&spans, TRAIN, SERVER).is_empty(), "a call that is not let in is not traced there");
}
