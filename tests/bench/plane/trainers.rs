//! Trainers that speak the protocol and compute nothing. Like real trainers, each has one connection and one stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dyad_proto::security::client::Access;
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::pair::Content;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{
    BootstrapOffer, ChatMessage, Finished, Heartbeat, Hello, MeasureReport, Pair, PairLength, PairVerdict,
    Phase, PreferenceSums, StepAssignment, StepReport, TrainerMessage, chat_message,
};
use dyad_proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION};
use tokio::sync::{Barrier, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// Barriers of all trainers and the measuring task.
#[derive(Debug)]
pub(crate) struct Stages {
    /// All trainers have joined.
    pub(crate) assigned: Barrier,
    /// All pairs are measured.
    pub(crate) planned: Barrier,
    /// The idle phase is over.
    pub(crate) rested: Barrier,
    /// The last step is done.
    pub(crate) trained: Barrier,
    /// Stands in for the all-reduce of a step.
    step: Barrier,
    /// Heartbeats before the first step.
    beats: u32,
}

impl Stages {
    pub(crate) fn new(trainers: usize, beats: u32) -> Arc<Self> {
        let all = || Barrier::new(trainers + 1);
        Arc::new(Self {
            assigned: all(),
            planned: all(),
            rested: all(),
            trained: all(),
            step: Barrier::new(trainers),
            beats,
        })
    }
}

struct Trainer {
    index: usize,
    outgoing: mpsc::UnboundedSender<TrainerMessage>,
    stages: Arc<Stages>,
    /// When this trainer reported each step.
    reported: Vec<Instant>,
}

/// Joins and follows the coordinator until the run ends. Returns when each step was reported.
pub(crate) async fn run(url: String, index: usize, stages: Arc<Stages>) -> Vec<Instant> {
    let access = Access::new(&url, None, None).unwrap();
    let channel = access.endpoint().unwrap().tcp_nodelay(true).connect().await.unwrap();
    let mut client = CoordinatorClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (outgoing, messages) = mpsc::unbounded_channel();
    let mut trainer = Trainer { index, outgoing, stages, reported: Vec::new() };
    trainer.send(Up::Hello(Hello {
        name: format!("trainer-{index}"),
        protocol_version: PROTOCOL_VERSION,
        device: "cpu".into(),
        launch_index: index as u32,
        ..Hello::default()
    }));
    let call = access.request(UnboundedReceiverStream::new(messages)).unwrap();
    let mut incoming = client.train(call).await.unwrap().into_inner();
    while let Some(message) = incoming.message().await.unwrap() {
        trainer.obey(message.body.unwrap()).await;
    }
    trainer.reported
}

impl Trainer {
    fn send(&self, body: Up) {
        self.outgoing.send(TrainerMessage { body: Some(body) }).unwrap();
    }

    fn beat(&self, phase: Phase, step: u64) {
        self.send(Up::Heartbeat(Heartbeat { phase: phase.into(), step, ..Heartbeat::default() }));
    }

    async fn obey(&mut self, message: Down) {
        match message {
            Down::Assignment(assignment) => {
                if assignment.rank == 0 {
                    let generation = assignment.generation;
                    let payload = b"meet here".to_vec();
                    self.send(Up::BootstrapOffer(BootstrapOffer { generation, payload }));
                }
                self.stages.assigned.wait().await;
            }
            Down::MeasureRequest(request) => {
                let lengths = request.pairs.iter().map(length).collect();
                self.send(Up::MeasureReport(MeasureReport {
                    split: request.split,
                    lengths,
                    refusal: None,
                    ..MeasureReport::default()
                }));
            }
            Down::RunPlan(_) => self.rest().await,
            Down::Step(step) => self.step(&step).await,
            Down::Finish(_) => {
                self.stages.trained.wait().await;
                self.send(Up::Finished(Finished {}));
            }
            Down::Abort(abort) => panic!("trainer {} was aborted: {abort:?}", self.index),
            _ => {}
        }
    }

    /// Sends only heartbeats, one per second, at a time within the second that depends on the index.
    async fn rest(&self) {
        self.stages.planned.wait().await;
        tokio::time::sleep(Duration::from_millis(self.index as u64 % 1000)).await;
        for _ in 0..self.stages.beats {
            self.beat(Phase::Training, 0);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.stages.rested.wait().await;
    }

    async fn step(&mut self, step: &StepAssignment) {
        self.beat(Phase::Training, step.step);
        self.stages.step.wait().await;
        self.send(Up::StepReport(StepReport {
            generation: step.generation,
            step: step.step,
            sums: Some(sums(&step.pairs)),
            grad_norm: 2.0,
            learning_rate: 1e-5,
            step_seconds: 0.5,
            phase_seconds: ["forward", "backward", "all_reduce", "optimizer"]
                .map(|phase| (phase.to_owned(), 0.1))
                .into(),
            ..StepReport::default()
        }));
        self.reported.push(Instant::now());
    }
}

fn text(message: &ChatMessage) -> &str {
    match &message.content {
        Some(chat_message::Content::Text(text)) => text,
        _ => "",
    }
}

fn length(pair: &Pair) -> PairLength {
    let text: usize = match &pair.content {
        Some(Content::Conversation(said)) => said.prompt.iter().map(|message| text(message).len()).sum(),
        Some(Content::Text(text)) => text.prompt.as_deref().map_or(0, str::len),
        None => 0,
    };
    PairLength {
        id: pair.id,
        verdict: PairVerdict::Kept.into(),
        prompt_tokens: (text / 4) as u32,
        chosen_tokens: 65,
        rejected_tokens: 65,
        cost: 1000 * text as u64,
        tokens_hash_high: 0,
        tokens_hash_low: pair.id,
        ..PairLength::default()
    }
}

fn sums(pairs: &[Pair]) -> PreferenceSums {
    let count = pairs.len() as u64;
    PreferenceSums {
        pairs: count,
        loss: 0.7 * count as f64,
        tokens: 400 * count,
        ..PreferenceSums::default()
    }
}
