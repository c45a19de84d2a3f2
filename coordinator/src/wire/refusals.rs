//! Log lines about refused peers: the first refusal of a kind in full, the others as a count.
//!
//! - CRD-L1: however many connections come, a port writes at most [`KINDS`] full lines and about as many counts in a [`PERIOD`].
//! - CRD-L2: every refusal without a line of its own is in a count.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long refusals are counted before their count is logged.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Most kinds that are counted separately: a scan from many addresses must fill neither memory nor log.
const KINDS: usize = 64;

/// The log message for a refused connection.
pub const CONNECTION: &str = "connection refused";

/// Refusals with the same message, address and reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RefusalKind {
    /// The message, such as [`CONNECTION`].
    what: &'static str,
    from: Option<IpAddr>,
    reason: String,
}

/// A kind that was logged already.
#[derive(Clone, Copy, Debug)]
struct KnownRefusal {
    told: Instant,
    /// Refusals since then.
    more: u64,
}

/// A count of refusals, for one log line.
#[derive(Debug, PartialEq, Eq)]
struct RefusalCount {
    /// `None` for refusals of further kinds, when there were [`KINDS`] already.
    kind: Option<RefusalKind>,
    times: u64,
}

/// Which refusals are in the log, and the counts that are not. Pure.
#[derive(Debug, Default)]
struct Ledger {
    known: HashMap<RefusalKind, KnownRefusal>,
    others: u64,
}

impl Ledger {
    /// Records a refusal; returns whether it gets a line of its own.
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

    /// Returns the counts that are due. A kind without refusals for a period is forgotten, and gets a full line when it comes again.
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

/// The refusals at one port; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Refusals(Arc<Mutex<Ledger>>);

impl Refusals {
    /// Logs or counts a refusal; `from` is `None` if no peer is known.
    pub fn note(&self, what: &'static str, from: Option<SocketAddr>, reason: &str) {
        let kind = RefusalKind { what, from: from.map(|address| address.ip()), reason: reason.to_owned() };
        if self.with(|ledger| ledger.note(Instant::now(), kind)) {
            tracing::warn!(peer = from.map(tracing::field::display), reason, "{what}");
        }
    }

    /// Logs all remaining counts.
    pub fn close(&self) {
        self.sum_up(Instant::now() + PERIOD);
    }

    /// Logs the counts that are due at `now`; to be called regularly.
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

    /// Runs `act` under the lock. The log is written outside of it.
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
    fn the_first_refusal_of_a_kind_gets_a_line_and_the_others_a_count() {
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
    fn repeated_refusals_are_counted_and_get_a_line_after_a_quiet_period() {
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
    fn a_scan_from_many_addresses_fills_neither_log_nor_memory() {
        let (mut ledger, start) = (Ledger::default(), Instant::now());
        let lines = (0..=u8::MAX).filter(|last| ledger.note(start, kind(*last, "noise"))).count();
        assert_eq!((lines, ledger.known.len()), (KINDS, KINDS));
        assert_eq!(ledger.due(start), [RefusalCount { kind: None, times: 256 - KINDS as u64 }]);
        assert_eq!(ledger.due(start + PERIOD), []);
        assert!(ledger.note(start + PERIOD, kind(0, "noise")), "there is room again");
    }
}
