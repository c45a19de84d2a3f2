//! The trainers of the run: admission, ranks, signs of life. Pure: callers pass the elapsed time.
//!
//! - CRD-R1: a refused trainer never changes the roster.
//! - CRD-R2: ranks follow the launcher's order, not the order in which trainers joined.

use std::collections::HashMap;
use std::time::Duration;

use dyad_proto::fault::Process;
use dyad_proto::wire::{Heartbeat, Hello, Phase};
use dyad_proto::{Fault, PROTOCOL_VERSION, counted, plain};

use crate::run::stalls::{Kind, Pulse, Stall, Stalls, Worker};

/// Id of one connection; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TrainerId(pub u64);

/// State of a trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Takes part.
    Active,
    /// Reported a failure.
    Failed,
    /// Reported that it has done all its work.
    Finished,
}

/// One admitted trainer. Its rank is its place in the roster once ranks are given.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its connection.
    pub id: TrainerId,
    /// Unique name.
    pub name: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Name of its host; may be empty.
    pub host: String,
    build: String,
    launch_index: u32,
    rank: Option<usize>,
    /// Its last reported phase.
    pub phase: Phase,
    /// Its highest reported step.
    pub step: u64,
    pid: u32,
    /// Time since its last message.
    silent: Duration,
    pulse: Pulse,
    /// Its state.
    pub standing: Standing,
    /// Cleared when its stream ends.
    pub connected: bool,
}

impl Member {
    /// Its rank, once all have joined.
    #[must_use]
    pub fn rank(&self) -> Option<usize> {
        self.rank
    }

    /// `trainer rank 1 (node1-cpu)`; before ranks are given, `trainer node1-cpu`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self.rank {
            Some(rank) => format!("trainer rank {rank} ({})", self.name),
            None => format!("trainer {}", self.name),
        }
    }

    /// Which process of the run it is.
    #[must_use]
    pub fn id_of_process(&self) -> Process {
        Process::Trainer(self.name.clone())
    }

    /// `on gpu3, process 4711`.
    #[must_use]
    pub fn process(&self) -> String {
        match self.pid {
            0 => format!("on {}", self.host),
            pid => format!("on {}, process {pid}", self.host),
        }
    }

    /// Whether it has to send heartbeats.
    fn listened_to(&self) -> bool {
        self.rank.is_some() && self.connected && self.standing == Standing::Active
    }

    /// Its last phase and step: `training, step 12`.
    #[must_use]
    pub fn whereabouts(&self) -> String {
        let phase = match self.phase {
            Phase::Unspecified => return "joining".into(),
            Phase::Loading => "loading",
            Phase::Measuring => "measuring",
            Phase::Rendezvous => "rendezvous",
            Phase::Training => "training",
            Phase::Evaluating => "evaluation",
            Phase::Saving => "saving",
        };
        format!("{phase}, step {}", self.step)
    }
}

/// The trainers of the run.
#[derive(Debug)]
pub struct Roster {
    world_size: usize,
    members: Vec<Member>,
    /// Index of each connection's member, for a quick lookup on every message.
    places: HashMap<TrainerId, usize>,
}

impl Roster {
    /// An empty roster.
    #[must_use]
    pub fn new(world_size: usize) -> Self {
        Self { world_size, members: Vec::new(), places: HashMap::new() }
    }

    /// Admits a trainer, or returns why it is refused.
    pub fn admit(&mut self, id: TrainerId, hello: &Hello) -> Result<(), Fault> {
        self.check(hello).map_err(|reason| {
            Fault::input(format!("trainer {} is refused: {reason}", plain::peer_name(&hello.name)))
        })?;
        self.places.insert(id, self.members.len());
        self.members.push(Member {
            id,
            name: hello.name.clone(),
            device: hello.device.clone(),
            host: hello.host.clone(),
            build: hello.build.clone(),
            launch_index: hello.launch_index,
            rank: None,
            phase: Phase::Unspecified,
            step: 0,
            pid: hello.pid,
            silent: Duration::ZERO,
            pulse: Pulse::default(),
            standing: Standing::Active,
            connected: true,
        });
        Ok(())
    }

    fn check(&self, hello: &Hello) -> Result<(), String> {
        if hello.protocol_version != PROTOCOL_VERSION {
            let theirs = hello.protocol_version;
            return Err(format!("it speaks protocol version {theirs}, the coordinator {PROTOCOL_VERSION}"));
        }
        if [&hello.name, &hello.device, &hello.host, &hello.build].into_iter().any(|text| !is_plain(text)) {
            return Err("its name, device, host or build is too long, or not printable".into());
        }
        if self.members.iter().any(|member| member.name == hello.name) {
            return Err("a trainer of that name has already joined".into());
        }
        if self.is_full() {
            return Err(format!("the run already has its {}", counted(self.world_size, "trainer")));
        }
        match self.members.first() {
            Some(first) if kind(&first.device) != kind(&hello.device) => Err(format!(
                "its device is {}, but {} has {}: all trainers of a run need the same kind",
                hello.device, first.name, first.device
            )),
            Some(first) if first.build != hello.build => Err(format!(
                "its build on {} is {}, but {} on {} has {}: all trainers of a run must be of one build",
                hello.host, hello.build, first.name, first.host, first.build
            )),
            _ => Ok(()),
        }
    }

    /// Whether all trainers have joined.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.members.len() == self.world_size
    }

    /// Gives ranks 0.. in launch order, and starts to expect signs of life.
    pub fn assign_ranks(&mut self) {
        self.members.sort_by(|a, b| (a.launch_index, &a.name).cmp(&(b.launch_index, &b.name)));
        for (rank, member) in self.members.iter_mut().enumerate() {
            member.rank = Some(rank);
            member.silent = Duration::ZERO;
            member.pulse.start();
            self.places.insert(member.id, rank);
        }
    }

    /// All trainers, in the order of ranks once these are given.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The index of a connection's trainer in [`Roster::members`]; `None` if it was not admitted.
    #[must_use]
    pub fn place(&self, id: TrainerId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    /// One trainer, to change its state.
    pub fn member_mut(&mut self, place: usize) -> &mut Member {
        &mut self.members[place]
    }

    /// Records a message, which is a sign of life.
    pub fn heard(&mut self, place: usize) {
        self.members[place].silent = Duration::ZERO;
    }

    /// Adds time in which this process was able to receive messages.
    pub fn pass(&mut self, time: Duration) {
        for member in &mut self.members {
            member.silent += time;
            member.pulse.pass(time);
        }
    }

    /// Takes a trainer's heartbeat; `first` is the run's first step. Returns the trainer's phase before it.
    pub fn beat(&mut self, place: usize, beat: Heartbeat, stalls: &mut Stalls, first: u64) -> Phase {
        let all = Stalls::all_still(self.workers(first));
        let member = &mut self.members[place];
        let kind = Kind::of(member.phase, member.step, first);
        let (phase, step) = (beat.phase(), member.step.max(beat.step));
        let moved = phase != member.phase || step != member.step;
        let before = std::mem::replace(&mut member.phase, phase);
        member.step = step;
        if let Some(progress) = beat.progress {
            stalls.hear(&mut member.pulse, kind, progress, moved, all);
        }
        before
    }

    /// A trainer at work from which no message came for longer than `limit`.
    #[must_use]
    pub fn silent(&self, limit: Duration) -> Option<&Member> {
        self.members.iter().find(|member| member.listened_to() && member.silent > limit)
    }

    /// A trainer at work that has made no progress for too long.
    #[must_use]
    pub fn stalled(&self, stalls: &Stalls, first: u64) -> Option<Stall> {
        stalls.find(&self.workers(first).collect::<Vec<_>>())
    }

    fn workers(&self, first: u64) -> impl Iterator<Item = Worker<'_>> {
        let at_work = self.members.iter().enumerate().filter(|(_, member)| member.listened_to());
        at_work.map(move |(place, member)| Worker {
            place,
            kind: Kind::of(member.phase, member.step, first),
            pulse: &member.pulse,
        })
    }

    /// The earliest phase of all trainers.
    #[must_use]
    pub fn slowest_phase(&self) -> Phase {
        self.members.iter().map(|member| member.phase).min().unwrap_or(Phase::Unspecified)
    }
}

/// Whether a trainer's text may appear in logs and messages as it is. Empty is allowed: a host may have no name.
fn is_plain(text: &str) -> bool {
    text.len() <= 256 && !text.chars().any(char::is_control)
}

fn kind(device: &str) -> &str {
    device.split(':').next().unwrap_or(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(name: &str, launch_index: u32) -> Hello {
        Hello {
            name: name.into(),
            protocol_version: PROTOCOL_VERSION,
            device: format!("cuda:{launch_index}"),
            launch_index,
            ..Hello::default()
        }
    }

    fn admit(roster: &mut Roster, hello: &Hello) -> Result<(), Fault> {
        let id = TrainerId(100 + u64::from(hello.launch_index));
        roster.admit(id, hello)
    }

    #[test]
    fn refusals_say_why_and_change_nothing() {
        let mut roster = Roster::new(2);
        admit(&mut roster, &hello("a", 0)).unwrap();
        let cases = [
            (Hello { protocol_version: 99, ..hello("b", 1) }, "protocol version 99, the coordinator "),
            (hello("b\nerror: made up", 1), "not printable"),
            (hello(&"b".repeat(300), 1), "too long"),
            (hello("a", 1), "a trainer of that name has already joined"),
            (Hello { device: "cpu".into(), ..hello("b", 1) }, "its device is cpu, but a has cuda:0"),
            (Hello { build: "0.2 (b)".into(), ..hello("b", 1) }, "its build on  is 0.2 (b), but a on  has "),
        ];
        for (hello, expected) in cases {
            let fault = admit(&mut roster, &hello).unwrap_err();
            assert!(fault.message.contains(expected), "{fault}");
        }
        admit(&mut roster, &hello("b", 1)).unwrap();
        assert!(
            admit(&mut roster, &hello("c", 2)).unwrap_err().message.contains("already has its 2 trainers")
        );
        assert_eq!(roster.members().len(), 2);
    }

    #[test]
    fn ranks_follow_the_launch_order() {
        let mut roster = Roster::new(3);
        for (name, index) in [("late", 2), ("first", 0), ("middle", 1)] {
            admit(&mut roster, &hello(name, index)).unwrap();
        }
        assert_eq!(roster.members()[0].describe(), "trainer late");
        roster.assign_ranks();
        let described: Vec<String> = roster.members().iter().map(Member::describe).collect();
        assert_eq!(described, ["trainer rank 0 (first)", "trainer rank 1 (middle)", "trainer rank 2 (late)"]);
        assert_eq!(roster.place(TrainerId(102)), Some(2));
        assert_eq!(roster.place(TrainerId(7)), None);
    }

    #[test]
    fn silence_counts_from_the_assignment_and_ends_with_the_work() {
        let limit = Duration::from_secs(30);
        let mut roster = Roster::new(1);
        admit(&mut roster, &hello("a", 0)).unwrap();
        roster.pass(10 * limit);
        assert!(roster.silent(limit).is_none(), "silence is allowed while others join");
        roster.assign_ranks();
        roster.pass(limit);
        assert!(roster.silent(limit).is_none());
        roster.pass(Duration::from_secs(1));
        assert_eq!(roster.silent(limit).unwrap().name, "a");
        roster.heard(0);
        assert!(roster.silent(limit).is_none());
        roster.pass(2 * limit);
        roster.member_mut(0).standing = Standing::Finished;
        assert!(roster.silent(limit).is_none());
    }

    #[test]
    fn slowest_trainer_sets_the_phase() {
        let mut roster = Roster::new(2);
        admit(&mut roster, &hello("a", 0)).unwrap();
        admit(&mut roster, &hello("b", 1)).unwrap();
        roster.member_mut(0).phase = Phase::Training;
        roster.member_mut(1).phase = Phase::Measuring;
        assert_eq!(roster.slowest_phase(), Phase::Measuring);
        assert_eq!(roster.members()[0].whereabouts(), "training, step 0");
    }
}
