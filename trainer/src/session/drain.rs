//! Stops all ranks at the same place when a run ends early: no rank begins work that another rank will not do.
//!
//! The coordinator asks all ranks to hold and hears how many pieces of work each has begun. Then it lets all ranks do as many as the rank
//! that is furthest.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Counts pieces of work as they begin. The computing thread calls `begin`; the session's thread calls `hold` and `drain`.
#[derive(Debug, Default)]
pub struct DrainBarrier {
    state: Mutex<DrainState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct DrainState {
    begun: u64,
    held: bool,
    last: Option<u64>,
}

impl DrainBarrier {
    /// Called before each piece of work; waits while the barrier is held. Returns false if no more work may begin.
    pub fn begin(&self) -> bool {
        let mut state = self.state();
        loop {
            match (state.last, state.held) {
                (Some(last), _) if state.begun >= last => return false,
                (None, true) => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                _ => {
                    state.begun += 1;
                    return true;
                }
            }
        }
    }

    /// Lets no more work begin. Returns how many pieces have begun.
    pub fn hold(&self) -> u64 {
        let mut state = self.state();
        state.held = true;
        state.begun
    }

    /// Lets work begin until `works` pieces have begun.
    pub fn drain(&self, works: u64) {
        self.state().last = Some(works);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, DrainState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Totals that the coordinator had written when it recorded a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Recorded {
    /// Optimizer steps.
    pub step: u64,
    /// Tokens trained on.
    pub num_tokens: u64,
    /// Rows of evaluations before the step.
    pub evaluations: u64,
}

/// The last recorded step. A thread can wait for a later one.
#[derive(Debug, Default)]
pub struct Watermark {
    reached: Mutex<Recorded>,
    changed: Condvar,
}

impl Watermark {
    /// Sets what was recorded, and wakes waiting threads.
    pub fn reach(&self, recorded: Recorded) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        *reached = (*reached).max(recorded);
        self.changed.notify_all();
    }

    /// Waits until `step` or a later one is recorded, and returns what was recorded last.
    pub fn wait(&self, step: u64) -> Recorded {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(reached, |reached| reached.step < step);
        *waited.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn ranks_that_are_behind_catch_up_and_no_rank_goes_further() {
        let barrier = Arc::new(DrainBarrier::default());
        assert!(barrier.begin() && barrier.begin());
        assert_eq!(barrier.hold(), 2);
        let works = std::thread::spawn({
            let barrier = Arc::clone(&barrier);
            move || std::iter::from_fn(|| barrier.begin().then_some(())).count()
        });
        barrier.drain(4);
        assert_eq!(works.join().unwrap(), 2);
        assert!(!barrier.begin());
    }

    #[test]
    fn waiters_wake_only_for_steps_that_were_recorded() {
        let recorded = |step| Recorded { step, num_tokens: 10 * step, evaluations: 1 };
        let milestone = Arc::new(Watermark::default());
        milestone.reach(recorded(3));
        milestone.reach(recorded(2));
        assert_eq!(milestone.wait(3), recorded(3));
        let (passed, order) = std::sync::mpsc::channel();
        let later = std::thread::spawn({
            let (milestone, passed) = (Arc::clone(&milestone), passed.clone());
            move || {
                assert_eq!(milestone.wait(4).num_tokens, 40);
                passed.send("waiting").unwrap();
            }
        });
        passed.send("reaching").unwrap();
        milestone.reach(recorded(4));
        later.join().unwrap();
        assert_eq!((order.recv(), order.recv()), (Ok("reaching"), Ok("waiting")));
    }
}
