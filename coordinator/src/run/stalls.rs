//! Which trainer stands still although its heart beats. Pure: time is what the coordinator itself has been awake for.
//!
//! - CRD-H1: a trainer that waits for others is never blamed while one that they may wait for gets on.
//! - CRD-H2: a limit is never below [`FACTOR`] times the longest pause that the run has seen in that kind of work.
//!
//! Every rank begins the same collectives in the same order. So whoever has begun the fewest is behind, and whoever has begun more
//! may wait for it, whatever its computing thread seems to do: on GPUs a wait looks like work.

use std::time::Duration;

use dyad_proto::wire::{Phase, Progress, Waiting};
use dyad_proto::{agrees, counted, plain};

/// A pause may be so many times the longest one that was seen.
const FACTOR: u32 = 10;

/// Kinds of work whose pauses are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reading weights: a cold network file system stands still for minutes.
    Loading,
    /// Waiting for lengths.
    Measuring,
    /// Meeting the other ranks.
    Rendezvous,
    /// Kernels are compiled, memory is taken.
    FirstStep,
    /// The steps after it.
    Step,
    /// Evaluation, and scoring with the reference model.
    Evaluation,
    /// Writing a model or checkpoint.
    Saving,
    /// Turning pairs into tokens, on a thread of its own.
    Tokenising,
}

const KINDS: usize = Kind::Tokenising as usize + 1;

impl Kind {
    /// What a thread may take for one piece of work before anything is known of the run. torchrun allows 10 minutes on GPUs and 30
    /// on CPUs for anything.
    const fn floor(self) -> Duration {
        Duration::from_secs(match self {
            Self::Loading | Self::Saving => 20 * 60,
            Self::FirstStep => 15 * 60,
            Self::Measuring | Self::Rendezvous | Self::Tokenising => 10 * 60,
            Self::Step | Self::Evaluation => 5 * 60,
        })
    }

    /// Of what a trainer says it is doing.
    #[must_use]
    pub const fn of(phase: Phase, step: u64, first: u64) -> Self {
        match phase {
            Phase::Unspecified | Phase::Loading => Self::Loading,
            Phase::Measuring => Self::Measuring,
            Phase::Rendezvous => Self::Rendezvous,
            Phase::Training if step <= first => Self::FirstStep,
            Phase::Training => Self::Step,
            Phase::Evaluating => Self::Evaluation,
            Phase::Saving => Self::Saving,
        }
    }
}

/// What a trainer last said of its threads, and how long it has been saying it.
#[derive(Clone, Debug, Default)]
pub struct Pulse {
    said: Option<Progress>,
    still: Duration,
    unfed: Duration,
}

impl Pulse {
    /// Time passes.
    pub fn pass(&mut self, time: Duration) {
        self.still += time;
        self.unfed += time;
    }

    /// What it says now. `moved`: it said something else that is new.
    fn hear(&mut self, progress: Progress, moved: bool) {
        let before = self.said.replace(progress);
        let Some((before, now)) = before.as_ref().zip(self.said.as_ref()) else { return self.start() };
        if before.fed != now.fed || !now.feeding {
            self.unfed = Duration::ZERO;
        }
        if moved
            || before.fed != now.fed
            || before.marks != now.marks
            || before.collectives != now.collectives
        {
            self.still = Duration::ZERO;
        }
    }

    /// From now on it counts.
    pub fn start(&mut self) {
        (self.still, self.unfed) = (Duration::ZERO, Duration::ZERO);
    }

    fn waiting(&self) -> Waiting {
        self.said.as_ref().map_or(Waiting::Unspecified, Progress::waiting)
    }

    fn feeds(&self) -> bool {
        self.said.as_ref().is_some_and(|said| said.feeding)
    }

    fn collectives(&self) -> u64 {
        self.said.as_ref().map_or(0, |said| said.collectives)
    }

    /// `its last collective was all_reduce, number 12`.
    fn last_collective(&self) -> String {
        match self.said.as_ref().filter(|said| said.collectives > 0) {
            Some(said) => {
                format!(
                    "its last collective was {}, number {}",
                    plain::peer_name(&said.collective),
                    said.collectives
                )
            }
            None => "it has begun no collective".into(),
        }
    }
}

/// One trainer at work, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Worker<'a> {
    /// Its place in the roster.
    pub place: usize,
    /// What it is doing.
    pub kind: Kind,
    /// What it says of its threads.
    pub pulse: &'a Pulse,
}

/// A trainer stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Whose thread it is.
    pub place: usize,
    /// For how long.
    pub time: Duration,
    /// What it does or waits for, and which collective was its last.
    pub doing: String,
    /// How the others are related to it.
    pub others: String,
}

/// The limits of a run.
#[derive(Clone, Debug)]
pub struct Stalls {
    /// In place of every kind's own; zero for no limits at all.
    floor: Option<Duration>,
    seen: [Duration; KINDS],
}

impl Stalls {
    /// As `--stall-timeout` says.
    #[must_use]
    pub fn new(stall_timeout: Option<u64>) -> Self {
        Self { floor: stall_timeout.map(Duration::from_secs), seen: [Duration::ZERO; KINDS] }
    }

    /// How long a pause may be.
    #[must_use]
    pub fn limit(&self, kind: Kind) -> Duration {
        if self.floor == Some(Duration::ZERO) {
            return Duration::MAX;
        }
        self.floor.unwrap_or(kind.floor()).max(self.seen[kind as usize] * FACTOR)
    }

    /// A trainer says how far it is; `moved` when it is in another phase or step than before. What it was doing until now tells how
    /// long a healthy pause is; `all` is how long every trainer has stood still.
    pub fn hear(&mut self, pulse: &mut Pulse, kind: Kind, progress: Progress, moved: bool, all: Duration) {
        let (still, unfed, waiting) = (pulse.still, pulse.unfed, pulse.waiting());
        let feeding = pulse.feeds();
        pulse.hear(progress, moved);
        let pause = match waiting {
            Waiting::Unspecified => still,
            // Others may have worked meanwhile.
            Waiting::Collective => all,
            Waiting::Work | Waiting::Row => Duration::ZERO,
        };
        if pulse.still < still {
            self.learn(kind, pause);
        }
        if feeding && pulse.unfed < unfed {
            self.learn(Kind::Tokenising, unfed);
        }
    }

    fn learn(&mut self, kind: Kind, pause: Duration) {
        let seen = &mut self.seen[kind as usize];
        *seen = pause.max(*seen);
    }

    /// How long all have stood still.
    #[must_use]
    pub fn all_still<'a>(workers: impl Iterator<Item = Worker<'a>>) -> Duration {
        workers.map(|worker| worker.pulse.still).min().unwrap_or_default()
    }

    /// Who stands still for too long.
    #[must_use]
    pub fn find(&self, workers: &[Worker<'_>]) -> Option<Stall> {
        let workers: Vec<&Worker<'_>> = workers.iter().filter(|worker| worker.pulse.said.is_some()).collect();
        let tokenising = workers.iter().find(|worker| self.feeds_nothing(worker));
        if let Some(worker) = tokenising {
            return Some(Stall {
                place: worker.place,
                time: worker.pulse.unfed,
                doing: "its tokenising thread is at the same pairs as before".into(),
                others: String::new(),
            });
        }
        let last = workers.iter().map(|worker| worker.pulse.collectives()).min()?;
        let behind = || workers.iter().filter(|worker| worker.pulse.collectives() == last);
        let longest = |worker: &&&&Worker<'_>| worker.pulse.still;
        let works = |worker: &&&Worker<'_>| worker.pulse.waiting() == Waiting::Unspecified;
        if behind().any(|worker| works(&worker)) {
            let culprit = behind().filter(works).max_by_key(|worker| longest(&worker))?;
            return (culprit.pulse.still > self.limit(culprit.kind)).then(|| told(culprit, &workers));
        }
        // All that are behind wait: for somebody who gets on, or for a tokenising thread, which has a limit of its own.
        if workers.iter().any(|worker| worker.pulse.feeds()) {
            return None;
        }
        let all = Self::all_still(workers.iter().map(|worker| **worker));
        let culprit = behind()
            .max_by_key(|worker| (worker.pulse.waiting() != Waiting::Collective, longest(&worker)))?;
        (all > self.limit(culprit.kind)).then(|| told(culprit, &workers))
    }

    fn feeds_nothing(&self, worker: &Worker<'_>) -> bool {
        worker.pulse.feeds() && worker.pulse.unfed > self.limit(Kind::Tokenising)
    }
}

fn told(culprit: &Worker<'_>, workers: &[&Worker<'_>]) -> Stall {
    let own = culprit.pulse.collectives();
    let waits = |worker: &&&Worker<'_>| worker.pulse.waiting() == Waiting::Collective;
    let ahead = workers.iter().filter(|worker| worker.pulse.collectives() > own).count();
    let beside = workers.iter().filter(waits).filter(|worker| worker.pulse.collectives() == own).count();
    let doing = match culprit.pulse.waiting() {
        Waiting::Unspecified => String::new(),
        Waiting::Collective => "it waits for other ranks; ".into(),
        Waiting::Work => "it has not taken up the next work; ".into(),
        Waiting::Row => "it waits for the step's row; ".into(),
    };
    let others = match (ahead, beside) {
        (0, all) if all == workers.len() && all > 1 => "all ranks are in that collective".into(),
        (0, _) => String::new(),
        (ranks, _) => {
            format!(
                "{} {} ahead of it and may wait for it",
                counted(ranks, "rank"),
                agrees(ranks, "is", "are")
            )
        }
    };
    let doing = format!("{doing}{}", culprit.pulse.last_collective());
    Stall { place: culprit.place, time: culprit.pulse.still, doing, others }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn progress(marks: u64, collectives: u64, waiting: Waiting) -> Progress {
        Progress {
            marks,
            collectives,
            collective: "all_reduce".into(),
            waiting: waiting.into(),
            ..Progress::default()
        }
    }

    /// Trainers in one kind of work, by what they say.
    struct Bench {
        stalls: Stalls,
        kind: Kind,
        pulses: Vec<Pulse>,
    }

    impl Bench {
        fn new(stall_timeout: Option<u64>, kind: Kind, ranks: usize) -> Self {
            let mut bench =
                Self { stalls: Stalls::new(stall_timeout), kind, pulses: vec![Pulse::default(); ranks] };
            (0..ranks).for_each(|rank| bench.says(rank, progress(0, 0, Waiting::Unspecified)));
            bench
        }

        fn workers(&self) -> Vec<Worker<'_>> {
            let worker = |(place, pulse)| Worker { place, kind: self.kind, pulse };
            self.pulses.iter().enumerate().map(worker).collect()
        }

        fn says(&mut self, rank: usize, progress: Progress) {
            let all = Stalls::all_still(self.workers().into_iter());
            self.stalls.hear(&mut self.pulses[rank], self.kind, progress, false, all);
        }

        fn passes(&mut self, time: Duration) {
            self.pulses.iter_mut().for_each(|pulse| pulse.pass(time));
        }

        fn found(&self) -> Option<usize> {
            self.stalls.find(&self.workers()).map(|stall| stall.place)
        }
    }

    #[test]
    fn the_rank_that_is_behind_is_named_and_not_those_that_wait_for_it() {
        let mut bench = Bench::new(Some(10), Kind::Step, 3);
        // Rank 0 waits longest; rank 2 stops in its work.
        bench.says(0, progress(5, 8, Waiting::Collective));
        bench.passes(SECOND);
        bench.says(1, progress(5, 8, Waiting::Collective));
        bench.passes(SECOND);
        bench.says(2, progress(5, 7, Waiting::Unspecified));
        // Rank 2 was seen to pause for two seconds and to go on, so twenty may pass.
        bench.passes(19 * SECOND);
        assert_eq!(bench.found(), None, "rank 0 has waited for 21 s, but rank 2 for none too long");
        bench.passes(2 * SECOND);
        let stall = bench.stalls.find(&bench.workers()).unwrap();
        assert_eq!((stall.place, stall.doing.as_str()), (2, "its last collective was all_reduce, number 7"));
        assert_eq!(stall.others, "2 ranks are ahead of it and may wait for it");
    }

    /// On GPUs the host waits for the device, which waits for another rank: that is not told from work.
    #[test]
    fn a_rank_that_seems_to_work_is_in_order_while_one_behind_it_gets_on() {
        let mut bench = Bench::new(Some(10), Kind::Step, 2);
        bench.says(0, progress(1, 9, Waiting::Unspecified));
        for marks in 1..100 {
            bench.passes(5 * SECOND);
            bench.says(1, progress(marks, 3, Waiting::Unspecified));
            assert_eq!(bench.found(), None);
        }
        // Pauses of 5 s were seen.
        bench.passes(50 * SECOND);
        assert_eq!(bench.found(), None);
        bench.passes(SECOND);
        assert_eq!(bench.found(), Some(1));
    }

    #[test]
    fn a_thread_that_stops_while_it_waits_is_behind_those_that_go_on() {
        let mut bench = Bench::new(Some(10), Kind::Step, 2);
        bench.says(0, progress(5, 9, Waiting::Collective));
        bench.says(1, progress(5, 8, Waiting::Collective));
        bench.passes(11 * SECOND);
        assert_eq!(bench.found(), Some(1));
        // One that has work and does not take it up is behind one that waits for it in the same place.
        bench.says(0, progress(6, 9, Waiting::Collective));
        bench.says(1, progress(6, 9, Waiting::Work));
        bench.passes(200 * SECOND);
        assert_eq!(bench.found(), Some(1));
    }

    #[test]
    fn a_collective_that_all_are_in_is_named() {
        let mut bench = Bench::new(Some(10), Kind::Step, 2);
        for rank in 0..2 {
            bench.says(rank, progress(5, 9, Waiting::Collective));
        }
        bench.passes(11 * SECOND);
        assert_eq!(bench.stalls.find(&bench.workers()).unwrap().others, "all ranks are in that collective");
    }

    #[test]
    fn limits_grow_with_the_longest_healthy_pause_of_their_kind() {
        let mut bench = Bench::new(None, Kind::Step, 1);
        assert_eq!(bench.stalls.limit(Kind::Step), 300 * SECOND);
        bench.passes(100 * SECOND);
        bench.says(0, progress(1, 0, Waiting::Unspecified));
        assert_eq!(bench.stalls.limit(Kind::Step), 1000 * SECOND);
        assert_eq!(bench.stalls.limit(Kind::Saving), 1200 * SECOND, "another kind has learned nothing");
        // Time without work says nothing of how long work takes.
        bench.says(0, progress(1, 0, Waiting::Work));
        bench.passes(1000 * SECOND);
        bench.says(0, progress(2, 0, Waiting::Unspecified));
        assert_eq!(bench.stalls.limit(Kind::Step), 1000 * SECOND);
    }

    #[test]
    fn waiting_for_a_slow_rank_teaches_nothing() {
        let mut bench = Bench::new(Some(1), Kind::Step, 2);
        bench.says(0, progress(1, 5, Waiting::Collective));
        for marks in 1..=100 {
            bench.passes(SECOND);
            bench.says(1, progress(marks, 4, Waiting::Unspecified));
        }
        bench.says(0, progress(2, 5, Waiting::Unspecified));
        assert_eq!(bench.stalls.limit(Kind::Step), 10 * SECOND);
    }

    #[test]
    fn a_tokenising_thread_has_a_limit_of_its_own() {
        let mut bench = Bench::new(Some(10), Kind::Measuring, 1);
        let at = |fed, feeding| Progress { fed, feeding, ..progress(1, 0, Waiting::Work) };
        bench.says(0, at(1, false));
        bench.passes(100 * SECOND);
        bench.says(0, at(2, true));
        bench.passes(10 * SECOND);
        assert_eq!(bench.found(), None);
        bench.passes(SECOND);
        bench.says(0, at(2, true));
        let stall = bench.stalls.find(&bench.workers()).unwrap();
        assert_eq!(stall.doing, "its tokenising thread is at the same pairs as before");
        bench.says(0, at(3, true));
        assert_eq!(bench.found(), None);
    }

    #[test]
    fn nobody_is_found_without_limits_or_without_counts() {
        let mut bench = Bench::new(Some(0), Kind::Step, 1);
        bench.passes(Duration::from_secs(1 << 30));
        assert_eq!(bench.found(), None);
        let unknown = Pulse { still: 1000 * SECOND, ..Pulse::default() };
        let worker = Worker { place: 0, kind: Kind::Step, pulse: &unknown };
        assert_eq!(Stalls::new(Some(1)).find(&[worker]), None);
    }
}
