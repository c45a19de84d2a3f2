//! The run as a state machine: events in, commands out. It uses neither network nor clock, and reads files only through [`dataset`].
//!
//! Joining -> Measuring -> Training -> Finishing -> Ended; a failure leads from anywhere to Ended.
//!
//! - [`dataset`], [`measuring`], [`schedule`], [`sharding`]: the pairs, their lengths, the number of steps, which rank gets which pair.
//! - [`membership`], [`stalls`], [`failure`], [`facts`]: the trainers, hung trainers, the cause of a failure, whether ranks agree.
//! - [`training`], [`report`], [`references`], [`saving`], [`metrics_row`]: the work of every rank, and the sums of the ranks' reports.
//! - [`early_stopping`]: which evaluation is the best, and whether the run stops before its last step.
//! - [`same_run`]: whether a checkpoint belongs to this run.

pub mod dataset;
mod drain;
pub mod early_stopping;
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
use dyad_proto::wire::{CheckpointReport, EvaluationOnly, Fact, Phase, RunStarted};
use dyad_proto::{Fault, RunConfig};
use serde_json::{Map, Value, json};

use crate::run::dataset::Datasets;
use crate::run::facts::{RankFacts, Then};
use crate::run::failure::FailureCause;
use crate::run::measuring::{Measuring, SplitLengths};
use crate::run::membership::{Member, Roster, Standing, TrainerId};
use crate::run::references::{Known, PairKey};
use crate::run::report::WorkReport;
use crate::run::training::{Done, Start, Training};

/// How long the streams may take to close once the run has ended.
pub const FAREWELL: Duration = Duration::from_secs(5);

/// An input of the state machine.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "events are handled one at a time and not kept")]
pub enum Event {
    /// A trainer sent a message.
    Message(TrainerId, Up),
    /// A trainer sent bytes that cannot be decoded.
    Unreadable(TrainerId, String),
    /// A trainer's stream ended.
    Closed(TrainerId),
    /// The coordinator itself failed, or was told to stop at once.
    Fault(Fault),
    /// Request to end the run after the step in progress, with a checkpoint; the text names the requester.
    Drain(String),
    /// Reference log-probabilities that earlier runs stored.
    References(Vec<Known>),
    /// Time passes.
    Tick,
}

/// An output of the state machine; the engine carries them out in order.
#[derive(Debug)]
pub enum Command {
    /// Send to a trainer.
    Send(TrainerId, Down),
    /// End the stream to a trainer.
    Close(TrainerId),
    /// Send an event to the watchers.
    Emit(EventBody),
    /// Write the row of a finished work, then send it to the watchers.
    Record(Done),
    /// Sync all rows to the disk.
    Persist,
    /// Show the watchers that the run is alive.
    Beat,
    /// Log that a trainer was refused, for this reason.
    Refused(TrainerId, String),
    /// Open the store of reference log-probabilities for this reference model, and look for these pairs; answered by
    /// [`Event::References`].
    Recall(String, Vec<PairKey>),
}

/// The specification of a run.
#[derive(Debug)]
pub struct RunSpec {
    /// Names the run.
    pub run_id: String,
    /// The checked config.
    pub config: RunConfig,
    /// The same as JSON, as trainers get it.
    pub config_json: String,
    /// The command that the user typed.
    pub command: Vec<String>,
    /// The training and validation pairs.
    pub data: Datasets,
    /// Trainers to wait for.
    pub world_size: u32,
    /// How long to wait for them.
    pub join_timeout: Duration,
    /// Longest time without progress of a trainer, in seconds; `None` uses the limits of its phases, and 0 sets no limit.
    pub stall_timeout: Option<u64>,
    /// Where the run starts or continues.
    pub start: Start,
    /// Checkpoint folder to resume from; empty for a fresh run.
    pub resume_from: String,
    /// The checkpoint's record of its run; `None` for a fresh run.
    pub then: Option<Then>,
    /// The run only evaluates its validation pairs.
    pub evaluation_only: Option<EvaluationOnly>,
}

#[derive(Debug)]
enum Stage {
    Joining {
        /// Time left for trainers to join, as [`liveness`] counts it.
        left: Duration,
    },
    Measuring(Box<Measuring>),
    /// All lengths are known; the run waits for the reference key, or for the stored reference scores.
    Measured(Box<SplitLengths>),
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
    /// Key of the reference model, for its stored log-probabilities; `None` until rank 0 has loaded the model.
    reference_key: Option<String>,
    /// The facts that the ranks report.
    facts: RankFacts,
    /// Rank 0's facts that were compared with those of all other ranks.
    agreed: Vec<Fact>,
    failure_cause: FailureCause,
    watch: liveness::Watch,
    /// The last phase that was sent to the watchers.
    phase: Phase,
    /// The last refusal of a trainer, for the message if too few join.
    last_refusal: Option<String>,
    /// Whether there is a row of a step or evaluation.
    recorded: bool,
    /// How often a trainer was admitted.
    arrivals: u32,
    /// Whether a step is done and its row was recorded.
    trained: bool,
    /// Number of postings of each rank to the others.
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
            facts: RankFacts::new(spec.world_size as usize),
            agreed: Vec::new(),
            failure_cause: FailureCause::default(),
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

    /// The record in `run.json`, next to the configuration: version, command, trainers, facts.
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

    /// Handles one event and returns the commands to carry out.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Command> {
        self.now = now;
        // The coordinator's own failures, such as a row that cannot be written.
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
            && let Some(cause) = self.failure_cause.suspect(now, fault)
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

    /// The training and validation pairs.
    #[must_use]
    pub fn data(&self) -> &Datasets {
        &self.spec.data
    }

    /// Number of trainers.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.spec.world_size as usize
    }

    /// The outcome of the run, once it has ended and all trainers have disconnected or [`FAREWELL`] is over.
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
            Up::StepReport(report) => return self.reported(place, WorkReport::Step(report)),
            Up::EvaluationReport(report) => return self.reported(place, WorkReport::Evaluation(report)),
            Up::ReferenceReport(report) => return self.reported(place, WorkReport::Reference(report)),
            Up::CheckpointReport(report) => return self.checkpoint(place, report),
            Up::Failure(failure) => {
                let member = self.roster.member_mut(place);
                member.standing = Standing::Failed;
                return Err(Fault::from(failure)
                    .from_origin(member.describe())
                    .of_process(&member.id_of_process()));
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
