//! Where all ranks stop together when a run ends early: nobody begins a work that another rank will not do.
//!
//! The coordinator asks everybody to hold, hears how many works each has begun, and lets everybody do as many as the furthest.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Counts works as they begin. The computing thread passes it; the session's thread opens and shuts it.
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
    /// Before each work; waits while the barrier is held. False when no more is to be begun.
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

    /// No work begins from now on; how many have.
    pub fn hold(&self) -> u64 {
        let mut state = self.state();
        state.held = true;
        state.begun
    }

    /// Works up to this one may begin.
    pub fn drain(&self, works: u64) {
        self.state().last = Some(works);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, DrainState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the coordinator had written of the run when it recorded a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Recorded {
    /// Optimizer steps.
    pub step: u64,
    /// Tokens trained on.
    pub num_tokens: u64,
    /// Rows of evaluations before the step.
    pub evaluations: u64,
}

/// The last step that was recorded; a thread waits for a later one.
#[derive(Debug, Default)]
pub struct Watermark {
    reached: Mutex<Recorded>,
    changed: Condvar,
}

impl Watermark {
    /// This was recorded.
    pub fn reach(&self, recorded: Recorded) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        *reached = (*reached).max(recorded);
        self.changed.notify_all();
    }

    /// Returns what was recorded last, once that is `step` or a later one.
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
    fn a_rank_that_is_behind_catches_up_and_nobody_goes_further() {
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
