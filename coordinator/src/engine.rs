//! Feeds the run with events and ticks, and carries out its commands. The engine is the only owner of the run's state.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use dyad_proto::Fault;
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{CoordinatorMessage, ErrorCode, EvaluationMetrics, KeepTrace, StepMetrics};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::files::output_dir::RunFiles;
use crate::files::reference_store::{self, ReferenceStore, StoreTrouble};
use crate::observe::Observer;
use crate::run::membership::TrainerId;
use crate::run::references::PairKey;
use crate::run::schedule::Work;
use crate::run::training::Done;
use crate::run::{Command, Event, Run};
use crate::watch::History;
use crate::wire::refusals::Refusals;

/// How often deadlines are checked.
const TICK: Duration = Duration::from_millis(200);

/// Sends messages to one trainer; dropping it ends the stream.
pub type Outbox = mpsc::UnboundedSender<CoordinatorMessage>;

/// An input of the engine.
#[derive(Debug)]
pub enum Input {
    /// A trainer has connected, from this address if it is known; messages to it go into the outbox.
    Connected(TrainerId, Option<SocketAddr>, Outbox),
    /// An event for the run.
    Event(Box<Event>),
}

/// The run and everything its commands act on.
#[derive(Debug)]
pub struct RunEngine {
    run: Run,
    output: RunFiles,
    history: History,
    outboxes: HashMap<TrainerId, (Option<SocketAddr>, Outbox)>,
    /// Open if the run keeps reference log-probabilities.
    store: Option<ReferenceStore>,
    observer: Observer,
    refusals: Refusals,
}

impl RunEngine {
    /// An engine that does not run yet.
    #[must_use]
    pub fn new(run: Run, output: RunFiles, history: History, observer: Observer, refusals: Refusals) -> Self {
        Self { run, output, history, outboxes: HashMap::new(), store: None, observer, refusals }
    }

    /// Runs until the run has ended; returns its outcome.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>) -> Result<(), Fault> {
        let mut ticks = tokio::time::interval(TICK);
        // Do not catch up on missed ticks: trainers could not be heard in that time, so it must not count as their silence.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                Some(input) = inputs.recv() => match input {
                    Input::Connected(id, peer, outbox) => {
                        self.outboxes.insert(id, (peer, outbox));
                        continue;
                    }
                    Input::Event(event) => *event,
                },
                _ = ticks.tick() => Event::Tick,
            };
            self.observer.hears(&event);
            self.handle(event);
            if let Some(outcome) = self.run.outcome(Instant::now()) {
                return outcome;
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let mut next = Some(event);
        // A failed command becomes an event. The loop ends because a run that has ended records nothing.
        while let Some(event) = next.take() {
            for command in self.run.handle(Instant::now(), event) {
                match self.carry_out(command) {
                    Ok(None) => {}
                    Ok(Some(answer)) => next = Some(next.unwrap_or(answer)),
                    // Later commands depend on it: a checkpoint of a step waits for the step's row.
                    Err(fault) => {
                        next = Some(Event::Fault(fault));
                        break;
                    }
                }
            }
        }
    }

    /// Carries out one command; some return an event as their answer.
    fn carry_out(&mut self, command: Command) -> Result<Option<Event>, Fault> {
        match command {
            Command::Send(id, body) => self.send(id, body),
            Command::Close(id) => drop(self.outboxes.remove(&id)),
            Command::Emit(happening) => {
                if let EventBody::EarlyStopping(stopping) = &happening {
                    self.output.best(stopping)?;
                }
                self.emit(happening);
            }
            Command::Beat => self.history.beat(),
            Command::Refused(id, why) => {
                let peer = self.outboxes.get(&id).and_then(|(peer, _)| *peer);
                self.refusals.note("trainer refused", peer, &why);
            }
            Command::Record(done) => self.record(&done)?,
            Command::Persist => self.output.persist()?,
            Command::Recall(key, pairs) => return self.recall(&key, pairs).map(Some),
        }
        Ok(None)
    }

    fn recall(&mut self, key: &str, pairs: Vec<PairKey>) -> Result<Event, Fault> {
        let path = reference_store::path(self.run.config());
        let opened = ReferenceStore::open(&path, key).and_then(|mut store| {
            let known = store.recall(pairs)?;
            Ok((store, known))
        });
        match opened {
            Ok((store, known)) => {
                tracing::info!(known = known.len(), path = %path.display(), "reference log-probabilities");
                self.store = Some(store);
                Ok(Event::References(known))
            }
            Err(StoreTrouble::Passing(fault)) => {
                self.without_store(&fault);
                Ok(Event::References(Vec::new()))
            }
            Err(StoreTrouble::Lasting(fault)) => Err(fault),
        }
    }

    /// Goes on without the store: it only helps later runs, and this one has all scores in memory.
    fn without_store(&mut self, fault: &Fault) {
        tracing::warn!("the run goes on without keeping reference log-probabilities: {fault}");
        self.store = None;
    }

    fn send(&mut self, id: TrainerId, mut body: Down) {
        self.observer.sends(id, &mut body);
        if let Some((_, outbox)) = self.outboxes.get(&id) {
            // Fails only if the stream is gone; its end then arrives as an event.
            let _ = outbox.send(CoordinatorMessage { body: Some(body) });
        }
    }

    fn emit(&mut self, happening: EventBody) {
        self.observer.happens(&happening);
        match &happening {
            EventBody::Joined(joined) => {
                tracing::info!(rank = joined.rank, name = joined.name, "trainer joined")
            }
            EventBody::Data(data) => tracing::info!(
                pairs = data.pairs,
                truncated = data.truncated,
                dropped_too_long = data.dropped_too_long,
                dropped_empty = data.dropped_empty,
                dropped_identical = data.dropped_identical,
                dropped_weight = data.dropped_weight,
                validation_pairs = data.validation_pairs,
                validation_truncated = data.validation_truncated,
                validation_dropped_too_long = data.validation_dropped_too_long,
                validation_dropped_empty = data.validation_dropped_empty,
                validation_dropped_identical = data.validation_dropped_identical,
                validation_dropped_weight = data.validation_dropped_weight,
                total_steps = data.total_steps,
                start_step = data.start_step,
                "data measured"
            ),
            EventBody::Checkpoint(report) => {
                tracing::info!(step = report.step, path = report.path, "checkpoint written")
            }
            EventBody::EarlyStopping(stopping) if stopping.stops => tracing::info!(
                step = stopping.step,
                best_step = stopping.best_step,
                metric = stopping.metric,
                "the run stops early"
            ),
            EventBody::Ended(ended) => {
                let failure = ended.failure.as_ref().map(|failure| failure.code());
                let failed = failure.is_some_and(|code| code != ErrorCode::Interrupted);
                tracing::info!(failed, "run ended");
            }
            _ => {}
        }
        self.history.add(happening);
    }

    fn record(&mut self, done: &Done) -> Result<(), Fault> {
        let began = SystemTime::now();
        if let Some(store) = &mut self.store
            && let Err(fault) = store.keep(&done.references)
        {
            self.without_store(&fault);
        }
        let Some(row) = &done.row else { return Ok(()) };
        self.output.tells(|| self.run.told());
        let mut values = row.values();
        match done.work {
            Work::Step(step) => {
                self.output.step(row, done.durable)?;
                self.emit(EventBody::Step(StepMetrics { step, values }));
            }
            Work::Evaluation(step) => {
                self.output.evaluation(row)?;
                self.output.samples(step, &done.samples)?;
                values.remove("step");
                self.emit(EventBody::Evaluation(EvaluationMetrics { step, values }));
            }
            Work::Reference(_) => {}
        }
        if let Some(step) = self.observer.done(done, began) {
            for (_, outbox) in self.outboxes.values() {
                // As in `send`.
                let _ = outbox.send(CoordinatorMessage { body: Some(Down::KeepTrace(KeepTrace { step })) });
            }
        }
        Ok(())
    }
}
