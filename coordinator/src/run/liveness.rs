//! Heartbeats: those of trainers, their absence, and the coordinator's own.
//!
//! - CRD-V1: only time in which this process was able to hear trainers counts as their silence. A laptop's sleep, a run that was stopped
//!   and continued, or a write that took a minute does not count.
//! - CRD-V2: the coordinator's beats are commands of the run like all others. They stop if the engine's loop stops.

use std::time::{Duration, Instant};

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{Beat, Heartbeat, Phase, PhaseChanged};
use dyad_proto::{Fault, counted, silence};

use super::{Command, Run, Stage};
use crate::run::stalls::{Stall, Stalls};

/// Time between two ticks counts as at most this.
const AWAKE: Duration = Duration::from_secs(1);

/// The clocks of a run.
#[derive(Debug)]
pub(super) struct Watch {
    last: Instant,
    since_beat: Duration,
    silence: Duration,
    stalls: Stalls,
}

impl Watch {
    pub(super) fn new(now: Instant, stall_timeout: Option<u64>) -> Self {
        let silence = Duration::from_secs(silence::limit(silence::TRAINER, stall_timeout).into());
        Self { last: now, since_beat: Duration::ZERO, silence, stalls: Stalls::new(stall_timeout) }
    }

    /// Time since the last tick, limited by CRD-V1.
    fn pass(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.last).min(AWAKE);
        self.last = now;
        self.since_beat += passed;
        passed
    }

    fn beat_is_due(&mut self) -> bool {
        let due = self.since_beat >= silence::TICK;
        if due {
            self.since_beat = Duration::ZERO;
        }
        due
    }
}

impl Run {
    pub(super) fn tick(&mut self, now: Instant) -> Result<(), Fault> {
        if let Some(cause) = self.failure_cause.overdue(now) {
            self.end_by(now, cause);
        }
        let passed = self.watch.pass(now);
        if self.watch.beat_is_due() {
            self.beat();
        }
        if let Stage::Joining { left } = &mut self.stage {
            *left = left.saturating_sub(passed);
            return if left.is_zero() { Err(self.too_few()) } else { Ok(()) };
        }
        self.roster.pass(passed);
        if let Some(member) = self.roster.silent(self.watch.silence) {
            let (who, process, during) = (member.describe(), member.process(), member.whereabouts());
            let seconds = self.watch.silence.as_secs();
            return Err(Fault::lost(format!(
                "{who} {process}, is silent: no sign of life for {seconds} s during {during}"
            ))
            .of_process(&member.id_of_process())
            .hint("is that machine reachable, and the process not stopped?"));
        }
        let stall = self.roster.stalled(&self.watch.stalls, self.first_step());
        stall.map_or(Ok(()), |stall| Err(self.stands_still(&stall)))
    }

    fn first_step(&self) -> u64 {
        self.spec.start.step + 1
    }

    fn beat(&mut self) {
        let connected = self.roster.members().iter().filter(|member| member.connected);
        self.commands.extend(connected.map(|member| Command::Send(member.id, Down::Beat(Beat {}))));
        self.commands.push(Command::Beat);
    }

    fn stands_still(&self, stall: &Stall) -> Fault {
        let member = &self.roster.members()[stall.place];
        let (who, process, during) = (member.describe(), member.process(), member.whereabouts());
        let others = if stall.others.is_empty() { String::new() } else { format!("; {}", stall.others) };
        Fault::lost(format!(
            "{who} {process}, stands still although its heart beats: no progress for {} s during {during}; {}{others}",
            stall.time.as_secs(),
            stall.doing
        ))
        .of_process(&member.id_of_process())
        .hint("look for a hung file system, device or network there; --stall-timeout changes the limit, 0 sets none")
    }

    pub(super) fn heartbeat(&mut self, place: usize, beat: Heartbeat) {
        let first = self.first_step();
        let before = self.roster.beat(place, beat, &mut self.watch.stalls, first);
        // Most beats report the same phase as before: skip the look at all members.
        if before == self.roster.members()[place].phase || self.phase >= Phase::Training {
            return;
        }
        // Evaluating and saving alternate with training and count as training here.
        let slowest = self.roster.slowest_phase().min(Phase::Training);
        if slowest > self.phase {
            self.phase = slowest;
            self.emit(EventBody::Phase(PhaseChanged { phase: slowest.into() }));
        }
    }

    fn too_few(&self) -> Fault {
        let joined: Vec<&str> = self.roster.members().iter().map(|member| member.name.as_str()).collect();
        let names = if joined.is_empty() { String::new() } else { format!(" ({})", joined.join(", ")) };
        let (of, seconds) = (self.spec.world_size, self.spec.join_timeout.as_secs());
        let refused = self.last_refusal.as_ref().map_or_else(String::new, |why| format!("; {why}"));
        Fault::unavailable(format!(
            "{} of {} joined within {seconds} s{names}{refused}",
            joined.len(),
            counted(of, "trainer")
        ))
        .hint("see the logs of the missing trainers; --join-timeout-seconds gives them longer")
    }
}
