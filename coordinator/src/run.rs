//! The run as a state machine: events in, commands out. Knows neither network nor file nor clock.
//!
//! Joining -> Measuring -> Training -> Finishing -> Ended; a failure leads from anywhere to Ended.
//!
//! - [`dataset`], [`measuring`], [`schedule`], [`sharding`]: the pairs, their lengths, how many steps, which pair goes to which rank.
//! - [`membership`], [`stalls`], [`failure`], [`facts`]: who takes part, who hangs, whose failure it is, whether ranks agree.
//! - [`training`], [`report`], [`references`], [`saving`], [`metrics_row`]: what every rank does next, and what its reports add up to.
//! - [`same_run`]: whether a checkpoint belongs to this run.

pub mod dataset;
mod drain;
mod ending;
pub mod facts;
pub mod failure;
mod joining;
mod liveness;
pub mod measuring;
pub mod membership;
pub mod metrics_row;
pub mod references;
pub mod report;
pub mod same_run;
pub mod saving;
pub mod schedule;
pub mod sharding;
pub mod stalls;
pub mod training;
mod working;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{CheckpointReport, Fact, Phase, RunStarted};
use dyad_proto::{Fault, RunConfig};
use serde_json::{Map, Value, json};

use crate::run::dataset::Datasets;
use crate::run::facts::{Facts, Then};
use crate::run::failure::Blame;
use crate::run::measuring::{Lengths, Measuring};
use crate::run::membership::{Member, Roster, Standing, TrainerId};
use crate::run::references::{Known, PairKey};
use crate::run::report::Report;
use crate::run::training::{Done, Start, Training};

/// How long the streams may take to close once the run has ended.
pub const FAREWELL: Duration = Duration::from_secs(5);

/// What happens to a run.
#[derive(Debug)]
pub enum Event {
    /// A trainer sent a message.
    Message(TrainerId, Up),
    /// A trainer sent something that is no message.
    Unreadable(TrainerId, String),
    /// A trainer's stream ended.
    Closed(TrainerId),
    /// The coordinator itself cannot go on, or was told to stop at once.
    Fault(Fault),
    /// The run is to end after the step in progress, with a checkpoint; says who wants that.
    Drain(String),
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
    Emit(EventBody),
    /// Write a finished work's row, then tell the watchers.
    Record(Done),
    /// Bring all rows to the disk.
    Persist,
    /// Show the watchers that the run is alive.
    Beat,
    /// A trainer was turned away, for this reason.
    Refused(TrainerId, String),
    /// Open the store of reference log-probabilities for this reference model, and look for these pairs; answered by
    /// [`Event::References`].
    Recall(String, Vec<PairKey>),
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
    /// What the user has called.
    pub command: Vec<String>,
    /// The files.
    pub data: Datasets,
    /// Trainers to wait for.
    pub world_size: u32,
    /// How long to wait for them.
    pub join_timeout: Duration,
    /// Seconds that a trainer may stand still; its phase says so where there are none, and 0 is for ever.
    pub stall_timeout: Option<u64>,
    /// Where the run picks up.
    pub start: Start,
    /// Checkpoint folder to resume from; empty for a fresh run.
    pub resume_from: String,
    /// What the checkpoint says of its run.
    pub then: Option<Then>,
}

#[derive(Debug)]
enum Stage {
    Joining {
        /// Time that is left, as [`liveness`] counts it.
        left: Duration,
    },
    Measuring(Box<Measuring>),
    /// All lengths are known; the reference model, or what the store holds of it, is not.
    Measured(Box<(Lengths, Lengths)>),
    Training(Box<Training>),
    Draining(drain::Draining),
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
    /// The time of the event that is being handled.
    now: Instant,
    roster: Roster,
    stage: Stage,
    /// Names the reference model, where its log-probabilities are kept; absent until rank 0 has loaded it.
    reference_key: Option<String>,
    /// What the ranks say of themselves.
    facts: Facts,
    /// What all of them have said.
    agreed: Vec<Fact>,
    blame: Blame,
    watch: liveness::Watch,
    /// The last phase that watchers were told of.
    phase: Phase,
    /// Why trainers were turned away, for the message when too few have joined.
    last_refusal: Option<String>,
    /// There is a row of either kind.
    recorded: bool,
    /// How often a trainer was admitted.
    arrivals: u32,
    /// A step is done, and its row is in the output folder.
    trained: bool,
    /// How often each rank has told the others something while they connect.
    postings: HashMap<usize, u32>,
    /// The last checkpoint that was written.
    saved: Option<CheckpointReport>,
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
            now,
            roster: Roster::new(spec.world_size as usize),
            reference_key: None,
            stage: Stage::Joining { left: spec.join_timeout },
            facts: Facts::new(spec.world_size as usize),
            agreed: Vec::new(),
            blame: Blame::default(),
            watch: liveness::Watch::new(now, spec.stall_timeout),
            phase: Phase::Unspecified,
            last_refusal: None,
            recorded: false,
            arrivals: 0,
            trained: false,
            postings: HashMap::new(),
            saved: None,
            commands: vec![Command::Emit(EventBody::Started(started))],
            spec,
        }
    }

    /// What `run.json` tells beside the configuration.
    #[must_use]
    pub fn told(&self) -> Value {
        let trainer = |member: &Member| json!({ "rank": member.rank(), "name": member.name, "host": member.host, "device": member.device });
        let data = &self.spec.data;
        let mut hashes = Map::new();
        hashes.insert("training_file_sha256".into(), data.train.sha256().into());
        if data.validation.is_some() {
            hashes.insert("validation_file_sha256".into(), data.validation_sha256().into());
        }
        hashes.extend(self.agreed.iter().map(|fact| (fact.name.clone(), fact.value.clone().into())));
        json!({
            "dyad_version": env!("CARGO_PKG_VERSION"),
            "run_id": self.spec.run_id,
            "command": self.spec.command,
            "trainers": self.roster.members().iter().map(trainer).collect::<Vec<_>>(),
            "facts": hashes,
        })
    }

    /// Takes one event and says what to do.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Command> {
        self.now = now;
        // What the coordinator itself cannot do, such as write a row.
        let own = matches!(event, Event::Fault(_));
        let handled = match event {
            Event::Message(id, message) => self.message(now, id, message),
            Event::Unreadable(id, what) => self.unreadable(id, &what),
            Event::Closed(id) => self.closed(id),
            Event::References(known) => self.recalled(known),
            Event::Fault(fault) => Err(fault),
            Event::Drain(why) => self.drain(why),
            Event::Tick => self.tick(now),
        };
        if let Err(fault) = handled
            && let Some(cause) = self.blame.suspect(now, fault)
        {
            match own {
                true => self.end(now, Some(cause)),
                false => self.end_by(now, cause),
            }
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

    /// Trainers that take part.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.spec.world_size as usize
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

    fn emit(&mut self, happening: EventBody) {
        self.commands.push(Command::Emit(happening));
    }

    fn message(&mut self, now: Instant, id: TrainerId, message: Up) -> Result<(), Fault> {
        let Some(place) = self.roster.place(id) else {
            return self.stranger(id, message);
        };
        self.roster.heard(place);
        if matches!(self.stage, Stage::Ended { .. }) {
            return Ok(());
        }
        match message {
            Up::Heartbeat(beat) => self.heartbeat(place, beat),
            Up::BootstrapOffer(offer) => return self.bootstrap(place, offer),
            Up::Posting(posting) => return self.posted(place, posting),
            Up::ModelReport(report) if place == 0 => {
                self.reference_key = Some(report.reference_key.clone());
                self.emit(EventBody::Model(report));
                return self.recall();
            }
            Up::ModelReport(_) => {}
            Up::Facts(facts) => return self.compare(place, facts.facts),
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
            Up::DrainRequest(_) => {
                let why = format!("a signal to {}", self.roster.members()[place].describe());
                return self.drain(why);
            }
            Up::Held(held) => return self.held(place, held.works),
            Up::Hello(_) => return Err(self.violation(place, "said hello twice")),
        }
        Ok(())
    }
}
