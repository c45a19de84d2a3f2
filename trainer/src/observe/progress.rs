//! Progress of this process's threads, for heartbeats: atomic counters, because heartbeats must go on when other threads are stuck.
//!
//! The computing thread counts its pieces of work and says what it waits for; [`Counted`] counts collectives; the tokenising thread
//! counts messages. Each count is a few atomic operations for at least microseconds of work, and never waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

use dyad_proto::wire::{Progress, Waiting};
use tch::Tensor;

use dyad_torch::comm::{CommError, Communicator, Pending};

static MARKS: AtomicU64 = AtomicU64::new(0);
static WAITING: AtomicI32 = AtomicI32::new(0);
static COLLECTIVES: AtomicU64 = AtomicU64::new(0);
/// Index in [`NAMES`] of the collective that began last.
static COLLECTIVE: AtomicUsize = AtomicUsize::new(0);
static FED: AtomicU64 = AtomicU64::new(0);
static FEEDING: AtomicBool = AtomicBool::new(false);

/// Names of collectives. The first is the connecting of the ranks, which also needs all of them.
const NAMES: [&str; 6] = ["connect", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"];

/// Counts a piece of work of the computing thread.
pub fn advance() {
    MARKS.fetch_add(1, Ordering::Relaxed);
}

/// Runs `wait`, in which the computing thread waits for something that is not its own work.
pub fn waiting<T>(what: Waiting, wait: impl FnOnce() -> T) -> T {
    let before = WAITING.swap(what.into(), Ordering::Relaxed);
    let result = wait();
    // First count progress: no heartbeat may show the thread at work with the count from before the wait.
    advance();
    WAITING.store(before, Ordering::Relaxed);
    result
}

/// Runs `meet`, in which the ranks connect.
pub fn meeting<T>(meet: impl FnOnce() -> T) -> T {
    begin(NAMES[0]);
    waiting(Waiting::Collective, meet)
}

/// Runs `work`, in which the tokenising thread handles one message.
pub fn feeding<T>(work: impl FnOnce() -> T) -> T {
    FED.fetch_add(1, Ordering::Relaxed);
    FEEDING.store(true, Ordering::Relaxed);
    let result = work();
    FEEDING.store(false, Ordering::Relaxed);
    result
}

/// The current counts, for the next heartbeat.
#[must_use]
pub fn now() -> Progress {
    let name = NAMES.get(COLLECTIVE.load(Ordering::Relaxed)).copied().unwrap_or_default();
    Progress {
        marks: MARKS.load(Ordering::Relaxed),
        waiting: WAITING.load(Ordering::Relaxed),
        collectives: COLLECTIVES.load(Ordering::Relaxed),
        collective: name.to_owned(),
        fed: FED.load(Ordering::Relaxed),
        feeding: FEEDING.load(Ordering::Relaxed),
    }
}

fn begin(name: &str) {
    let number = NAMES.iter().position(|known| *known == name).unwrap_or(0);
    COLLECTIVE.store(number, Ordering::Relaxed);
    COLLECTIVES.fetch_add(1, Ordering::Relaxed);
    advance();
}

/// A communicator whose collectives are counted.
#[derive(Debug)]
pub struct Counted(pub Arc<dyn Communicator>);

impl Counted {
    fn started(
        name: &'static str,
        start: impl FnOnce() -> Result<Box<dyn Pending>, CommError>,
    ) -> Result<Box<dyn Pending>, CommError> {
        begin(name);
        Ok(Box::new(CountedPending(start()?)))
    }
}

struct CountedPending(Box<dyn Pending>);

impl Pending for CountedPending {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        waiting(Waiting::Collective, || self.0.wait())
    }
}

impl Communicator for Counted {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn piece_bytes(&self) -> Option<i64> {
        self.0.piece_bytes()
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        Self::started("all_reduce", || self.0.all_reduce(tensor))
    }

    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        Self::started("reduce_scatter", || self.0.reduce_scatter(output, input))
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        Self::started("all_gather", || self.0.all_gather(output, input))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Box<dyn Pending>, CommError> {
        Self::started("broadcast", || self.0.broadcast(tensor, root))
    }

    fn barrier(&self) -> Result<(), CommError> {
        begin("barrier");
        waiting(Waiting::Collective, || self.0.barrier())
    }

    fn abort(&self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests of this process may also count.
    #[test]
    fn waits_are_reported_and_their_end_counts_as_progress() {
        let before = now();
        meeting(|| {
            let during = now();
            assert_eq!(during.waiting(), Waiting::Collective);
            assert!(during.collectives > before.collectives && during.marks > before.marks);
            assert!(NAMES.contains(&during.collective.as_str()));
            waiting(Waiting::Row, || assert_eq!(now().waiting(), Waiting::Row));
            assert_eq!(now().waiting(), Waiting::Collective);
        });
        assert!(now().marks > before.marks + 1);
        feeding(|| assert!(now().feeding && now().fed > before.fed));
    }
}
