//! Fuzz tests of the wire protocol: no message makes the coordinator panic, and unknown peers cannot end the run.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::{Duration, Instant};

use dyad_coordinator::run::membership::TrainerId;
use dyad_coordinator::run::training::GENERATION;
use dyad_coordinator::run::{Command, Event, Run};
use dyad_proto::PROTOCOL_VERSION;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{
    BootstrapOffer, CheckpointReport, DrainRequest, EvaluationReport, Failure, Finished, Heartbeat, Held,
    Hello, MeasureReport, ModelReport, PairLength, PairReference, Posting, PreferenceSums, ReferenceLogps,
    ReferenceReport, StepReport, TrainerMessage,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use prost::Message;
use support::Workspace;
use support::spec::{hello, measured, spec};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

const PAIRS: usize = 12;
const IDS: [TrainerId; 2] = [TrainerId(1), TrainerId(2)];
const STRANGER: TrainerId = TrainerId(3);

/// Stage of the run when it gets the fuzzed messages.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Joining,
    Measuring,
    Training,
}

fn run_at(stage: Stage, now: Instant) -> Run {
    let mut run = Run::new(spec(PAIRS), now);
    if matches!(stage, Stage::Joining) {
        return run;
    }
    for id in IDS {
        run.handle(now, Event::Message(id, hello(id)));
    }
    if matches!(stage, Stage::Training) {
        run.handle(now, Event::Message(IDS[0], Up::MeasureReport(measured(PAIRS))));
    }
    run
}

/// Valid numbers, numbers close to valid ones, and any number.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..4_u64, Just(GENERATION), Just(PAIRS as u64), any::<u64>()]
}

fn real() -> impl Strategy<Value = f64> {
    prop_oneof![any::<f64>(), Just(f64::NAN), Just(f64::INFINITY), 0.0..2.0]
}

fn sums() -> impl Strategy<Value = Option<PreferenceSums>> {
    let sums =
        (number(), real(), real(), number(), number()).prop_map(|(pairs, loss, kl, tokens, correct)| {
            PreferenceSums {
                pairs,
                loss,
                nll: kl,
                kl_chosen: kl,
                chosen_tokens: correct,
                chosen_tokens_correct: pairs,
                tokens,
                completion_tokens: tokens,
                kl_tokens: correct,
                aux_loss: 0.0,
                rewards_correct: correct,
                ..PreferenceSums::default()
            }
        });
    proptest::option::of(sums)
}

fn references() -> impl Strategy<Value = Vec<PairReference>> {
    let logps = proptest::option::of(
        (real(), real()).prop_map(|(chosen, rejected)| ReferenceLogps { chosen, rejected }),
    );
    vec((number(), logps).prop_map(|(id, logps)| PairReference { id, logps }), 0..4)
}

/// Valid and invalid verdicts.
fn strange_verdict(number: i32) -> i32 {
    [0, 1, 2, 3, 4, 5, 70, 71, 72, -1][number.rem_euclid(10) as usize]
}

fn lengths() -> impl Strategy<Value = MeasureReport> {
    let length = (number(), any::<i32>(), any::<u32>(), any::<u32>(), any::<u64>()).prop_map(
        |(id, verdict, prompt_tokens, chosen_tokens, cost)| PairLength {
            id,
            verdict: strange_verdict(verdict),
            prompt_tokens,
            chosen_tokens,
            rejected_tokens: chosen_tokens,
            cost,
            ..PairLength::default()
        },
    );
    let all = (any::<u64>(), any::<i32>(), any::<u32>()).prop_map(|(cost, verdict, tokens)| {
        let verdict = strange_verdict(verdict);
        let strange = |length| PairLength { verdict, cost, prompt_tokens: tokens, ..length };
        measured(PAIRS).lengths.into_iter().map(strange).collect()
    });
    let refusal = proptest::option::of(Just(dyad_proto::Fault::input("no").into()));
    (0..4_i32, prop_oneof![vec(length, 0..14), all], refusal).prop_map(|(split, lengths, refusal)| {
        MeasureReport { split, lengths, refusal, ..MeasureReport::default() }
    })
}

fn body() -> impl Strategy<Value = Up> {
    let text = || ".{0,20}";
    prop_oneof![
        (text(), any::<u32>(), text(), any::<u32>()).prop_map(|(name, version, device, launch_index)| {
            let protocol_version = if version % 2 == 0 { PROTOCOL_VERSION } else { version };
            Up::Hello(Hello { name, protocol_version, device, launch_index, ..Hello::default() })
        }),
        (any::<i32>(), number()).prop_map(|(phase, step)| Up::Heartbeat(Heartbeat {
            phase: phase % 9,
            step,
            ..Heartbeat::default()
        })),
        (number(), vec(any::<u8>(), 0..2000))
            .prop_map(|(generation, payload)| Up::BootstrapOffer(BootstrapOffer { generation, payload })),
        (number(), text(), vec(any::<u8>(), 0..2000))
            .prop_map(|(generation, key, value)| Up::Posting(Posting { generation, key, value })),
        lengths().prop_map(Up::MeasureReport),
        (number(), number(), sums(), real(), references()).prop_map(
            |(generation, step, sums, real, references)| {
                let phase_seconds = [("forward".to_owned(), real)].into();
                Up::StepReport(StepReport {
                    generation,
                    step,
                    sums,
                    references,
                    phase_seconds,
                    grad_norm: real,
                    learning_rate: real,
                    step_seconds: real,
                    peak_memory_bytes: step,
                    started_unix_nanos: step,
                    flops: real,
                })
            }
        ),
        (number(), number(), sums(), real()).prop_map(|(generation, step, sums, seconds)| {
            Up::EvaluationReport(EvaluationReport { generation, step, sums, seconds, samples: Vec::new() })
        }),
        (number(), text(), any::<bool>(), real()).prop_map(|(step, path, last, seconds)| {
            Up::CheckpointReport(CheckpointReport { step, path, r#final: last, seconds })
        }),
        (any::<i32>(), text(), text()).prop_map(|(code, message, origin)| {
            Up::Failure(Failure { code: code % 8, message, origin, ..Failure::default() })
        }),
        Just(Up::Finished(Finished {})),
        Just(Up::DrainRequest(DrainRequest {})),
        number().prop_map(|works| Up::Held(Held { works })),
        (text(), number(), real()).prop_map(|(architecture, parameters, load_seconds)| {
            Up::ModelReport(ModelReport { architecture, parameters, load_seconds, ..ModelReport::default() })
        }),
        (number(), number(), references()).prop_map(|(generation, chunk, references)| {
            Up::ReferenceReport(ReferenceReport { generation, chunk, references })
        }),
    ]
}

/// An encoded message with some bytes changed, removed or inserted; sometimes random bytes.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let wounds = vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 0..4);
    let mutated = (body(), wounds).prop_map(|(body, wounds)| {
        let mut bytes = TrainerMessage { body: Some(body) }.encode_to_vec();
        for (at, byte, kind) in wounds {
            let at = at.index(bytes.len() + 1);
            match kind {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, byte),
                _ if at == bytes.len() => bytes.push(byte),
                2 => bytes[at] = byte,
                _ => drop(bytes.remove(at)),
            }
        }
        bytes
    });
    prop_oneof![4 => mutated, 1 => vec(any::<u8>(), 0..200)]
}

/// Encodes rows as the engine would, without writing files.
fn read(commands: Vec<Command>) {
    for command in commands {
        if let Command::Record(done) = command
            && let Some(row) = done.row
        {
            let _ = (row.to_json(), row.values());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Messages of members and strangers go through the whole state machine in every stage.
    #[test]
    fn the_run_survives_every_message(
        stage in prop_oneof![Just(Stage::Joining), Just(Stage::Measuring), Just(Stage::Training)],
        messages in vec((0..3_usize, bytes()), 1..6),
    ) {
        let now = Instant::now();
        let mut run = run_at(stage, now);
        for (sender, bytes) in messages {
            let id = [IDS[0], IDS[1], STRANGER][sender];
            let event = match TrainerMessage::decode(&bytes[..]) {
                Ok(TrainerMessage { body: Some(body) }) => Event::Message(id, body),
                Ok(TrainerMessage { body: None }) => continue,
                Err(error) => Event::Unreadable(id, error.to_string()),
            };
            read(run.handle(now, event));
            read(run.handle(now, Event::Tick));
        }
        let _ = run.outcome(now + Duration::from_secs(60));
    }
}

/// A codec that sends raw bytes instead of messages.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = tonic::Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = ();
    type Error = tonic::Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        bytes::Buf::advance(buffer, bytes::Buf::remaining(buffer));
        Ok(Some(()))
    }
}

/// Whether the coordinator would admit the sender; the end of its stream would then end the run.
fn is_welcome(bytes: &[u8]) -> bool {
    let message = TrainerMessage::decode(bytes).ok().and_then(|message| message.body);
    matches!(message, Some(Up::Hello(hello)) if hello.protocol_version == PROTOCOL_VERSION)
}

/// Sends 300 streams of fuzzed messages, each on its own call, while the coordinator waits for its trainer.
#[tokio::test]
async fn the_port_survives_every_message() {
    let work = Workspace::new(4, 0, "");
    let mut command = work.command(&["--world-size", "1"]);
    // Otherwise the log lines about refusals would fill the pipe.
    command.env("DYAD_LOG", "error");
    let coordinator = work.start_as(command, None).await;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = vec(bytes().prop_filter("a trainer", |bytes| !is_welcome(bytes)), 1..4);
    let channel = coordinator.trainers.endpoint().unwrap().connect().await.unwrap();
    for _ in 0..300 {
        let messages = strategy.new_tree(&mut runner).unwrap().current();
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.unwrap();
        let call = tonic::Request::new(tokio_stream::iter(messages));
        let path = tonic::codegen::http::uri::PathAndQuery::from_static("/dyad.v1.Coordinator/Train");
        // The call is refused at once, or accepted and ended later.
        if let Ok(answer) = support::soon("an answer", client.streaming(call, path, Raw)).await {
            let mut answers = answer.into_inner();
            while let Ok(Some(())) = support::soon("the stream's end", answers.message()).await {}
        }
    }
    coordinator.join("node0-cpu", 0).await.run().await;
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(ended.stderr, "");
}
