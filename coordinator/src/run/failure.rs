//! Finds the cause among many failures. Pure: the time is an argument.
//!
//! When a trainer dies, its peers fail a moment later because their communicator broke. These echoes often arrive
//! first, so an echo is held back for a while, and used only if no genuine cause arrives.

use std::time::{Duration, Instant};

use dyad_proto::{ErrorCode, Fault};

/// How long an echo waits for a genuine cause: a killed process's connection closes within milliseconds, and
/// users should not wait long for the error.
pub const ECHO_HOLD_BACK: Duration = Duration::from_secs(3);

/// Collects failures until one is known to be the cause.
#[derive(Debug, Default)]
pub struct FailureCause {
    echo: Option<(Instant, Fault)>,
}

impl FailureCause {
    /// Takes a failure; returns it if it is genuine. The first echo is kept for later.
    pub fn suspect(&mut self, now: Instant, fault: Fault) -> Option<Fault> {
        if fault.code == ErrorCode::Echo {
            self.echo.get_or_insert((now + ECHO_HOLD_BACK, fault));
            return None;
        }
        Some(fault)
    }

    /// The held echo, once its time is up; its code is then `Failed`, because no genuine cause came.
    #[must_use]
    pub fn overdue(&self, now: Instant) -> Option<Fault> {
        let (deadline, fault) = self.echo.as_ref()?;
        (now >= *deadline).then(|| Fault { code: ErrorCode::Failed, ..fault.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn genuine_cause_wins_at_once_even_after_an_echo() {
        let now = Instant::now();
        let mut failure_cause = FailureCause::default();
        assert_eq!(failure_cause.suspect(now, Fault::new(ErrorCode::Echo, "connection reset by peer")), None);
        let genuine = Fault::failed("out of memory");
        assert_eq!(failure_cause.suspect(now, genuine.clone()), Some(genuine));
    }

    #[test]
    fn first_echo_is_used_if_no_genuine_cause_comes() {
        let now = Instant::now();
        let mut failure_cause = FailureCause::default();
        assert_eq!(failure_cause.overdue(now + ECHO_HOLD_BACK), None);
        failure_cause.suspect(now, Fault::new(ErrorCode::Echo, "first"));
        failure_cause.suspect(now + ECHO_HOLD_BACK / 2, Fault::new(ErrorCode::Echo, "second"));
        assert_eq!(failure_cause.overdue(now + ECHO_HOLD_BACK - Duration::from_millis(1)), None);
        assert_eq!(failure_cause.overdue(now + ECHO_HOLD_BACK), Some(Fault::failed("first")));
    }
}
