//! Failing runs: the named cause, the messages to the other trainers, and the coordinator's exit status.

mod support;

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{self, Finished, Hello, MeasureReport, PairLength, PairVerdict, Split};
use dyad_proto::{ErrorCode, PROTOCOL_VERSION};
use support::{Coordinator, Trainer, Workspace};

/// Two trainers that have done step 1 of a long run.
async fn two_at_work(work: &Workspace) -> (Coordinator, Trainer, Trainer) {
    let coordinator = work.start(&["--world-size", "2"]).await;
    let mut first = coordinator.join("node0-cpu", 0).await;
    let mut second = coordinator.join("node1-cpu", 1).await;
    tokio::join!(first.train_until(1), second.train_until(1));
    coordinator.recorded(1).await;
    (coordinator, first, second)
}

fn long_run() -> Workspace {
    Workspace::new(8, 0, "max_steps = 1000")
}

#[tokio::test]
async fn death_of_a_trainer_names_it_and_stops_the_others() {
    let work = long_run();
    let (coordinator, mut first, second) = two_at_work(&work).await;
    let events = coordinator.watch();
    drop(second);
    let cause = first.aborted().await;
    let expected = "trainer rank 1 (node1-cpu) died: its connection closed during training, step ";
    assert!(cause.message.starts_with(expected), "{cause:?}");
    assert_eq!(cause.code(), wire::ErrorCode::Failed);
    drop(first);
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(1));
    assert!(ended.report().starts_with(&format!("error: {expected}")), "{}", ended.stderr);
    assert!(ended.report().contains("\n\nhint: "), "{}", ended.stderr);
    let last = events.await.unwrap().pop().unwrap().body.unwrap();
    assert!(matches!(last, EventBody::Ended(end) if end.failure == Some(cause)));
}

/// Rank 0 notices the broken communicator first; the cause is still rank 1.
#[tokio::test]
async fn echo_waits_for_the_genuine_cause() {
    let work = long_run();
    let (coordinator, mut first, mut second) = two_at_work(&work).await;
    let events = coordinator.watch();
    first.fail(ErrorCode::Echo, "all-reduce failed: connection reset by peer");
    second.fail(ErrorCode::InvalidInput, "model.safetensors has no tensor `lm_head.weight`");
    // Dropping a stream at once could discard messages in flight: wait until the coordinator ends it.
    while second.receive().await.is_some() {}
    while first.receive().await.is_some() {}
    drop((first, second));
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    let expected = "error: trainer rank 1 (node1-cpu): model.safetensors has no tensor `lm_head.weight`";
    assert!(ended.report().starts_with(expected), "{}", ended.stderr);
    events.await.unwrap();
}

#[tokio::test]
async fn refused_trainers_are_told_why_and_the_run_goes_on() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&["--world-size", "2"]).await;
    let hello = |name: &str| Hello {
        name: name.into(),
        device: "cpu".into(),
        protocol_version: PROTOCOL_VERSION,
        ..Hello::default()
    };
    let first = coordinator.join_as(hello("a")).await;
    let cases = [
        (Hello { protocol_version: 99, ..hello("b") }, "trainer b is refused: it speaks protocol version 99"),
        (hello("a"), "trainer a is refused: a trainer of that name has already joined"),
        (Hello { device: "cuda:0".into(), ..hello("b") }, "its device is cuda:0, but a has cpu"),
    ];
    for (hello, expected) in cases {
        let refusal = coordinator.join_as(hello).await.aborted().await;
        assert!(refusal.message.contains(expected), "{refusal:?}");
        assert_eq!((refusal.code(), refusal.origin.as_str()), (wire::ErrorCode::InvalidInput, "coordinator"));
    }
    let mut second = coordinator.join_as(hello("b")).await;
    assert!(matches!(second.receive().await, Some(Down::Welcome(_))));
    let third = coordinator.join_as(hello("c")).await.aborted().await;
    assert_eq!(third.message, "trainer c is refused: the run already has its 2 trainers");
    tokio::join!(first.run(), second.run());
    assert_eq!(coordinator.end().await.status, Some(0));
}

#[tokio::test]
async fn refusals_of_one_kind_are_one_line_and_a_count() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&["--world-size", "2", "--join-timeout-seconds", "5"]).await;
    let mut only = coordinator.join("a", 0).await;
    for _ in 0..100 {
        coordinator.join("a", 1).await.aborted().await;
    }
    only.aborted().await;
    drop(only);
    let log = coordinator.end().await.stderr;
    assert_eq!(log.matches(" trainer refused ").count(), 2, "{log}");
    assert!(log.contains("trainer refused again") && log.contains("times=99"), "{log}");
}

#[tokio::test]
async fn too_few_trainers_in_time_are_counted() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&["--world-size", "3", "--join-timeout-seconds", "1"]).await;
    let mut only = coordinator.join("node0-cpu", 0).await;
    assert!(only.aborted().await.message.starts_with("1 of 3 trainers joined within 1 s (node0-cpu)"));
    drop(only);
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(3));
    assert!(ended.report().contains("hint: see the logs of the missing trainers"), "{}", ended.stderr);
}

#[tokio::test]
async fn sigquit_interrupts_the_run_at_once() {
    let work = long_run();
    let (coordinator, mut first, mut second) = two_at_work(&work).await;
    let kill = std::process::Command::new("kill").args(["-QUIT", &coordinator.pid().to_string()]).status();
    assert!(kill.unwrap().success());
    for trainer in [&mut first, &mut second] {
        let cause = trainer.aborted().await;
        assert_eq!(
            (cause.code(), cause.message.as_str()),
            (wire::ErrorCode::Interrupted, "stopped by SIGQUIT")
        );
    }
    drop((first, second));
    assert_eq!(coordinator.end().await.status, Some(130));
}

#[tokio::test]
async fn sigterm_ends_the_run_after_the_work_in_progress() {
    let work = long_run();
    let (coordinator, first, second) = two_at_work(&work).await;
    let kill = std::process::Command::new("kill").args(["-TERM", &coordinator.pid().to_string()]).status();
    assert!(kill.unwrap().success());
    let (first, second) = tokio::join!(first.run(), second.run());
    assert_eq!(first.steps.len(), second.steps.len());
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(130));
    assert!(ended.report().starts_with("stopped  by SIGTERM"), "{}", ended.stderr);
}

#[tokio::test]
async fn trainer_that_leaves_early_breaks_the_protocol() {
    let work = long_run();
    let (coordinator, mut first, second) = two_at_work(&work).await;
    second.send(Up::Finished(Finished {}));
    let cause = first.aborted().await;
    assert!(cause.message.starts_with("trainer rank 1 (node1-cpu) broke the protocol"), "{cause:?}");
    drop((first, second));
    assert_eq!(coordinator.end().await.status, Some(1));
}

#[tokio::test]
async fn run_without_a_single_kept_pair_is_refused() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&["--world-size", "1"]).await;
    let mut trainer = coordinator.join("a", 0).await;
    while !matches!(trainer.receive().await, Some(Down::MeasureRequest(_))) {}
    let verdict = PairVerdict::DroppedTooLong.into();
    let lengths = (0..4).map(|id| PairLength { id, verdict, ..PairLength::default() }).collect();
    trainer.send(Up::MeasureReport(MeasureReport {
        split: Split::Train.into(),
        lengths,
        refusal: None,
        ..MeasureReport::default()
    }));
    let cause = trainer.aborted().await;
    assert!(
        cause
            .message
            .ends_with("train.jsonl is left: 4 pairs are too long (their prompts fill max_seq_length)"),
        "{cause:?}"
    );
    drop(trainer);
    assert_eq!(coordinator.end().await.status, Some(2));
}
