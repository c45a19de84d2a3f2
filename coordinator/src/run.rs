//! The run as a state machine: events in, commands out. Knows neither network nor file nor clock.
//!
//! Joining -> Measuring -> Training -> Finishing -> Ended; a failure leads from anywhere to Ended.

use std::time::{Duration, Instant};

use dyad_proto::run_config::ReferenceLogps as Mode;
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as Happening;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{
    Abort, Assignment, BootstrapOffer, CheckpointReport, CommunicatorReady, Finish, Heartbeat, MeasureReport,
    MeasureRequest, Phase, PhaseChanged, ReferenceProgress, RunEnded, RunPlan, RunStarted, TrainerJoined,
    Welcome,
};
use dyad_proto::{Fault, RunConfig};

use crate::dataset::Datasets;
use crate::failure::Blame;
use crate::measuring::{Lengths, Measuring, data_report};
use crate::membership::{Member, Roster, SILENCE_LIMIT, Standing, TrainerId};
use crate::references::{Known, References};
use crate::training::{Done, GENERATION, KnownPairs, Report, Start, Training};

/// How long the streams may take to close once the run has ended.
pub const FAREWELL: Duration = Duration::from_secs(5);

/// What happens to a run.
#[derive(Debug)]
pub enum Event {
    /// A trainer sent a message.
    Message(TrainerId, Up),
    /// A trainer's stream ended.
    Closed(TrainerId),
    /// The coordinator itself cannot go on, or was told to stop.
    Fault(Fault),
    /// What earlier runs have left of reference log-probabilities.
    References(Vec<Known>),
    /// Time passes.
    Tick,
}

/// What is to be done about it, in this order.
#[derive(Debug)]
pub enum Command {
    /// Send to a trainer.
    Send(TrainerId, Down),
    /// End the stream to a trainer.
    Close(TrainerId),
    /// Tell the watchers.
    Emit(Happening),
    /// Write a finished work's row, then tell the watchers.
    Record(Done),
    /// Open the store of reference log-probabilities under this key; answered by [`Event::References`].
    Recall(String),
}

/// What a run is about.
#[derive(Debug)]
pub struct RunSpec {
    /// Names the run.
    pub run_id: String,
    /// The checked config.
    pub config: RunConfig,
    /// The same, as it goes over the wire.
    pub config_json: String,
    /// The files.
    pub data: Datasets,
    /// Trainers to wait for.
    pub world_size: u32,
    /// How long to wait for them.
    pub join_timeout: Duration,
    /// Where the run picks up.
    pub start: Start,
    /// Checkpoint folder to resume from; empty for a fresh run.
    pub resume_from: String,
}

#[derive(Debug)]
enum Stage {
    Joining {
        deadline: Instant,
    },
    Measuring(Measuring),
    /// All lengths are known; what the reference store holds is not.
    Measured(Box<(Lengths, Lengths)>),
    Training(Box<Training>),
    Finishing,
    Ended {
        failure: Option<Fault>,
        deadline: Instant,
    },
}

/// The state of a run.
#[derive(Debug)]
pub struct Run {
    spec: RunSpec,
    roster: Roster,
    stage: Stage,
    /// What is known of the reference model's log-probabilities; absent until it is known what is known.
    references: Option<References>,
    blame: Blame,
    /// The last phase that watchers were told of.
    phase: Phase,
    /// Why trainers were turned away, for the message when too few have joined.
    last_refusal: Option<String>,
    commands: Vec<Command>,
}

impl Run {
    /// A run that waits for its trainers.
    #[must_use]
    pub fn new(spec: RunSpec, now: Instant) -> Self {
        let started = RunStarted {
            run_id: spec.run_id.clone(),
            world_size: spec.world_size,
            run_config_json: spec.config_json.clone(),
        };
        Self {
            roster: Roster::new(spec.world_size as usize),
            references: (!spec.config.keeps_references()).then(|| References::new(Mode::Compute, [])),
            stage: Stage::Joining { deadline: now + spec.join_timeout },
            blame: Blame::default(),
            phase: Phase::Unspecified,
            last_refusal: None,
            commands: vec![Command::Emit(Happening::Started(started))],
            spec,
        }
    }

    /// Takes one event and says what to do.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Command> {
        let handled = match event {
            Event::Message(id, message) => self.message(now, id, message),
            Event::Closed(id) => self.closed(id),
            Event::References(known) => self.recalled(known),
            Event::Fault(fault) => Err(fault),
            Event::Tick => self.tick(now),
        };
        if let Err(fault) = handled
            && let Some(cause) = self.blame.accuse(now, fault)
        {
            self.end(now, Some(cause));
        }
        std::mem::take(&mut self.commands)
    }

    /// The checked config.
    #[must_use]
    pub fn config(&self) -> &RunConfig {
        &self.spec.config
    }

    /// The files.
    #[must_use]
    pub fn data(&self) -> &Datasets {
        &self.spec.data
    }

    /// How the run ended, once nobody need be waited for.
    #[must_use]
    pub fn outcome(&self, now: Instant) -> Option<Result<(), Fault>> {
        let Stage::Ended { failure, deadline } = &self.stage else { return None };
        let waiting = now < *deadline && self.roster.members().iter().any(|member| member.connected);
        (!waiting).then(|| failure.clone().map_or(Ok(()), Err))
    }

    fn send(&mut self, place: usize, message: Down) {
        self.commands.push(Command::Send(self.roster.members()[place].id, message));
    }

    fn send_all(&mut self, message: &Down) {
        for place in 0..self.roster.members().len() {
            self.send(place, message.clone());
        }
    }

    fn emit(&mut self, happening: Happening) {
        self.commands.push(Command::Emit(happening));
    }

    fn message(&mut self, now: Instant, id: TrainerId, message: Up) -> Result<(), Fault> {
        let Some(place) = self.roster.place(id) else {
            self.stranger(now, id, message);
            return Ok(());
        };
        self.roster.heard(now, place);
        if matches!(self.stage, Stage::Ended { .. }) {
            return Ok(());
        }
        match message {
            Up::Heartbeat(beat) => self.heartbeat(place, beat),
            Up::BootstrapOffer(offer) => return self.bootstrap(place, offer),
            Up::ModelReport(report) if place == 0 => {
                if self.spec.config.keeps_references() {
                    self.commands.push(Command::Recall(report.reference_key.clone()));
                }
                self.emit(Happening::Model(report));
            }
            Up::ModelReport(_) => {}
            Up::MeasureReport(report) => return self.measured(place, report),
            Up::StepReport(report) => return self.reported(place, Report::Step(report)),
            Up::EvaluationReport(report) => return self.reported(place, Report::Evaluation(report)),
            Up::ReferenceReport(report) => return self.reported(place, Report::Reference(report)),
            Up::CheckpointReport(report) => return self.checkpoint(place, report),
            Up::Failure(failure) => {
                let member = self.roster.member_mut(place);
                member.standing = Standing::Failed;
                return Err(Fault::from(failure).from_origin(member.describe()));
            }
            Up::Finished(_) => return self.finished(now, place),
            Up::Hello(_) => return Err(self.violation(place, "said hello twice")),
        }
        Ok(())
    }

    /// A message on a connection that belongs to no member.
    fn stranger(&mut self, now: Instant, id: TrainerId, message: Up) {
        // What a refused trainer sends before it learns of that needs no second answer.
        let Up::Hello(hello) = message else { return self.commands.push(Command::Close(id)) };
        let admitted = if matches!(self.stage, Stage::Ended { .. }) {
            Err(Fault::input(format!("trainer {} is refused: the run has ended", hello.name)))
        } else {
            // Once the run has begun the roster is full, and admits nobody.
            self.roster.admit(now, id, &hello)
        };
        match admitted {
            Ok(()) => self.joined(now, id),
            Err(refusal) => {
                let refusal = refusal.from_origin("coordinator");
                tracing::warn!(name = hello.name, host = hello.host, "{}", refusal.message);
                self.last_refusal = Some(refusal.message.clone());
                self.commands.push(Command::Send(id, Down::Abort(Abort { cause: Some(refusal.into()) })));
                self.commands.push(Command::Close(id));
            }
        }
    }

    fn joined(&mut self, now: Instant, id: TrainerId) {
        let welcome =
            // The observer knows the trace context.
            Welcome { run_id: self.spec.run_id.clone(), run_config_json: self.spec.config_json.clone(), ..Welcome::default() };
        self.commands.push(Command::Send(id, Down::Welcome(welcome)));
        if !self.roster.is_full() {
            return;
        }
        self.roster.assign_ranks(now);
        let world_size = self.spec.world_size;
        let mut measuring = Measuring::new(&self.spec.data, world_size as usize);
        for (place, member) in self.roster.members().to_vec().into_iter().enumerate() {
            let Member { name, device, host, .. } = member;
            let rank = place as u32;
            self.emit(Happening::Joined(TrainerJoined { name, rank, device, host }));
            self.send(place, Down::Assignment(Assignment { generation: GENERATION, rank, world_size }));
            self.ask(place, &mut measuring);
        }
        self.stage = Stage::Measuring(measuring);
    }

    fn ask(&mut self, place: usize, measuring: &mut Measuring) {
        while let Some(chunk) = measuring.next_request(place) {
            let pairs = self.spec.data.pairs(chunk.split, chunk.ids);
            self.send(place, Down::MeasureRequest(MeasureRequest { split: chunk.split.into(), pairs }));
        }
    }

    fn heartbeat(&mut self, place: usize, beat: Heartbeat) {
        let member = self.roster.member_mut(place);
        let before = std::mem::replace(&mut member.phase, beat.phase());
        member.step = member.step.max(beat.step);
        // Most beats say what the last one said, and nobody need be looked at.
        if before == member.phase || self.phase >= Phase::Training {
            return;
        }
        // Evaluating and saving belong to the training, and alternate with it.
        let slowest = self.roster.slowest_phase().min(Phase::Training);
        if slowest > self.phase {
            self.phase = slowest;
            self.emit(Happening::Phase(PhaseChanged { phase: slowest.into() }));
        }
    }

    fn bootstrap(&mut self, place: usize, offer: BootstrapOffer) -> Result<(), Fault> {
        if place != 0 || offer.generation != GENERATION || matches!(self.stage, Stage::Joining { .. }) {
            return Err(self.violation(place, "offered a communicator that it was not asked for"));
        }
        let BootstrapOffer { generation, payload } = offer;
        self.send_all(&Down::CommunicatorReady(CommunicatorReady { generation, payload }));
        Ok(())
    }

    fn measured(&mut self, place: usize, report: MeasureReport) -> Result<(), Fault> {
        let Stage::Measuring(mut measuring) = std::mem::replace(&mut self.stage, Stage::Finishing) else {
            return Err(self.violation(place, "sent a measure report out of turn"));
        };
        measuring.record(place, report).map_err(|what| self.violation(place, &what))?;
        self.ask(place, &mut measuring);
        match measuring.finished() {
            Some(lengths) => self.measured_all(lengths),
            None => {
                self.stage = Stage::Measuring(measuring);
                Ok(())
            }
        }
    }

    fn measured_all(&mut self, lengths: (Lengths, Lengths)) -> Result<(), Fault> {
        match self.references.take() {
            Some(references) => self.start_training(lengths, references),
            None => {
                self.stage = Stage::Measured(Box::new(lengths));
                Ok(())
            }
        }
    }

    fn recalled(&mut self, known: Vec<Known>) -> Result<(), Fault> {
        let references = References::new(self.spec.config.reference_logps, known);
        match std::mem::replace(&mut self.stage, Stage::Finishing) {
            Stage::Measured(lengths) => self.start_training(*lengths, references),
            other => {
                (self.stage, self.references) = (other, Some(references));
                Ok(())
            }
        }
    }

    fn start_training(&mut self, lengths: (Lengths, Lengths), references: References) -> Result<(), Fault> {
        let spec = &self.spec;
        lengths.0.check_some_kept("training_file", &spec.config.training_file)?;
        if let Some(file) = &spec.config.validation_file {
            lengths.1.check_some_kept("validation_file", file)?;
        }
        let mut report = data_report(&lengths);
        let sha256 = spec.data.train.sha256();
        let world_size = spec.world_size as usize;
        let (train, validation) = lengths;
        let known = KnownPairs { train, validation, references };
        let training = Training::new(&spec.config, world_size, sha256, known, spec.start);
        report.total_steps = training.schedule().total_steps;
        report.steps_per_epoch = training.schedule().steps_per_epoch;
        report.start_step = spec.start.step;
        let plan = RunPlan {
            total_steps: report.total_steps,
            start_step: spec.start.step,
            resume_from: spec.resume_from.clone(),
            dataset_sha256: sha256.to_owned(),
        };
        self.emit(Happening::Data(report));
        self.send_all(&Down::RunPlan(plan));
        self.work(Box::new(training))
    }

    /// Hands out what the window allows; after the last report, the end.
    fn work(&mut self, mut training: Box<Training>) -> Result<(), Fault> {
        while let Some(messages) = training.next_assignments(&self.spec.data)? {
            for (place, message) in messages.into_iter().enumerate() {
                self.send(place, message);
            }
        }
        if training.finished() {
            self.stage = Stage::Finishing;
            self.send_all(&Down::Finish(Finish {}));
        } else {
            self.stage = Stage::Training(training);
        }
        Ok(())
    }

    fn reported(&mut self, place: usize, report: Report) -> Result<(), Fault> {
        let Stage::Training(mut training) = std::mem::replace(&mut self.stage, Stage::Finishing) else {
            return Err(self.violation(place, "reported work out of turn"));
        };
        if let Report::Step(report) = &report {
            let member = self.roster.member_mut(place);
            member.step = member.step.max(report.step);
        }
        let scored = matches!(report, Report::Reference(_));
        let done = training.record(place, report).map_err(|what| self.violation(place, &what))?;
        self.commands.extend(done.into_iter().map(Command::Record));
        if scored {
            let (pairs, total) = training.reference_progress();
            self.emit(Happening::Reference(ReferenceProgress { pairs, total }));
        }
        self.work(training)
    }

    fn checkpoint(&mut self, place: usize, report: CheckpointReport) -> Result<(), Fault> {
        if place != 0 {
            return Err(self.violation(place, "reported a checkpoint, which only rank 0 writes"));
        }
        self.emit(Happening::Checkpoint(report));
        Ok(())
    }

    fn finished(&mut self, now: Instant, place: usize) -> Result<(), Fault> {
        if !matches!(self.stage, Stage::Finishing) {
            return Err(self.violation(place, "said that it has finished before it was told to"));
        }
        let member = self.roster.member_mut(place);
        member.standing = Standing::Finished;
        let id = member.id;
        self.commands.push(Command::Close(id));
        if self.roster.members().iter().all(|member| member.standing == Standing::Finished) {
            self.end(now, None);
        }
        Ok(())
    }

    fn closed(&mut self, id: TrainerId) -> Result<(), Fault> {
        self.commands.push(Command::Close(id));
        let Some(place) = self.roster.place(id) else { return Ok(()) };
        let member = self.roster.member_mut(place);
        member.connected = false;
        if member.standing != Standing::Active {
            return Ok(());
        }
        let (who, during) = (member.describe(), member.whereabouts());
        Err(Fault::failed(format!("{who} died: its connection closed during {during}"))
            .hint("its log says more; a process that the kernel killed for memory leaves none"))
    }

    fn tick(&mut self, now: Instant) -> Result<(), Fault> {
        if let Some(cause) = self.blame.overdue(now) {
            self.end(now, Some(cause));
        }
        if let Stage::Joining { deadline } = self.stage
            && now >= deadline
        {
            return Err(self.too_few());
        }
        let Some(member) = self.roster.silent(now) else { return Ok(()) };
        let (who, during, seconds) = (member.describe(), member.whereabouts(), SILENCE_LIMIT.as_secs());
        Err(Fault::failed(format!(
            "{who} on {} is silent: no sign of life for {seconds} s during {during}",
            member.host
        ))
        .hint("is that machine reachable, and the process not stopped?"))
    }

    fn too_few(&self) -> Fault {
        let joined: Vec<&str> = self.roster.members().iter().map(|member| member.name.as_str()).collect();
        let names = if joined.is_empty() { String::new() } else { format!(" ({})", joined.join(", ")) };
        let (of, seconds) = (self.spec.world_size, self.spec.join_timeout.as_secs());
        let refused = self.last_refusal.as_ref().map_or_else(String::new, |why| format!("; {why}"));
        Fault::unavailable(format!(
            "{} of {of} trainers joined within {seconds} s{names}{refused}",
            joined.len()
        ))
        .hint("see the logs of the missing trainers; --join-timeout-seconds gives them longer")
    }

    fn violation(&self, place: usize, what: &str) -> Fault {
        Fault::failed(format!("{} broke the protocol: it {what}", self.roster.members()[place].describe()))
            .hint("run the coordinator and all trainers from the same build")
    }

    /// Everybody still here is told to stop (after a failure), and the streams end. The first end counts.
    fn end(&mut self, now: Instant, failure: Option<Fault>) {
        if matches!(self.stage, Stage::Ended { .. }) {
            return;
        }
        self.emit(Happening::Ended(RunEnded { failure: failure.clone().map(Into::into) }));
        for member in self.roster.members().iter().filter(|member| member.connected) {
            if let (Some(cause), Standing::Active) = (&failure, member.standing) {
                let abort = Abort { cause: Some(cause.clone().into()) };
                self.commands.push(Command::Send(member.id, Down::Abort(abort)));
            }
            self.commands.push(Command::Close(member.id));
        }
        self.stage = Stage::Ended { failure, deadline: now + FAREWELL };
    }
}
