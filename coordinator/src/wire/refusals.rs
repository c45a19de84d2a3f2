//! What the log says of those who are turned away: the first of a kind in full, the rest counted.
//!
//! - CRD-L1: however often somebody knocks, a port writes at most [`KINDS`] lines in full and as many counts in a [`PERIOD`].
//! - CRD-L2: nobody is forgotten: what has no line of its own is in a count.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long refusals are counted before a line says how many they were.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Kinds that are told apart at a time: a scan from many addresses must fill neither memory nor log.
const KINDS: usize = 64;

/// What the log says of a connection that is not let in.
pub const CONNECTION: &str = "connection refused";

/// Refusals that are one to a reader of the log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RefusalKind {
    /// Such as [`CONNECTION`].
    what: &'static str,
    from: Option<IpAddr>,
    reason: String,
}

/// A kind that is in the log already.
#[derive(Clone, Copy, Debug)]
struct KnownRefusal {
    told: Instant,
    /// How many came since.
    more: u64,
}

/// A line that stands for many refusals.
#[derive(Debug, PartialEq, Eq)]
struct RefusalCount {
    /// None for those that came when there were too many kinds to tell apart.
    kind: Option<RefusalKind>,
    times: u64,
}

/// What is in the log, and what has yet to be. Pure.
#[derive(Debug, Default)]
struct Ledger {
    known: HashMap<RefusalKind, KnownRefusal>,
    others: u64,
}

impl Ledger {
    /// One more; whether it gets a line of its own.
    fn note(&mut self, now: Instant, kind: RefusalKind) -> bool {
        if let Some(known) = self.known.get_mut(&kind) {
            known.more += 1;
            return false;
        }
        if self.known.len() == KINDS {
            self.others += 1;
            return false;
        }
        self.known.insert(kind, KnownRefusal { told: now, more: 0 });
        true
    }

    /// Counts that are due. A kind that was quiet for a period is new when it comes again.
    fn due(&mut self, now: Instant) -> Vec<RefusalCount> {
        let mut due = Vec::new();
        self.known.retain(|kind, known| {
            if now.saturating_duration_since(known.told) < PERIOD {
                return true;
            }
            let times = std::mem::take(&mut known.more);
            known.told = now;
            if times > 0 {
                due.push(RefusalCount { kind: Some(kind.clone()), times });
            }
            times > 0
        });
        let others = std::mem::take(&mut self.others);
        if others > 0 {
            due.push(RefusalCount { kind: None, times: others });
        }
        due
    }
}

/// Who was turned away at one port; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Refusals(Arc<Mutex<Ledger>>);

impl Refusals {
    /// Somebody was turned away, or nobody in particular could be let in.
    pub fn note(&self, what: &'static str, from: Option<SocketAddr>, reason: &str) {
        let kind = RefusalKind { what, from: from.map(|address| address.ip()), reason: reason.to_owned() };
        if self.with(|ledger| ledger.note(Instant::now(), kind)) {
            tracing::warn!(peer = from.map(tracing::field::display), reason, "{what}");
        }
    }

    /// Writes every count that is left.
    pub fn close(&self) {
        self.sum_up(Instant::now() + PERIOD);
    }

    /// Writes the counts that are due by then; to be called from time to time.
    pub fn sum_up(&self, now: Instant) {
        for RefusalCount { kind, times } in self.with(|ledger| ledger.due(now)) {
            match kind {
                Some(RefusalKind { what, from, reason }) => {
                    let peer = from.map(tracing::field::display);
                    tracing::warn!(peer, reason, times, "{what} again");
                }
                None => tracing::warn!(times, "more of other kinds or from other addresses refused"),
            }
        }
    }

    /// Nothing is written under the lock.
    fn with<T>(&self, act: impl FnOnce(&mut Ledger) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(last: u8, reason: &str) -> RefusalKind {
        RefusalKind { what: CONNECTION, from: Some([10, 0, 0, last].into()), reason: reason.into() }
    }

    #[test]
    fn the_first_of_a_kind_has_a_line_and_the_rest_a_count() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        assert!(ledger.note(start, kind(1, "noise")));
        for _ in 0..1000 {
            assert!(!ledger.note(start, kind(1, "noise")));
        }
        assert!(ledger.note(start, kind(1, "expired")), "another reason is another kind");
        assert!(ledger.note(start, kind(2, "noise")), "so is another address");
        assert_eq!(ledger.due(start + PERIOD - Duration::from_millis(1)), []);
        assert_eq!(ledger.due(start + PERIOD), [RefusalCount { kind: Some(kind(1, "noise")), times: 1000 }]);
    }

    #[test]
    fn who_keeps_knocking_is_counted_and_who_comes_back_is_new() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        assert!(ledger.note(start, kind(1, "noise")));
        for period in 1..4 {
            assert!(!ledger.note(start, kind(1, "noise")));
            let counts = ledger.due(start + PERIOD * period);
            assert_eq!(counts, [RefusalCount { kind: Some(kind(1, "noise")), times: 1 }], "{period}");
        }
        assert_eq!(ledger.due(start + PERIOD * 4), []);
        assert!(ledger.note(start + PERIOD * 4, kind(1, "noise")));
    }

    #[test]
    fn a_scan_from_everywhere_fills_neither_log_nor_memory() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let lines = (0..=u8::MAX).filter(|last| ledger.note(start, kind(*last, "noise"))).count();
        assert_eq!((lines, ledger.known.len()), (KINDS, KINDS));
        assert_eq!(ledger.due(start), [RefusalCount { kind: None, times: 256 - KINDS as u64 }]);
        assert_eq!(ledger.due(start + PERIOD), []);
        assert!(ledger.note(start + PERIOD, kind(0, "noise")), "there is room again");
    }
}
