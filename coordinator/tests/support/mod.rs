//! Starts a real coordinator process, and scripted trainers that compute nothing.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test binary uses only a part of this module, and a test may panic"
)]

pub mod authority;
pub mod spec;

use std::fmt::Write;
use std::path::PathBuf;
use std::process::Stdio;

use dyad_proto::PROTOCOL_VERSION;
use dyad_proto::security::client::Access;
use dyad_proto::security::{Material, Proof, TLS_DIR, TOKEN_FILE};
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{
    BootstrapOffer, CheckpointReport, CoordinatorMessage, EvaluationReport, Failure, Finished, Heartbeat,
    Held, Hello, MeasureReport, Pair, PairLength, PairVerdict, Phase, PreferenceSums, RunEvent,
    StepAssignment, StepReport, TrainerMessage, WatchRunRequest,
};
use dyad_tests::processes::PATIENCE;
use futures::StreamExt;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Waits for the future; fails the test after [`PATIENCE`].
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

/// A [`dyad_tests::Workspace`] with data and a config for a coordinator.
pub struct Workspace(dyad_tests::Workspace);

impl Workspace {
    /// Training and validation files with this many pairs, batches of 4, and `extra` lines of config.
    pub fn new(train: usize, validation: usize, extra: &str) -> Self {
        let work = dyad_tests::Workspace::empty();
        work.write("train.jsonl", &pairs(train));
        let mut config = format!(
            "model = \"m\"\ntraining_file = \"{}\"\noutput_dir = \"{}\"\nbatch_size = 4\n{extra}\n",
            work.path("train.jsonl").display(),
            work.path("out").display(),
        );
        if validation > 0 {
            work.write("valid.jsonl", &pairs(validation));
            writeln!(config, "validation_file = \"{}\"", work.path("valid.jsonl").display()).unwrap();
        }
        work.write("run.toml", &config);
        Self(work)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    pub fn rows(&self, name: &str) -> Vec<dyad_tests::Row> {
        self.0.rows(&format!("out/{name}"))
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        command.arg("--config").arg(self.path("run.toml")).args(args);
        // The coordinator must not use keys of the test's own environment.
        command.env_remove(TLS_DIR).env_remove(TOKEN_FILE);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Starts a coordinator and waits until it listens.
    pub async fn start(&self, args: &[&str]) -> Coordinator {
        self.start_as(self.command(args), None).await
    }

    /// The same with mutual TLS: `own` is the coordinator's material, `theirs` that of trainers and launchers.
    pub async fn start_secured(&self, args: &[&str], own: &Material, theirs: [&Material; 2]) -> Coordinator {
        let dir = self.path("tls");
        own.write(&dir).unwrap();
        let mut command = self.command(args);
        command.env(TLS_DIR, dir);
        self.start_as(command, Some(theirs)).await
    }

    /// Starts this command, and waits until the coordinator listens.
    pub async fn start_as(&self, mut command: Command, theirs: Option<[&Material; 2]>) -> Coordinator {
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        soon("the coordinator to listen", stdout.read_line(&mut line)).await.unwrap();
        let Ok(announced) = serde_json::from_str::<Value>(&line) else {
            panic!("announced {line:?}: {}", Ended::of(child).await.stderr);
        };
        let address = announced["listening"].as_str().unwrap().to_owned();
        let url = format!("http://{address}");
        let way =
            |who: usize| Access::with(&url, theirs.map(|theirs| Proof::from(theirs[who].clone()))).unwrap();
        let metrics = announced["metrics"].as_str().map(str::to_owned);
        Coordinator { child, stdout, address, metrics, trainers: way(0), launchers: way(1) }
    }

    /// Runs a coordinator until it exits by itself.
    pub async fn run_alone(&self, args: &[&str]) -> Ended {
        Ended::of(self.command(args).spawn().unwrap()).await
    }
}

async fn watching(access: &Access) -> tonic::Streaming<RunEvent> {
    let call = access.request(WatchRunRequest {}).unwrap();
    client(access).await.watch_run(call).await.unwrap().into_inner()
}

async fn collected(events: tonic::Streaming<RunEvent>) -> Vec<RunEvent> {
    let told = |event: RunEvent| (!matches!(event.body, Some(EventBody::Beat(_)))).then_some(event);
    let events = events.filter_map(|event| std::future::ready(told(event.unwrap())));
    soon("the run's last event", events.collect()).await
}

async fn client(access: &Access) -> CoordinatorClient<Channel> {
    CoordinatorClient::new(access.endpoint().unwrap().connect().await.unwrap())
}

fn pairs(count: usize) -> String {
    let line = |id| format!("{}\n", dyad_tests::pair(&format!("question {id}"), "good", "bad"));
    (0..count).map(line).collect()
}

/// Exit status and output of a coordinator.
pub struct Ended {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub async fn of(child: Child) -> Self {
        let output = soon("the coordinator to end", child.wait_with_output()).await.unwrap();
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The final message and hint in standard error.
    pub fn report(&self) -> &str {
        let begins = ["error: ", "stopped  "].into_iter().filter_map(|mark| self.stderr.find(mark)).min();
        begins.map_or("", |at| &self.stderr[at..])
    }
}

/// A running coordinator.
pub struct Coordinator {
    child: Child,
    stdout: BufReader<tokio::process::ChildStdout>,
    /// `host:port`.
    pub address: String,
    /// `host:port` of the metrics, if they are served.
    pub metrics: Option<String>,
    pub trainers: Access,
    pub launchers: Access,
}

impl Coordinator {
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    pub async fn end(mut self) -> Ended {
        let mut rest = String::new();
        soon("standard output to end", self.stdout.read_to_string(&mut rest)).await.unwrap();
        Ended { stdout: rest, ..Ended::of(self.child).await }
    }

    /// Connects and says hello as the `index`-th trainer.
    pub async fn join(&self, name: &str, index: u32) -> Trainer {
        let hello = Hello {
            name: name.into(),
            protocol_version: PROTOCOL_VERSION,
            device: "cpu".into(),
            launch_index: index,
            ..Hello::default()
        };
        self.join_as(hello).await
    }

    pub async fn join_as(&self, hello: Hello) -> Trainer {
        let mut client = client(&self.trainers).await;
        let (outgoing, messages) = mpsc::unbounded_channel();
        let name = hello.name.clone();
        outgoing.send(TrainerMessage { body: Some(Up::Hello(hello)) }).unwrap();
        let call = self.trainers.request(UnboundedReceiverStream::new(messages)).unwrap();
        let incoming = client.train(call).await.unwrap().into_inner();
        Trainer { name, outgoing, incoming, rank: 0, log: Log::default() }
    }

    /// Waits until the row of a step is written.
    pub async fn recorded(&self, step: u64) {
        let call = self.launchers.request(WatchRunRequest {}).unwrap();
        let mut events = client(&self.launchers).await.watch_run(call).await.unwrap().into_inner();
        let is_it = |event: &RunEvent| matches!(&event.body, Some(EventBody::Step(row)) if row.step == step);
        while !is_it(&soon("a row", events.message()).await.unwrap().unwrap()) {}
    }

    /// Collects all events of the run.
    pub fn watch(&self) -> tokio::task::JoinHandle<Vec<RunEvent>> {
        let access = self.launchers.clone();
        tokio::spawn(async move { collected(watching(&access).await).await })
    }

    /// The same, but returns only once the coordinator has accepted the call.
    pub async fn watched(&self) -> tokio::task::JoinHandle<Vec<RunEvent>> {
        tokio::spawn(collected(watching(&self.launchers).await))
    }
}

/// The messages that a trainer received.
#[derive(Debug, Default)]
pub struct Log {
    pub steps: Vec<StepAssignment>,
    pub evaluations: Vec<(u64, Vec<u64>)>,
    pub plan: Option<dyad_proto::wire::RunPlan>,
    pub measured: Vec<u64>,
    pub bootstrap: Option<Vec<u8>>,
}

/// A trainer that follows a script.
pub struct Trainer {
    name: String,
    outgoing: mpsc::UnboundedSender<TrainerMessage>,
    incoming: Streaming<CoordinatorMessage>,
    pub rank: u32,
    pub log: Log,
}

impl Trainer {
    pub fn send(&self, body: Up) {
        self.outgoing.send(TrainerMessage { body: Some(body) }).unwrap();
    }

    pub fn fail(&self, code: dyad_proto::ErrorCode, message: &str) {
        self.send(Up::Failure(Failure::from(dyad_proto::Fault::new(code, message))));
    }

    pub fn heartbeat(&self, phase: Phase, step: u64) {
        self.send(Up::Heartbeat(Heartbeat { phase: phase.into(), step, ..Heartbeat::default() }));
    }

    /// The next message; `None` when the coordinator has ended the stream.
    pub async fn receive(&mut self) -> Option<Down> {
        let message = soon(&format!("a message to {}", self.name), self.incoming.message()).await;
        message.ok().flatten().map(|message| message.body.unwrap())
    }

    /// Follows the coordinator's messages up to and including step `last`.
    pub async fn train_until(&mut self, last: u64) {
        while self.log.steps.last().is_none_or(|step| step.step < last) {
            let message = self.receive().await.expect("the coordinator closed the stream");
            self.obey(message);
        }
    }

    /// Follows the coordinator's messages until the stream ends.
    pub async fn run(mut self) -> Log {
        while let Some(message) = self.receive().await {
            self.obey(message);
        }
        self.log
    }

    /// Waits for Abort and returns its cause; ignores other messages.
    pub async fn aborted(&mut self) -> Failure {
        loop {
            match self.receive().await {
                Some(Down::Abort(abort)) => return abort.cause.unwrap(),
                Some(_) => {}
                None => panic!("the stream of {} ended without Abort", self.name),
            }
        }
    }

    fn obey(&mut self, message: Down) {
        match message {
            Down::Welcome(welcome) => {
                dyad_proto::RunConfig::from_json(&welcome.run_config_json).unwrap();
                self.heartbeat(Phase::Loading, 0);
            }
            Down::Assignment(assignment) => {
                self.rank = assignment.rank;
                if self.rank == 0 {
                    let generation = assignment.generation;
                    self.send(Up::BootstrapOffer(BootstrapOffer {
                        generation,
                        payload: b"meet here".to_vec(),
                    }));
                }
            }
            Down::CommunicatorReady(ready) => self.log.bootstrap = Some(ready.payload),
            Down::MeasureRequest(request) => {
                self.log.measured.extend(request.pairs.iter().map(|pair| pair.id));
                let lengths = request.pairs.iter().map(measure).collect();
                self.send(Up::MeasureReport(MeasureReport {
                    split: request.split,
                    lengths,
                    refusal: None,
                    ..MeasureReport::default()
                }));
            }
            Down::RunPlan(plan) => self.log.plan = Some(plan),
            Down::Step(step) => self.step(step),
            Down::Evaluation(evaluation) => {
                self.log.evaluations.push((evaluation.step, ids(&evaluation.pairs)));
                self.send(Up::EvaluationReport(EvaluationReport {
                    generation: evaluation.generation,
                    step: evaluation.step,
                    sums: Some(sums(&evaluation.pairs)),
                    seconds: 0.25,
                    samples: Vec::new(),
                }));
            }
            Down::KeepTrace(_) | Down::Recorded(_) | Down::Posting(_) | Down::Beat(_) => {}
            Down::Reference(_) => panic!("no run here asks for reference scores before its first step"),
            Down::Hold(_) => {
                let works = (self.log.steps.len() + self.log.evaluations.len()) as u64;
                self.send(Up::Held(Held { works }));
            }
            Down::Drain(_) => self.send(Up::Finished(Finished {})),
            Down::Finish(_) => {
                if self.rank == 0 {
                    let step = self.log.plan.as_ref().unwrap().total_steps;
                    self.send(Up::CheckpointReport(CheckpointReport {
                        step,
                        path: "out/final".into(),
                        r#final: true,
                        seconds: 0.5,
                    }));
                }
                self.send(Up::Finished(Finished {}));
            }
            Down::Abort(abort) => panic!("{} was aborted: {abort:?}", self.name),
        }
    }

    fn step(&mut self, step: StepAssignment) {
        self.heartbeat(Phase::Training, step.step);
        self.send(Up::StepReport(StepReport {
            generation: step.generation,
            step: step.step,
            sums: Some(sums(&step.pairs)),
            grad_norm: 2.0,
            learning_rate: 1e-5,
            step_seconds: 0.5 * f64::from(1 + self.rank),
            ..StepReport::default()
        }));
        self.log.steps.push(step);
    }
}

pub fn ids(pairs: &[Pair]) -> Vec<u64> {
    pairs.iter().map(|pair| pair.id).collect()
}

/// Pair 3 of any file is too long, pair 5 is truncated. Prompts and outputs have 10 tokens, those of pair 0 have 50.
fn measure(pair: &Pair) -> PairLength {
    let verdict = match pair.id {
        3 => PairVerdict::DroppedTooLong,
        5 => PairVerdict::Truncated,
        _ => PairVerdict::Kept,
    };
    let tokens = if pair.id == 0 { 50 } else { 10 };
    PairLength {
        id: pair.id,
        verdict: verdict.into(),
        prompt_tokens: tokens,
        chosen_tokens: tokens,
        rejected_tokens: tokens,
        tokens_hash_low: pair.id,
        ..PairLength::default()
    }
}

/// Per pair: a loss equal to its id, a margin of 1, 20 completion tokens, a KL of 0.1 per token.
fn sums(pairs: &[Pair]) -> PreferenceSums {
    let count = pairs.len() as u64;
    let loss: u64 = pairs.iter().map(|pair| pair.id).sum();
    PreferenceSums {
        pairs: count,
        loss: loss as f64,
        rewards_chosen: 0.75 * count as f64,
        rewards_rejected: -0.25 * count as f64,
        rewards_correct: pairs.iter().filter(|pair| pair.id % 2 == 0).count() as u64,
        logps_chosen: -20.0 * count as f64,
        logps_rejected: -30.0 * count as f64,
        logps_correct: count,
        nll: 10.0 * count as f64,
        chosen_tokens: 10 * count,
        kl_chosen: count as f64,
        kl_rejected: count as f64,
        kl_chosen_tokens: 10 * count,
        logits_chosen: 5.0 * count as f64,
        logits_rejected: -5.0 * count as f64,
        entropy: 30.0 * count as f64,
        chosen_tokens_correct: 4 * count,
        completion_tokens: 20 * count,
        tokens: 40 * count,
        kl_tokens: 20 * count,
        aux_loss: 0.0,
        desirable: 0,
        kl_estimate: 0.0,
    }
}
