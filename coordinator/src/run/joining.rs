//! The run before training: admitting trainers, comparing facts, connecting the ranks, measuring pairs, recalling reference scores.

use dyad_proto::run_config::ReferenceLogps as Mode;
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{
    Abort, Assignment, BootstrapOffer, CommunicatorReady, Fact, MeasureReport, MeasureRequest, Posting,
    Split, TrainerArrived, TrainerJoined, Welcome,
};
use dyad_proto::{Fault, plain, silence};

use super::{Command, Run, Stage};
use crate::run::measuring::{Measuring, SplitLengths};
use crate::run::membership::{Member, TrainerId};
use crate::run::references::{Known, References};
use crate::run::training::GENERATION;

/// Arrivals that watchers are told of: at most this many times the world size.
const ARRIVALS: u32 = 4;
/// Most bytes of a bootstrap offer, which every rank gets: empty, or the 128 bytes of NCCL's unique id.
const BOOTSTRAP_BYTES: usize = 1024;
/// Most postings of a rank.
const POSTINGS: u32 = 64;
const KEY_BYTES: usize = 256;
/// Most bytes of a posting, which holds an address for each of the other ranks.
const POSTING_BYTES: usize = 1 << 20;

impl Run {
    /// Handles a message on a connection that belongs to no member.
    pub(super) fn stranger(&mut self, id: TrainerId, message: Up) -> Result<(), Fault> {
        let Up::Hello(hello) = message else {
            // A refused trainer may send more before it learns of the refusal; it gets no second answer.
            self.commands.push(Command::Close(id));
            return Ok(());
        };
        let admitted = if matches!(self.stage, Stage::Ended { .. }) {
            Err(Fault::input(format!(
                "trainer {} is refused: the run has ended",
                plain::peer_name(&hello.name)
            )))
        } else {
            // Once the run has begun, the roster is full and admits no trainer.
            self.roster.admit(id, &hello)
        };
        match admitted {
            Ok(()) => return self.joined(id, hello.name),
            Err(refusal) => {
                let refusal = refusal.from_origin("coordinator");
                self.commands.push(Command::Refused(id, refusal.message.clone()));
                self.last_refusal = Some(refusal.message.clone());
                self.commands.push(Command::Send(id, Down::Abort(Abort { cause: Some(refusal.into()) })));
                self.commands.push(Command::Close(id));
            }
        }
        Ok(())
    }

    fn joined(&mut self, id: TrainerId, name: String) -> Result<(), Fault> {
        // Bounds the events if a trainer connects again and again.
        self.arrivals = self.arrivals.saturating_add(1);
        if self.arrivals <= self.spec.world_size.saturating_mul(ARRIVALS) {
            self.emit(EventBody::Arrived(TrainerArrived { name }));
        }
        let welcome = Welcome {
            run_id: self.spec.run_id.clone(),
            run_config_json: self.spec.config_json.clone(),
            resume_from: self.spec.resume_from.clone(),
            evaluation_only: self.spec.evaluation_only.clone(),
            // 5 s more than the launcher's limit: the launcher must notice first, because it decides whether to restart the run.
            silence_seconds: silence::limit(silence::COORDINATOR, self.spec.stall_timeout) + 5,
            // The observer fills in the trace context.
            ..Welcome::default()
        };
        self.commands.push(Command::Send(id, Down::Welcome(welcome)));
        if !self.roster.is_full() {
            return Ok(());
        }
        self.roster.assign_ranks();
        let world_size = self.spec.world_size;
        let mut measuring = Measuring::new(&self.spec.data, world_size as usize);
        for (place, member) in self.roster.members().to_vec().into_iter().enumerate() {
            let Member { name, device, host, .. } = member;
            let rank = place as u32;
            self.emit(EventBody::Joined(TrainerJoined { name, rank, device, host }));
            self.send(place, Down::Assignment(Assignment { generation: GENERATION, rank, world_size }));
            self.ask(place, &mut measuring)?;
        }
        self.stage = Stage::Measuring(Box::new(measuring));
        Ok(())
    }

    fn ask(&mut self, place: usize, measuring: &mut Measuring) -> Result<(), Fault> {
        while let Some(chunk) = measuring.next_request(place) {
            let pairs = self.spec.data.pairs(chunk.split, chunk.ids)?;
            self.send(place, Down::MeasureRequest(MeasureRequest { split: chunk.split.into(), pairs }));
        }
        Ok(())
    }

    /// Takes a rank's facts. Fails if ranks differ from each other or from the checkpoint.
    pub(super) fn compare(&mut self, place: usize, facts: Vec<Fact>) -> Result<(), Fault> {
        if matches!(self.stage, Stage::Joining { .. }) {
            return Err(self.violation(place, "sent its facts before it had a rank"));
        }
        let Some(agreed) = self.facts.hear(place, facts, self.roster.members())? else { return Ok(()) };
        agreed.warnings.iter().for_each(|line| tracing::warn!("{line}"));
        self.agreed.extend(agreed.facts.iter().cloned());
        let Some(then) = &self.spec.then else { return Ok(()) };
        let rounding = then.check(&agreed.facts, self.facts.is_first())?;
        if !rounding.is_empty() {
            let list: Vec<String> = rounding.iter().map(ToString::to_string).collect();
            tracing::warn!(
                "going on with changes: {}; sums may round differently from here",
                list.join(", ")
            );
        }
        Ok(())
    }

    pub(super) fn bootstrap(&mut self, place: usize, offer: BootstrapOffer) -> Result<(), Fault> {
        if offer.payload.len() > BOOTSTRAP_BYTES {
            return Err(self.violation(place, "offered a communicator's address that is too long"));
        }
        if place != 0 || offer.generation != GENERATION || matches!(self.stage, Stage::Joining { .. }) {
            return Err(self.violation(place, "offered a communicator that it was not asked for"));
        }
        let BootstrapOffer { generation, payload } = offer;
        self.send_all(&Down::CommunicatorReady(CommunicatorReady { generation, payload }));
        Ok(())
    }

    /// Passes a rank's posting to all ranks. Ranks exchange their addresses through the coordinator, so that they need no open port for it.
    pub(super) fn posted(&mut self, place: usize, posting: Posting) -> Result<(), Fault> {
        if posting.generation != GENERATION || matches!(self.stage, Stage::Joining { .. }) {
            return Err(self.violation(place, "posted something out of turn"));
        }
        let posted = self.postings.entry(place).or_default();
        *posted += 1;
        let many = *posted > POSTINGS;
        if many || posting.key.len() > KEY_BYTES || posting.value.len() > POSTING_BYTES {
            return Err(self.violation(place, "posted more than the protocol allows"));
        }
        self.send_all(&Down::Posting(posting));
        Ok(())
    }

    pub(super) fn measured(&mut self, place: usize, report: MeasureReport) -> Result<(), Fault> {
        let Stage::Measuring(mut measuring) = std::mem::replace(&mut self.stage, Stage::Finishing) else {
            return Err(self.violation(place, "sent a measure report out of turn"));
        };
        measuring.record(place, report).map_err(|what| self.violation(place, &what))?;
        self.ask(place, &mut measuring)?;
        match measuring.finished() {
            Some(lengths) => self.measured_all(lengths),
            None => {
                self.stage = Stage::Measuring(measuring);
                Ok(())
            }
        }
    }

    fn measured_all(&mut self, lengths: SplitLengths) -> Result<(), Fault> {
        let Self { spec, .. } = self;
        if spec.evaluation_only.is_none() {
            lengths.train.check_usable("training_file", &spec.data.train)?;
        }
        if let Some(file) = &spec.data.validation {
            lengths.validation.check_usable("validation_file", file)?;
        }
        if !spec.config.keeps_references() {
            return self.start_training(lengths, References::new(Mode::Compute, []));
        }
        self.stage = Stage::Measured(Box::new(lengths));
        self.recall()
    }

    /// Asks for stored reference scores, once both the reference key and all token hashes are known.
    pub(super) fn recall(&mut self) -> Result<(), Fault> {
        let (Stage::Measured(lengths), Some(reference_key)) = (&self.stage, &self.reference_key) else {
            return Ok(());
        };
        let (train, validation) = (&lengths.train, &lengths.validation);
        let keys = [(Split::Train, train), (Split::Validation, validation)].into_iter().flat_map(
            |(split, lengths)| lengths.kept().into_iter().filter_map(move |id| lengths.key(split, id)),
        );
        let recall = Command::Recall(reference_key.clone(), keys.collect());
        self.commands.push(recall);
        Ok(())
    }

    pub(super) fn recalled(&mut self, known: Vec<Known>) -> Result<(), Fault> {
        match std::mem::replace(&mut self.stage, Stage::Finishing) {
            Stage::Measured(lengths) => {
                let references = References::new(self.spec.config.reference_logps, known);
                self.start_training(*lengths, references)
            }
            // The run has ended meanwhile.
            other => {
                self.stage = other;
                Ok(())
            }
        }
    }
}
