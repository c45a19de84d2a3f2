//! Tests of the run's state machine with simulated time: deadlines, windows, wrong reports.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::{Duration, Instant};

use dyad_coordinator::run::failure::ECHO_HOLD_BACK;
use dyad_coordinator::run::membership::TrainerId;
use dyad_coordinator::run::training::GENERATION;
use dyad_coordinator::run::{Command, Event, FAREWELL, Run};
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{
    CheckpointReport, DrainRequest, EvaluationReport, Finished, Heartbeat, Held, MeasureReport, Phase,
    Posting, PreferenceSums, StepReport,
};
use dyad_proto::{ErrorCode, Fault, silence};
use support::spec::{hello, measured, spec};

const A: TrainerId = TrainerId(1);
const B: TrainerId = TrainerId(2);

const PAIRS: usize = 40;
const SILENCE: Duration = Duration::from_secs(silence::TRAINER as u64);

/// A run of 20 steps of 2 pairs for trainers A (rank 0) and B (rank 1).
struct Bench {
    run: Run,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        Self { run: Run::new(spec(PAIRS), now), now }
    }

    /// Both trainers have joined, and measured everything.
    fn at_work() -> (Self, Vec<Command>) {
        let mut bench = Self::new();
        bench.hello(A);
        bench.hello(B);
        let commands = bench.send(A, Up::MeasureReport(measured(PAIRS)));
        (bench, commands)
    }

    fn send(&mut self, id: TrainerId, message: Up) -> Vec<Command> {
        self.run.handle(self.now, Event::Message(id, message))
    }

    fn hello(&mut self, id: TrainerId) -> Vec<Command> {
        self.send(id, hello(id))
    }

    fn report(&mut self, id: TrainerId, step: u64, pairs: u64) -> Vec<Command> {
        let sums = Some(PreferenceSums { pairs, ..PreferenceSums::default() });
        self.send(
            id,
            Up::StepReport(StepReport { generation: GENERATION, step, sums, ..StepReport::default() }),
        )
    }

    /// Lets time pass tick by tick; returns all commands.
    fn after(&mut self, time: Duration) -> Vec<Command> {
        let end = self.now + time;
        let mut commands = Vec::new();
        while self.now < end {
            self.now = end.min(self.now + Duration::from_millis(200));
            commands.extend(self.run.handle(self.now, Event::Tick));
        }
        commands
    }

    /// The error with which the run ended, once [`FAREWELL`] is over; `None` without one.
    fn failure(&self) -> Option<Fault> {
        self.run.outcome(self.now + FAREWELL).and_then(Result::err)
    }
}

/// Ranks exchange addresses through the coordinator, which bounds number and size of the postings.
#[test]
fn postings_reach_all_ranks_and_are_bounded() {
    let posting = |generation: u64, value: usize| {
        Up::Posting(Posting { generation, key: "rank-1".into(), value: vec![7; value] })
    };
    let mut bench = Bench::new();
    bench.hello(A);
    bench.send(A, posting(GENERATION, 10));
    assert!(bench.failure().unwrap().message.contains("posted something out of turn"));
    let (mut bench, _) = Bench::at_work();
    for _ in 0..64 {
        let commands = bench.send(B, posting(GENERATION, 10));
        let to = commands.iter().filter_map(|command| match command {
            Command::Send(to, Down::Posting(posting)) => Some((*to, posting.value.len())),
            _ => None,
        });
        assert_eq!(to.collect::<Vec<_>>(), [(A, 10), (B, 10)]);
    }
    bench.send(B, posting(GENERATION, 10));
    let failure = bench.failure().unwrap();
    assert!(failure.message.contains("posted more than the protocol allows"), "{failure}");
    let (mut bench, _) = Bench::at_work();
    bench.send(B, posting(GENERATION, (1 << 20) + 1));
    assert!(bench.failure().unwrap().message.contains("posted more than the protocol allows"));
}

fn beat(phase: Phase, step: u64) -> Heartbeat {
    Heartbeat { phase: phase.into(), step, ..Heartbeat::default() }
}

fn steps_for(id: TrainerId, commands: &[Command]) -> Vec<u64> {
    let step = |command: &Command| match command {
        Command::Send(to, Down::Step(step)) if *to == id => Some(step.step),
        _ => None,
    };
    commands.iter().filter_map(step).collect()
}

#[test]
fn works_are_sent_four_ahead_of_the_slowest_rank() {
    let (mut bench, commands) = Bench::at_work();
    assert_eq!(steps_for(A, &commands), [1, 2, 3, 4]);
    assert_eq!(steps_for(B, &commands), [1, 2, 3, 4]);
    let commands = bench.report(A, 1, 1);
    assert!(steps_for(A, &commands).is_empty(), "rank 1 has not reported step 1");
    let commands = bench.report(B, 1, 1);
    assert_eq!((steps_for(A, &commands), steps_for(B, &commands)), (vec![5], vec![5]));
}

#[test]
fn rank_0_is_told_of_a_step_only_after_its_row() {
    let (mut bench, _) = Bench::at_work();
    let told = |command: &Command| match command {
        Command::Record(_) => Some("row".to_owned()),
        Command::Send(id, Down::Recorded(recorded)) => {
            assert_eq!(*id, A);
            Some(format!("recorded {}", recorded.step))
        }
        _ => None,
    };
    let words = |commands: &[Command]| commands.iter().filter_map(told).collect::<Vec<String>>();
    assert!(words(&bench.report(A, 1, 1)).is_empty(), "rank 1 has not reported step 1");
    assert_eq!(words(&bench.report(B, 1, 1)), ["row", "recorded 1"]);
    bench.run.handle(bench.now, Event::Drain("SIGTERM".into()));
    assert!(words(&bench.report(B, 2, 1)).is_empty());
    assert_eq!(words(&bench.report(A, 2, 1)), ["row", "recorded 2"]);
}

/// The steps sent to a trainer that are saved, each with whether it is saved only because of the time.
fn saved_by(id: TrainerId, commands: &[Command]) -> Vec<(u64, bool)> {
    let step = |command: &Command| match command {
        Command::Send(to, Down::Step(step)) if *to == id && step.checkpoint => {
            Some((step.step, step.rotates))
        }
        _ => None,
    };
    commands.iter().filter_map(step).collect()
}

/// One clock decides for all ranks; the test sets it.
#[test]
fn a_step_is_saved_if_none_was_for_half_an_hour() {
    let (mut bench, commands) = Bench::at_work();
    assert!(saved_by(A, &commands).is_empty());
    let mut saved = Vec::new();
    for step in 1..=19 {
        bench.now += Duration::from_secs(7 * 60);
        bench.report(A, step, 1);
        let commands = bench.report(B, step, 1);
        assert_eq!(saved_by(A, &commands), saved_by(B, &commands));
        saved.extend(saved_by(A, &commands));
        // The row of a step that is saved must be synced before its checkpoint may appear.
        let durable = commands.iter().any(|command| matches!(command, Command::Record(done) if done.durable));
        assert_eq!(durable, saved.iter().any(|(saved, _)| *saved == step), "step {step}");
    }
    // Steps go out four ahead: the fifth report (at 35 minutes) sends step 9. Step 20 writes the final model.
    assert_eq!(saved, [(9, true), (14, true), (19, true)]);
}

#[test]
fn a_checkpoint_by_steps_delays_the_next_one_by_time() {
    let now = Instant::now();
    let mut spec = spec(PAIRS);
    (spec.config.save_steps, spec.config.save_minutes) = (Some(6), 30.0);
    let mut bench = Bench { run: Run::new(spec, now), now };
    bench.hello(A);
    bench.hello(B);
    bench.send(A, Up::MeasureReport(measured(PAIRS)));
    let mut saved = Vec::new();
    for step in 1..=19 {
        bench.now += Duration::from_secs(11 * 60);
        bench.report(A, step, 1);
        saved.extend(saved_by(A, &bench.report(B, step, 1)));
    }
    assert_eq!(saved, [(6, false), (9, true), (12, false), (15, true), (18, false)]);
}

/// The number of works in the Drain message to a trainer, if one was sent.
fn drained_to(id: TrainerId, commands: &[Command]) -> Option<u64> {
    commands.iter().find_map(|command| match command {
        Command::Send(to, Down::Drain(drain)) if *to == id => Some(drain.works),
        _ => None,
    })
}

#[test]
fn an_early_end_stops_all_ranks_after_the_work_of_the_furthest() {
    let (mut bench, _) = Bench::at_work();
    let commands = bench.run.handle(bench.now, Event::Drain("SIGTERM".into()));
    let held = commands.iter().filter(|command| matches!(command, Command::Send(_, Down::Hold(_)))).count();
    assert_eq!(held, 2);
    // A reports step 1 while the coordinator waits: no further step is handed out.
    assert!(steps_for(A, &bench.report(A, 1, 1)).is_empty());
    assert_eq!(drained_to(A, &bench.send(A, Up::Held(Held { works: 2 }))), None);
    let commands = bench.send(B, Up::Held(Held { works: 1 }));
    assert_eq!((drained_to(A, &commands), drained_to(B, &commands)), (Some(2), Some(2)));
    // A second signal of the same kind changes nothing here.
    assert!(bench.run.handle(bench.now, Event::Drain("SIGTERM".into())).is_empty());
    for (id, step) in [(A, 2), (B, 1), (B, 2)] {
        bench.report(id, step, 1);
    }
    bench.send(
        A,
        Up::CheckpointReport(CheckpointReport {
            step: 2,
            path: "out/checkpoint-2".into(),
            r#final: false,
            seconds: 0.5,
        }),
    );
    bench.send(A, Up::Finished(Finished {}));
    assert_eq!(bench.failure(), None);
    bench.send(B, Up::Finished(Finished {}));
    let fault = bench.failure().unwrap();
    assert_eq!(fault.code, ErrorCode::Interrupted);
    assert_eq!(fault.message, "stopped by SIGTERM after step 2; the checkpoint is out/checkpoint-2");
    assert_eq!(fault.hint, "the same command with --resume goes on from checkpoint-2");
}

#[test]
fn a_drain_request_of_one_trainer_ends_the_run_on_all() {
    let (mut bench, _) = Bench::at_work();
    let commands = bench.send(B, Up::DrainRequest(DrainRequest {}));
    assert!(commands.iter().any(|command| matches!(command, Command::Send(to, Down::Hold(_)) if *to == A)));
    bench.send(A, Up::Held(Held { works: 0 }));
    assert_eq!(drained_to(A, &bench.send(B, Up::Held(Held { works: 0 }))), Some(0));
    bench.send(A, Up::Finished(Finished {}));
    bench.send(B, Up::Finished(Finished {}));
    let fault = bench.failure().unwrap();
    assert_eq!(fault.message, "stopped by a signal to trainer rank 1 (t2) before another step was done");
    assert!(fault.hint.contains("start again"), "{fault}");
}

#[test]
fn an_early_end_before_the_first_step_ends_the_run_at_once() {
    let mut bench = Bench::new();
    bench.hello(A);
    bench.run.handle(bench.now, Event::Drain("SIGTERM".into()));
    assert_eq!(bench.failure().unwrap().message, "stopped by SIGTERM before the first step");
}

#[test]
fn wrong_held_or_finished_messages_in_an_early_end_fail_the_run() {
    let (mut bench, _) = Bench::at_work();
    bench.send(A, Up::Held(Held { works: 1 }));
    assert!(bench.failure().unwrap().message.contains("held when it was not asked to"));
    for works in [[5, 5], [1, 1]] {
        let (mut bench, _) = Bench::at_work();
        bench.run.handle(bench.now, Event::Drain("SIGTERM".into()));
        // More works than were sent, or two answers.
        works.into_iter().for_each(|works| drop(bench.send(A, Up::Held(Held { works }))));
        assert!(bench.failure().unwrap().message.contains("held when it was not asked to"));
    }
    let (mut bench, _) = Bench::at_work();
    bench.run.handle(bench.now, Event::Drain("SIGTERM".into()));
    bench.send(A, Up::Finished(Finished {}));
    assert!(bench.failure().unwrap().message.contains("finished before it was told to"));
}

#[test]
fn silent_trainer_is_named_with_phase_and_step() {
    let (mut bench, _) = Bench::at_work();
    bench.after(SILENCE);
    bench.send(A, Up::Heartbeat(beat(Phase::Training, 4)));
    bench.send(B, Up::Heartbeat(beat(Phase::Evaluating, 3)));
    bench.after(SILENCE);
    assert_eq!(bench.failure(), None);
    bench.send(A, Up::Heartbeat(beat(Phase::Training, 4)));
    bench.after(Duration::from_secs(1));
    let fault = bench.failure().unwrap();
    assert!(fault.message.starts_with("trainer rank 1 (t2)"), "{fault}");
    assert!(fault.message.ends_with("no sign of life for 30 s during evaluation, step 3"), "{fault}");
}

#[test]
fn echo_is_used_only_if_no_genuine_cause_comes() {
    let (mut bench, _) = Bench::at_work();
    bench.send(A, Up::Failure(Fault::new(ErrorCode::Echo, "connection reset by peer").into()));
    bench.after(ECHO_HOLD_BACK - Duration::from_millis(1));
    assert_eq!(bench.failure(), None);
    bench.after(Duration::from_millis(1));
    let fault = bench.failure().unwrap();
    assert_eq!((fault.code, fault.message.as_str()), (ErrorCode::Failed, "connection reset by peer"));
    assert_eq!(fault.origin, "trainer rank 0 (t1)");
}

#[test]
fn first_genuine_cause_stays_the_cause() {
    let (mut bench, _) = Bench::at_work();
    bench.send(A, Up::Failure(Fault::new(ErrorCode::Echo, "connection reset by peer").into()));
    bench.run.handle(bench.now, Event::Closed(B));
    bench.run.handle(bench.now, Event::Closed(A));
    bench.run.handle(bench.now, Event::Fault(Fault::new(ErrorCode::Interrupted, "stopped by SIGTERM")));
    bench.after(ECHO_HOLD_BACK);
    assert!(bench.failure().unwrap().message.starts_with("trainer rank 1 (t2) died: its connection closed"));
}

#[test]
fn end_waits_for_open_streams_but_not_forever() {
    let (mut bench, _) = Bench::at_work();
    bench.run.handle(bench.now, Event::Fault(Fault::failed("disk full")));
    bench.run.handle(bench.now, Event::Closed(A));
    assert!(bench.run.outcome(bench.now).is_none(), "B is still connected");
    assert!(bench.run.outcome(bench.now + FAREWELL).is_some());
    bench.run.handle(bench.now, Event::Closed(B));
    assert_eq!(bench.run.outcome(bench.now), Some(Err(Fault::failed("disk full"))));
}

/// The number of pairs that the ranks report must match the assigned pairs.
#[test]
fn a_wrong_number_of_reported_pairs_fails_the_run() {
    let (mut bench, _) = Bench::at_work();
    bench.report(A, 1, 1);
    bench.report(B, 1, 2);
    let fault = bench.failure().unwrap();
    assert!(fault.message.contains("step 1, in which the ranks counted 3 pairs of 2"), "{fault}");
}

#[test]
fn reports_out_of_turn_fail_the_run() {
    for (step, expected) in [(9, "reported step 9, which it does not hold"), (1, "reported step 1 twice")] {
        let (mut bench, _) = Bench::at_work();
        bench.report(B, 1, 1);
        bench.report(B, step, 1);
        let fault = bench.failure().unwrap();
        assert!(fault.message.ends_with(expected), "{fault}");
    }
}

/// A wrong hint would lead in a circle: --resume finds no checkpoint, and a fresh start is refused.
#[test]
fn the_hint_of_a_failure_depends_on_the_last_checkpoint() {
    let (mut bench, _) = Bench::at_work();
    bench.run.handle(bench.now, Event::Fault(Fault::failed("gone").hint("look")));
    assert_eq!(bench.failure().unwrap().hint, "look", "nothing was trained");
    let trained = || {
        let (mut bench, _) = Bench::at_work();
        bench.report(A, 1, 1);
        bench.report(B, 1, 1);
        bench
    };
    let mut bench = trained();
    bench.run.handle(bench.now, Event::Fault(Fault::failed("gone").hint("look")));
    let hint = bench.failure().unwrap().hint;
    assert!(hint.starts_with("look; no checkpoint was written yet: start again with --overwrite"), "{hint}");
    let mut bench = trained();
    let saved = CheckpointReport { step: 1, path: "out/checkpoint-1".into(), r#final: false, seconds: 0.5 };
    bench.send(A, Up::CheckpointReport(saved));
    bench.run.handle(bench.now, Event::Fault(Fault::failed("gone")));
    assert_eq!(bench.failure().unwrap().hint, "the same command with --resume goes on from checkpoint-1");
    let mut bench = trained();
    bench.run.handle(bench.now, Event::Fault(Fault::input("wrong").hint("look")));
    assert_eq!(bench.failure().unwrap().hint, "look", "the same input would fail again");
}

/// A run of 20 steps of two pairs with an evaluation after every fourth; A and B have measured everything.
fn evaluated(change: impl FnOnce(&mut dyad_proto::RunConfig)) -> (Bench, Vec<Command>) {
    let now = Instant::now();
    let mut bench = Bench { run: Run::new(support::spec::evaluated_spec(PAIRS, change), now), now };
    bench.hello(A);
    bench.hello(B);
    bench.send(A, Up::MeasureReport(measured(PAIRS)));
    let commands = bench.send(B, Up::MeasureReport(MeasureReport { split: 2, ..measured(2) }));
    (bench, commands)
}

fn evaluations_for(id: TrainerId, commands: &[Command]) -> Vec<u64> {
    let step = |command: &Command| match command {
        Command::Send(to, Down::Evaluation(evaluation)) if *to == id => Some(evaluation.step),
        _ => None,
    };
    commands.iter().filter_map(step).collect()
}

fn stopping(config: &mut dyad_proto::RunConfig) {
    (config.early_stopping_enabled, config.eval_steps, config.eval_on_start) = (true, Some(4), false);
}

/// Both ranks report the step, and the evaluation after it with this loss.
fn evaluate(bench: &mut Bench, step: u64, loss: f64) -> Vec<Command> {
    let report = |id| {
        let sums = Some(PreferenceSums { pairs: 1, loss, ..PreferenceSums::default() });
        (id, EvaluationReport { generation: GENERATION, step, sums, ..EvaluationReport::default() })
    };
    let reports = [report(A), report(B)];
    reports.into_iter().flat_map(|(id, report)| bench.send(id, Up::EvaluationReport(report))).collect()
}

#[test]
fn with_early_stopping_no_step_is_sent_before_an_evaluation_is_decided() {
    let (mut bench, commands) = evaluated(stopping);
    assert_eq!(steps_for(A, &commands), [1, 2, 3, 4]);
    assert_eq!(saved_by(A, &commands), [(4, true)]);
    let mut sent = Vec::new();
    for (id, step) in (1..=4).flat_map(|step| [(A, step), (B, step)]) {
        sent.extend(bench.report(id, step, 1));
    }
    assert_eq!((evaluations_for(B, &sent), steps_for(B, &sent)), (vec![4], vec![]));
    let commands = evaluate(&mut bench, 4, 0.5);
    assert_eq!(steps_for(B, &commands), [5, 6, 7, 8]);
    // Without early stopping works are sent ahead as always.
    let (mut bench, _) = evaluated(|config| (config.eval_steps, config.eval_on_start) = (Some(4), false));
    assert_eq!(evaluations_for(A, &bench.report(A, 1, 1)), [] as [u64; 0]);
    assert_eq!(evaluations_for(A, &bench.report(B, 1, 1)), [4]);
}

#[test]
fn a_run_that_stops_early_finishes_with_the_best_step() {
    let (mut bench, _) = evaluated(stopping);
    let mut all = Vec::new();
    for (block, loss) in [(0, 0.9), (1, 0.4), (2, 0.5), (3, 0.6)] {
        for (id, step) in (block * 4 + 1..=block * 4 + 4).flat_map(|step| [(A, step), (B, step)]) {
            all.extend(bench.report(id, step, 1));
        }
        all.extend(evaluate(&mut bench, block * 4 + 4, loss));
    }
    let kept = |command: &Command| match command {
        Command::Send(B, Down::Step(step)) if step.checkpoint => Some((step.step, step.best_step)),
        _ => None,
    };
    assert_eq!(all.iter().filter_map(kept).collect::<Vec<_>>(), [(8, 4), (12, 8), (16, 8)]);
    let finish = |command: &Command| match command {
        Command::Send(B, Down::Finish(finish)) => Some((finish.best_step, finish.early_stopped)),
        _ => None,
    };
    assert_eq!(all.iter().filter_map(finish).collect::<Vec<_>>(), [(8, true)]);
    let told = |command: &Command| match command {
        Command::Emit(EventBody::EarlyStopping(told)) => {
            Some((told.step, told.best_step, told.patience_counter, told.stops))
        }
        _ => None,
    };
    let told: Vec<_> = all.iter().filter_map(told).collect();
    assert_eq!(told, [(4, 4, 0, false), (8, 8, 0, false), (12, 8, 1, false), (16, 8, 2, true)]);
}

#[test]
fn early_stopping_needs_evaluations_enough() {
    let (bench, _) = evaluated(|config| {
        stopping(config);
        config.eval_steps = Some(8);
    });
    let fault = bench.failure().unwrap();
    assert!(
        fault.message.contains("needs 4 evaluations") && fault.message.contains("eval_steps gives 3"),
        "{fault}"
    );
}

#[test]
fn silence_is_allowed_until_all_trainers_have_joined() {
    let mut bench = Bench::new();
    bench.hello(A);
    bench.after(Duration::from_secs(599));
    assert_eq!(bench.failure(), None);
    bench.after(Duration::from_secs(1));
    let fault = bench.failure().unwrap();
    assert_eq!(fault.message, "1 of 2 trainers joined within 600 s (t1)");
    assert_eq!(fault.code, ErrorCode::Unavailable);
}

/// The trainer is killed, or falls silent, while it exits.
#[test]
fn a_trainer_lost_after_the_final_model_is_written_does_not_fail_the_run() {
    let finishing = |saved: bool| {
        let mut bench = Bench::at_work();
        for (id, step) in (1..=20).flat_map(|step| [(A, step), (B, step)]) {
            bench.0.report(id, step, 1);
        }
        let report = CheckpointReport { step: 20, path: "out/final".into(), r#final: true, seconds: 0.5 };
        if saved {
            bench.0.send(A, Up::CheckpointReport(report));
        }
        bench.0
    };
    let mut bench = finishing(true);
    bench.run.handle(bench.now, Event::Closed(B));
    assert_eq!(bench.failure(), None);
    bench.run.handle(bench.now, Event::Closed(A));
    assert_eq!(bench.run.outcome(bench.now), Some(Ok(())));
    let mut bench = finishing(true);
    bench.after(Duration::from_secs(40));
    assert_eq!(bench.run.outcome(bench.now + Duration::from_secs(60)), Some(Ok(())));
    let mut bench = finishing(false);
    bench.run.handle(bench.now, Event::Closed(B));
    assert!(bench.failure().unwrap().message.contains("died"));
    // A row that cannot be written fails the run even with the final model.
    let mut bench = finishing(true);
    bench.run.handle(bench.now, Event::Fault(Fault::failed("cannot write the row")));
    assert!(bench.failure().is_some());
}
