//! Early end of a run: every rank stops after the same work, a checkpoint is written, and all trainers leave.
//!
//! All ranks get Hold and answer with the number of works they have begun. Then all ranks do as many works as the rank that is furthest.
//! So no collective hangs, and no rank begins a step that no other rank has begun.

use std::path::Path;

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::{Drain, Hold};
use dyad_proto::{ErrorCode, Fault, run_folder};

use super::{Command, Run, Stage};
use crate::run::training::Training;

/// State of a run that ends early.
#[derive(Debug)]
pub(super) struct Draining {
    pub(super) training: Box<Training>,
    /// Works begun, by rank.
    begun: Vec<Option<u64>>,
    /// Number of works after which all ranks stop, once it is known.
    last: Option<u64>,
    /// Who requested it.
    why: String,
}

impl Run {
    /// Begins the early end. During training, ranks get Hold. Before that the run ends at once, because there is nothing to save. If the
    /// run is already ending, nothing changes.
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

    /// Takes a rank's number of begun works.
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
            // The row of the step that is saved may be written already, but not synced.
            self.commands.push(Command::Persist);
            self.send_all(&Down::Drain(Drain { works }));
        }
        Ok(())
    }

    /// Whether ranks may leave: they know after which work to stop, and they report it before they leave.
    pub(super) fn drained(&self) -> bool {
        matches!(self.stage, Stage::Draining(Draining { last: Some(_), .. }))
    }

    /// The outcome after an early end, once all ranks have left; `None` if the run was not ended early.
    pub(super) fn drain_outcome(&self) -> Option<Fault> {
        let Stage::Draining(draining) = &self.stage else { return None };
        if Some(draining.training.progress().1) != draining.last {
            return Some(Fault::failed("the ranks left before they had reported all work that they began"));
        }
        let step = self.roster.members().iter().map(|member| member.step).max().unwrap_or(0);
        let what = match &self.saved {
            Some(saved) => format!("after step {step}; the checkpoint is {}", saved.path),
            None => "before another step was done".into(),
        };
        let message = format!("stopped by {} {what}", draining.why);
        Some(Fault::new(ErrorCode::Interrupted, message).hint(self.how_to_go_on()))
    }

    /// The hint on how to continue, from the last checkpoint if there is one.
    pub(super) fn how_to_go_on(&self) -> String {
        let saved = self.saved.as_ref().map(|saved| &saved.path);
        let checkpoint = saved.or(Some(&self.spec.resume_from)).filter(|path| !path.is_empty());
        run_folder::how_to_go_on(checkpoint.map(Path::new))
    }
}
