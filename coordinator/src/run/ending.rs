//! The end of a run: lost connections, protocol violations, and the messages to trainers and watchers.

use std::time::Instant;

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{Abort, RunEnded};
use dyad_proto::{ErrorCode, Fault};

use super::{Command, FAREWELL, Run, Stage};
use crate::run::membership::{Standing, TrainerId};

impl Run {
    /// A member's error fails the run. An unknown peer only gets the error back.
    pub(super) fn unreadable(&mut self, id: TrainerId, what: &str) -> Result<(), Fault> {
        let what = format!("sent a message that cannot be read: {what}");
        if let Some(place) = self.roster.place(id) {
            return Err(self.violation(place, &what));
        }
        let cause = Fault::input(format!("refused: it {what}")).from_origin("coordinator");
        self.commands.push(Command::Send(id, Down::Abort(Abort { cause: Some(cause.into()) })));
        Ok(())
    }

    pub(super) fn closed(&mut self, id: TrainerId) -> Result<(), Fault> {
        self.commands.push(Command::Close(id));
        let Some(place) = self.roster.place(id) else { return Ok(()) };
        let member = self.roster.member_mut(place);
        member.connected = false;
        if member.standing != Standing::Active {
            return Ok(());
        }
        let (who, during) = (member.describe(), member.whereabouts());
        let died = Fault::lost(format!("{who} died: its connection closed during {during}"))
            .hint("its log says more; a process that the kernel killed for memory leaves none");
        Err(Fault { connection_closed: true, ..died.of_process(&member.id_of_process()) })
    }

    pub(super) fn violation(&self, place: usize, what: &str) -> Fault {
        let member = &self.roster.members()[place];
        Fault::failed(format!("{} broke the protocol: it {what}", member.describe()))
            .of_process(&member.id_of_process())
            .hint("run the coordinator and all trainers from the same build")
    }

    /// Ends the run: tells connected trainers to stop (after a failure) and closes their streams. Later calls have no effect.
    pub(super) fn end(&mut self, now: Instant, failure: Option<Fault>) {
        if matches!(self.stage, Stage::Ended { .. }) {
            return;
        }
        let failure = failure.map(|fault| self.advised(fault));
        self.emit(EventBody::Ended(RunEnded { failure: failure.clone().map(Into::into) }));
        for member in self.roster.members().iter().filter(|member| member.connected) {
            if let (Some(cause), Standing::Active) = (&failure, member.standing) {
                let abort = Abort { cause: Some(cause.clone().into()) };
                self.commands.push(Command::Send(member.id, Down::Abort(abort)));
            }
            self.commands.push(Command::Close(member.id));
        }
        self.stage = Stage::Ended { failure, deadline: now + FAREWELL };
    }

    /// Ends the run because of a trainer's failure. If the final model is written already, the failure is only logged and the run
    /// succeeds.
    pub(super) fn end_by(&mut self, now: Instant, cause: Fault) {
        let complete =
            matches!(self.stage, Stage::Finishing) && self.saved.as_ref().is_some_and(|saved| saved.r#final);
        if complete {
            tracing::warn!("once the run was complete: {cause}");
        }
        self.end(now, (!complete).then_some(cause));
    }

    /// Adds to the hint how to continue, if steps may have been done.
    fn advised(&self, fault: Fault) -> Fault {
        let lost = matches!(fault.code, ErrorCode::Failed | ErrorCode::Unavailable);
        if !lost || (!self.trained && self.spec.resume_from.is_empty()) {
            return fault;
        }
        let advice = self.how_to_go_on();
        let hint = if fault.hint.is_empty() { advice } else { format!("{}; {advice}", fault.hint) };
        Fault { hint, ..fault }
    }
}
