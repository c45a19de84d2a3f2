//! Finds trainers that make no progress although they send heartbeats. Pure: the caller passes the time that the coordinator was awake.
//!
//! - CRD-H1: a trainer that waits for others is never blamed while a trainer that it may wait for makes progress.
//! - CRD-H2: a limit is never below [`FACTOR`] times the longest healthy pause so far in that kind of work.
//!
//! Every rank begins the same collectives in the same order. So the ranks that have begun the fewest are behind, and a rank that has
//! begun more may be waiting for them, even if its computing thread seems to work: on GPUs a wait looks like work.

use std::time::Duration;

use dyad_proto::wire::{Phase, Progress, Waiting};
use dyad_proto::{agrees, counted, plain};

/// A pause may take this many times the longest one so far.
const FACTOR: u32 = 10;

/// Kinds of work, each with its own limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reading weights: a cold network file system may pause for minutes.
    Loading,
    /// Waiting for lengths.
    Measuring,
    /// Connecting to the other ranks.
    Rendezvous,
    /// The first step, which compiles kernels and allocates memory.
    FirstStep,
    /// All later steps.
    Step,
    /// Evaluation, and scoring with the reference model.
    Evaluation,
    /// Writing a model or checkpoint.
    Saving,
    /// Tokenising, on a thread of its own.
    Tokenising,
}

const KINDS: usize = Kind::Tokenising as usize + 1;

impl Kind {
    /// The limit before longer pauses were seen in the run. For comparison: torchrun allows 10 minutes on GPUs and 30 on CPUs for
    /// everything.
    const fn floor(self) -> Duration {
        Duration::from_secs(match self {
            Self::Loading | Self::Saving => 20 * 60,
            Self::FirstStep => 15 * 60,
            Self::Measuring | Self::Rendezvous | Self::Tokenising => 10 * 60,
            Self::Step | Self::Evaluation => 5 * 60,
        })
    }

    /// The kind of a trainer's phase and step; `first` is the run's first step.
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

/// A trainer's last progress report, and the time since its threads last made progress.
#[derive(Clone, Debug, Default)]
pub struct Pulse {
    said: Option<Progress>,
    still: Duration,
    unfed: Duration,
}

impl Pulse {
    /// Adds time without progress.
    pub fn pass(&mut self, time: Duration) {
        self.still += time;
        self.unfed += time;
    }

    /// Takes a new report. `moved`: the trainer's phase or step changed.
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

    /// Restarts both times at zero.
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

    /// Text such as `its last collective was all_reduce, number 12`.
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

/// A trainer at work.
#[derive(Clone, Copy, Debug)]
pub struct Worker<'a> {
    /// Its place in the roster.
    pub place: usize,
    /// What it is doing.
    pub kind: Kind,
    /// Its progress.
    pub pulse: &'a Pulse,
}

/// A trainer that makes no progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Its place in the roster.
    pub place: usize,
    /// Time without progress.
    pub time: Duration,
    /// What it does or waits for, and its last collective, for the message.
    pub doing: String,
    /// Which other ranks may wait for it, for the message; may be empty.
    pub others: String,
}

/// The limits of a run.
#[derive(Clone, Debug)]
pub struct Stalls {
    /// `--stall-timeout`: replaces the floor of every kind; zero for no limits.
    floor: Option<Duration>,
    /// Longest healthy pause of each kind.
    seen: [Duration; KINDS],
}

impl Stalls {
    /// Limits for this `--stall-timeout`, in seconds.
    #[must_use]
    pub fn new(stall_timeout: Option<u64>) -> Self {
        Self { floor: stall_timeout.map(Duration::from_secs), seen: [Duration::ZERO; KINDS] }
    }

    /// Longest allowed pause in this kind of work.
    #[must_use]
    pub fn limit(&self, kind: Kind) -> Duration {
        if self.floor == Some(Duration::ZERO) {
            return Duration::MAX;
        }
        self.floor.unwrap_or(kind.floor()).max(self.seen[kind as usize] * FACTOR)
    }

    /// Takes a trainer's progress report; `moved` if its phase or step changed. If the trainer made progress, its pause until now counts as
    /// healthy. `all` is the time in which no trainer made progress.
    pub fn hear(&mut self, pulse: &mut Pulse, kind: Kind, progress: Progress, moved: bool, all: Duration) {
        let (still, unfed, waiting) = (pulse.still, pulse.unfed, pulse.waiting());
        let feeding = pulse.feeds();
        pulse.hear(progress, moved);
        let pause = match waiting {
            Waiting::Unspecified => still,
            // Other ranks may have worked meanwhile, so only the time in which no rank made progress counts.
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

    /// Time in which no trainer made progress.
    #[must_use]
    pub fn all_still<'a>(workers: impl Iterator<Item = Worker<'a>>) -> Duration {
        workers.map(|worker| worker.pulse.still).min().unwrap_or_default()
    }

    /// The trainer that has made no progress for too long, if any.
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
        // All ranks that are behind wait: for a rank that makes progress, or for a tokenising thread, which has its own limit.
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

    /// Trainers in one kind of work, driven by their reports.
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
    fn the_rank_behind_is_named_and_not_the_ranks_that_wait_for_it() {
        let mut bench = Bench::new(Some(10), Kind::Step, 3);
        // Rank 0 waits longest; rank 2 stops in its work.
        bench.says(0, progress(5, 8, Waiting::Collective));
        bench.passes(SECOND);
        bench.says(1, progress(5, 8, Waiting::Collective));
        bench.passes(SECOND);
        bench.says(2, progress(5, 7, Waiting::Unspecified));
        // Rank 2 had a healthy pause of two seconds, so twenty may pass.
        bench.passes(19 * SECOND);
        assert_eq!(bench.found(), None, "rank 0 has waited for 21 s, but rank 2 for none too long");
        bench.passes(2 * SECOND);
        let stall = bench.stalls.find(&bench.workers()).unwrap();
        assert_eq!((stall.place, stall.doing.as_str()), (2, "its last collective was all_reduce, number 7"));
        assert_eq!(stall.others, "2 ranks are ahead of it and may wait for it");
    }

    /// On GPUs the host waits for the device, which waits for another rank. That cannot be told from work.
    #[test]
    fn a_rank_ahead_is_not_blamed_while_the_rank_behind_makes_progress() {
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
    fn a_waiting_rank_with_fewer_collectives_is_blamed() {
        let mut bench = Bench::new(Some(10), Kind::Step, 2);
        bench.says(0, progress(5, 9, Waiting::Collective));
        bench.says(1, progress(5, 8, Waiting::Collective));
        bench.passes(11 * SECOND);
        assert_eq!(bench.found(), Some(1));
        // Same number of collectives: a rank that does not take up its work is behind a rank that waits in a collective.
        bench.says(0, progress(6, 9, Waiting::Collective));
        bench.says(1, progress(6, 9, Waiting::Work));
        bench.passes(200 * SECOND);
        assert_eq!(bench.found(), Some(1));
    }

    #[test]
    fn if_all_ranks_hang_in_one_collective_the_message_says_so() {
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
        // Time without work must not raise the limit.
        bench.says(0, progress(1, 0, Waiting::Work));
        bench.passes(1000 * SECOND);
        bench.says(0, progress(2, 0, Waiting::Unspecified));
        assert_eq!(bench.stalls.limit(Kind::Step), 1000 * SECOND);
    }

    #[test]
    fn waiting_for_a_slow_rank_does_not_raise_limits() {
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
    fn no_stall_is_found_without_limits_or_without_progress_reports() {
        let mut bench = Bench::new(Some(0), Kind::Step, 1);
        bench.passes(Duration::from_secs(1 << 30));
        assert_eq!(bench.found(), None);
        let unknown = Pulse { still: 1000 * SECOND, ..Pulse::default() };
        let worker = Worker { place: 0, kind: Kind::Step, pulse: &unknown };
        assert_eq!(Stalls::new(Some(1)).find(&[worker]), None);
    }
}
