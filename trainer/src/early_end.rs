//! Where all ranks stop together when a run ends early: nobody begins a work that another rank will not do.
//!
//! The coordinator asks everybody to hold, hears how many works each has begun, and lets everybody do as many as the furthest.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Counts works as they begin. The computing thread passes it; the session's thread opens and shuts it.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    begun: u64,
    held: bool,
    last: Option<u64>,
}

impl Gate {
    /// Before each work; waits while the gate is held. False when no more is to be begun.
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far something has got elsewhere, and what was said of it there; others wait for it.
#[derive(Debug, Default)]
pub struct Watermark {
    reached: Mutex<(u64, u64)>,
    changed: Condvar,
}

impl Watermark {
    /// It has got this far, and has this to say.
    pub fn reach(&self, step: u64, said: u64) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        *reached = (*reached).max((step, said));
        self.changed.notify_all();
    }

    /// Returns what was said last once it has got as far as `step`.
    pub fn wait(&self, step: u64) -> u64 {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(reached, |(reached, _)| *reached < step);
        waited.unwrap_or_else(PoisonError::into_inner).1
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_rank_that_is_behind_catches_up_and_nobody_goes_further() {
        let gate = Arc::new(Gate::default());
        assert!(gate.begin() && gate.begin());
        assert_eq!(gate.hold(), 2);
        let works = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || std::iter::from_fn(|| gate.begin().then_some(())).count()
        });
        gate.drain(4);
        assert_eq!(works.join().unwrap(), 2);
        assert!(!gate.begin());
    }

    #[test]
    fn a_milestone_lets_through_who_waits_for_what_is_reached_and_no_other() {
        let milestone = Arc::new(Watermark::default());
        milestone.reach(3, 30);
        milestone.reach(2, 20);
        assert_eq!(milestone.wait(3), 30);
        let (passed, order) = std::sync::mpsc::channel();
        let later = std::thread::spawn({
            let (milestone, passed) = (Arc::clone(&milestone), passed.clone());
            move || {
                assert_eq!(milestone.wait(4), 40);
                passed.send("waiting").unwrap();
            }
        });
        passed.send("reaching").unwrap();
        milestone.reach(4, 40);
        later.join().unwrap();
        assert_eq!((order.recv(), order.recv()), (Ok("reaching"), Ok("waiting")));
    }
}
