//! The early end of a run: every rank finishes the same work, a checkpoint is written, and all leave.
//!
//! Hold goes to all; each answers how many works it has begun; then all do as many as the furthest. So nobody waits in a collective
//! that another rank never enters, and not a step more is done than has been begun.

use std::path::Path;

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::{Drain, Hold};
use dyad_proto::{ErrorCode, Fault, run_folder};

use super::{Command, Run, Stage};
use crate::run::training::Training;

/// A run on its way to an early end.
#[derive(Debug)]
pub(super) struct Draining {
    pub(super) training: Box<Training>,
    /// Works begun, by rank.
    begun: Vec<Option<u64>>,
    /// What all ranks do, once that is known.
    last: Option<u64>,
    /// Who wanted it.
    why: String,
}

impl Run {
    /// Begins the early end. Before the first step there is nothing to save; once the model is being saved that is the end.
    pub(super) fn drain(&mut self, why: String) -> Result<(), Fault> {
        match std::mem::replace(&mut self.stage, Stage::Finishing) {
            Stage::Training(training) => {
                let begun = vec![None; self.roster.members().len()];
                self.stage = Stage::Draining(Draining { training, begun, last: None, why });
                self.send_all(&Down::Hold(Hold {}));
                Ok(())
            }
            stage @ (Stage::Draining(_) | Stage::Finishing | Stage::Ended { .. }) => {
                self.stage = stage;
                Ok(())
            }
            stage => {
                self.stage = stage;
                let message = format!("stopped by {why} before the first step");
                Err(Fault::new(ErrorCode::Interrupted, message).hint(self.how_to_go_on()))
            }
        }
    }

    /// A rank says how many works it has begun.
    pub(super) fn held(&mut self, place: usize, works: u64) -> Result<(), Fault> {
        let wrong = "held when it was not asked to";
        let Stage::Draining(draining) = &mut self.stage else { return Err(self.violation(place, wrong)) };
        let (sent, _) = draining.training.progress();
        if works > sent || draining.begun[place].replace(works).is_some() {
            return Err(self.violation(place, wrong));
        }
        if let Some(begun) = draining.begun.iter().copied().collect::<Option<Vec<u64>>>() {
            let works = begun.into_iter().max().unwrap_or(0);
            draining.last = Some(works);
            // The step that is saved may have its row already.
            self.commands.push(Command::Persist);
            self.send_all(&Down::Drain(Drain { works }));
        }
        Ok(())
    }

    /// Ranks may leave: they know what is left to be done, and report it before.
    pub(super) fn drained(&self) -> bool {
        matches!(self.stage, Stage::Draining(Draining { last: Some(_), .. }))
    }

    /// What the run ends with when all have left early; nothing when it is complete.
    pub(super) fn drain_outcome(&self) -> Option<Fault> {
        let Stage::Draining(draining) = &self.stage else { return None };
        if Some(draining.training.progress().1) != draining.last {
            return Some(Fault::failed("the ranks left before all that they had begun was reported"));
        }
        let step = self.roster.members().iter().map(|member| member.step).max().unwrap_or(0);
        let what = match &self.saved {
            Some(saved) => format!("after step {step}; the checkpoint is {}", saved.path),
            None => "before another step was done".into(),
        };
        let message = format!("stopped by {} {what}", draining.why);
        Some(Fault::new(ErrorCode::Interrupted, message).hint(self.how_to_go_on()))
    }

    /// By what is known here of checkpoints.
    pub(super) fn how_to_go_on(&self) -> String {
        let saved = self.saved.as_ref().map(|saved| &saved.path);
        let checkpoint = saved.or(Some(&self.spec.resume_from)).filter(|path| !path.is_empty());
        run_folder::how_to_go_on(checkpoint.map(Path::new))
    }
}
