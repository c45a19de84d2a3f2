//! Valid and invalid bytes from the wire: decoders and conversions do not panic, and allocate memory in proportion to the input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::pair::Content;
use dyad_proto::wire::{
    Abort, Assignment, ChatMessage, CommunicatorReady, Conversation, CoordinatorMessage, Drain,
    EvaluationAssignment, Failure, Finish, Hold, KeepTrace, MeasureReport, MeasureRequest, Pair, PairLength,
    PlainText, ReferenceAssignment, ReferenceLogps, RunEvent, RunPlan, StepAssignment, TextParts,
    TrainerMessage, WatchRunRequest, Welcome, chat_message, trainer_message,
};
use dyad_proto::{Fault, RunConfig};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

/// Counts the bytes that this thread allocates.
struct Counting;

thread_local! {
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    // The counter is already destroyed while the thread ends.
    let _ = ASKED.try_with(|asked| asked.set(asked.get() + bytes));
}

// SAFETY: forwards all calls to the system allocator.
#[expect(unsafe_code, reason = "a global allocator")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An empty pair takes two bytes on the wire and 200 in memory; a growing vector allocates about three times its size.
const BYTES_PER_BYTE: usize = 320;
const BYTES_AT_LEAST: usize = 1 << 16;

/// Decodes a message and checks how much memory that allocated.
fn decode<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    let before = ASKED.get();
    let message = M::decode(bytes).ok();
    let asked = ASKED.get() - before;
    assert!(asked <= BYTES_AT_LEAST + BYTES_PER_BYTE * bytes.len(), "{asked} bytes for {}", bytes.len());
    message
}

fn pair() -> impl Strategy<Value = Pair> {
    let reference = proptest::option::of(
        (any::<f64>(), any::<f64>()).prop_map(|(chosen, rejected)| ReferenceLogps { chosen, rejected }),
    );
    let maybe = || proptest::option::of(".{0,20}");
    let said = proptest::option::of(prop_oneof![
        ".{0,20}".prop_map(chat_message::Content::Text),
        vec(".{0,9}", 0..3).prop_map(|texts| chat_message::Content::Parts(TextParts { texts })),
    ]);
    let message = (0..6_i32, said, maybe(), vec("(\\{\\}|.{0,9})", 0..2)).prop_map(
        |(role, content, reasoning, tool_calls)| ChatMessage {
            role,
            content,
            reasoning,
            tool_calls,
            ..ChatMessage::default()
        },
    );
    let messages = || vec(message.clone(), 0..3);
    let conversation =
        (messages(), messages(), messages(), maybe()).prop_map(|(prompt, chosen, rejected, tools)| {
            let chat_template_kwargs = tools.clone();
            Content::Conversation(Conversation { prompt, chosen, rejected, tools, chat_template_kwargs })
        });
    let text = (maybe(), ".{0,20}", maybe())
        .prop_map(|(prompt, chosen, rejected)| Content::Text(PlainText { prompt, chosen, rejected }));
    let content = proptest::option::of(prop_oneof![conversation, text]);
    let weight = proptest::option::of(any::<f64>());
    (any::<u64>(), content, reference, weight).prop_map(|(id, content, reference, weight)| Pair {
        id,
        content,
        reference,
        place: format!("a.jsonl line {id}"),
        weight,
        label: None,
    })
}

fn down() -> impl Strategy<Value = Down> {
    let pairs = || vec(pair(), 0..4);
    prop_oneof![
        (".{0,9}", "\\PC{0,60}").prop_map(|(run_id, run_config_json)| Down::Welcome(Welcome {
            run_id,
            run_config_json,
            ..Welcome::default()
        })),
        (any::<u64>(), any::<u32>(), any::<u32>()).prop_map(|(generation, rank, world_size)| {
            Down::Assignment(Assignment { generation, rank, world_size })
        }),
        (any::<u64>(), vec(any::<u8>(), 0..140)).prop_map(|(generation, payload)| Down::CommunicatorReady(
            CommunicatorReady { generation, payload }
        )),
        (any::<i32>(), pairs())
            .prop_map(|(split, pairs)| Down::MeasureRequest(MeasureRequest { split, pairs })),
        any::<u64>().prop_map(|total_steps| Down::RunPlan(RunPlan { total_steps, ..RunPlan::default() })),
        (any::<u64>(), pairs()).prop_map(|(step, pairs)| {
            Down::Step(StepAssignment { step, pairs, ..StepAssignment::default() })
        }),
        (any::<u64>(), pairs()).prop_map(|(step, pairs)| {
            Down::Evaluation(EvaluationAssignment { step, pairs, ..EvaluationAssignment::default() })
        }),
        (any::<u64>(), pairs()).prop_map(|(chunk, pairs)| {
            Down::Reference(ReferenceAssignment { chunk, pairs, ..ReferenceAssignment::default() })
        }),
        (any::<i32>(), ".{0,20}").prop_map(|(code, message)| {
            Down::Abort(Abort { cause: Some(Failure { code, message, ..Failure::default() }) })
        }),
        (0..9u64, any::<bool>())
            .prop_map(|(best_step, early_stopped)| Down::Finish(Finish { best_step, early_stopped })),
        Just(Down::Hold(Hold {})),
        any::<u64>().prop_map(|step| Down::KeepTrace(KeepTrace { step })),
        any::<u64>().prop_map(|works| Down::Drain(Drain { works })),
    ]
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let wounds = vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let message = (down(), wounds).prop_map(|(body, wounds)| {
        let mut bytes = CoordinatorMessage { body: Some(body) }.encode_to_vec();
        for (at, byte) in wounds {
            let at = at.index(bytes.len() + 1);
            match byte % 3 {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, byte),
                _ => bytes.iter_mut().skip(at).take(1).for_each(|it| *it = byte),
            }
        }
        bytes
    });
    prop_oneof![3 => message, 1 => vec(any::<u8>(), 0..300)]
}

/// Converts a message as a trainer does before it computes.
fn take(body: Down) {
    let pairs = match body {
        Down::Welcome(welcome) => {
            let _ = RunConfig::from_json(&welcome.run_config_json);
            return;
        }
        Down::Abort(abort) => {
            let _ = abort.cause.map(|cause| Fault::from(cause).report());
            return;
        }
        Down::MeasureRequest(request) => request.pairs,
        Down::Step(step) => step.pairs,
        Down::Evaluation(evaluation) => evaluation.pairs,
        Down::Reference(reference) => reference.pairs,
        Down::Assignment(_) | Down::CommunicatorReady(_) | Down::RunPlan(_) => return,
        Down::Finish(_) | Down::Hold(_) | Down::Drain(_) | Down::KeepTrace(_) => return,
        Down::Recorded(_) | Down::Posting(_) | Down::Beat(_) => return,
    };
    for pair in pairs {
        let _ = pair.into_example();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_a_decoder_or_a_conversion_panic(bytes in mutated()) {
        if let Some(body) = decode::<CoordinatorMessage>(&bytes).and_then(|message| message.body) {
            take(body);
        }
        let sent = decode::<TrainerMessage>(&bytes).and_then(|message| message.body);
        if let Some(trainer_message::Body::Failure(failure)) = sent {
            let _ = Fault::from(failure).report();
        }
        decode::<RunEvent>(&bytes);
        decode::<WatchRunRequest>(&bytes);
    }

    #[test]
    fn no_text_makes_a_configuration_panic(text in ".{0,80}", key in "[a-z_]{1,20}", value in any::<f64>()) {
        let _ = RunConfig::from_json(&text);
        let _ = RunConfig::from_json(&serde_json::json!({ key: value }).to_string());
    }
}

/// The worst case: elements that take two bytes each.
#[test]
fn memory_stays_in_proportion_to_the_bytes() {
    let pairs = vec![Pair::default(); 200_000];
    let request = MeasureRequest { split: 1, pairs };
    let bytes = CoordinatorMessage { body: Some(Down::MeasureRequest(request)) }.encode_to_vec();
    assert!(bytes.len() < 500_000);
    assert!(decode::<CoordinatorMessage>(&bytes).is_some());
    let lengths = vec![PairLength::default(); 200_000];
    let report = MeasureReport { split: 1, lengths, refusal: None, ..MeasureReport::default() };
    let body = Some(trainer_message::Body::MeasureReport(report));
    assert!(decode::<TrainerMessage>(&TrainerMessage { body }.encode_to_vec()).is_some());
    // A claimed length beyond the end of the message is an error and allocates nothing.
    let claims = [0x22, 0xff, 0xff, 0xff, 0xff, 0x0f];
    assert!(decode::<TrainerMessage>(&claims).is_none() && decode::<CoordinatorMessage>(&claims).is_none());
}
