//! Rate limit for the output of a process. An endless writer must not fill memory or disk, or hide the output of other processes.
//! Pure: the time is an argument.

use std::time::{Duration, Instant};

/// Longest line in bytes; the rest of a longer line is dropped.
pub const LONGEST_LINE: usize = 16 << 10;
/// Cost of a line in addition to its bytes, so that empty lines are limited too.
const LINE: u64 = 64;
/// Shortest time between two reports of dropped lines.
pub const REPORT: Duration = Duration::from_secs(10);

/// A token bucket: it fills at a constant rate, and each line takes tokens.
#[derive(Debug)]
pub struct Allowance {
    most: u64,
    per_second: u64,
    left: u64,
    filled: Instant,
    left_out: LeftOut,
    reported: Instant,
}

/// Dropped output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Dropped lines.
    pub lines: u64,
    /// Bytes in these lines.
    pub bytes: u64,
}

impl Allowance {
    /// For a file: a burst of 16 MiB, such as the stack traces of all threads, then 256 KiB/s.
    #[must_use]
    pub fn of_file(now: Instant) -> Self {
        Self::new(now, 16 << 20, 256 << 10)
    }

    /// For a terminal: a burst of 64 KiB, then 8 KiB/s.
    #[must_use]
    pub fn of_terminal(now: Instant) -> Self {
        Self::new(now, 64 << 10, 8 << 10)
    }

    fn new(now: Instant, most: u64, per_second: u64) -> Self {
        let left_out = LeftOut::default();
        Self { most, per_second, left: most, filled: now, left_out, reported: now }
    }

    /// Whether a line of `bytes` bytes may pass. Counts it as dropped if not.
    pub fn takes(&mut self, now: Instant, bytes: usize) -> bool {
        let passed = now.saturating_duration_since(self.filled);
        // Wait for a whole millisecond: shorter steps would always round to zero tokens.
        if passed >= Duration::from_millis(1) {
            let gained =
                u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).saturating_mul(self.per_second) / 1000;
            self.left = self.most.min(self.left.saturating_add(gained));
            self.filled = now;
        }
        let cost = bytes as u64 + LINE;
        if cost <= self.left {
            self.left -= cost;
            return true;
        }
        self.left_out.lines += 1;
        self.left_out.bytes += bytes as u64;
        false
    }

    /// Returns what was dropped since the last report, if that is at least [`REPORT`] ago or `end` is set; `None` if nothing was.
    pub fn due(&mut self, now: Instant, end: bool) -> Option<LeftOut> {
        let due = end || now.saturating_duration_since(self.reported) >= REPORT;
        if self.left_out == LeftOut::default() || !due {
            return None;
        }
        self.reported = now;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_dropped_lines_are_counted() {
        let start = Instant::now();
        let mut allowance = Allowance::of_terminal(start);
        let passed = (0..100_000).filter(|_| allowance.takes(start, 36)).count();
        assert_eq!(passed, (64 << 10) / 100);
        assert_eq!(allowance.due(start, false), None, "at most one report per interval");
        let left_out = LeftOut { lines: 100_000 - passed as u64, bytes: 36 * (100_000 - passed as u64) };
        assert_eq!(allowance.due(start + REPORT, false), Some(left_out));
        assert_eq!(allowance.due(start + REPORT, true), None);
    }

    #[test]
    fn sustained_output_is_limited_to_the_rate() {
        let start = Instant::now();
        let mut allowance = Allowance::of_terminal(start);
        while allowance.takes(start, 0) {}
        let second = |nth| start + Duration::from_secs(nth);
        for nth in 1..5 {
            let passed = (0..1000).filter(|_| allowance.takes(second(nth), 0)).count();
            assert!((127..=129).contains(&passed), "{passed}");
        }
        // Steps shorter than a millisecond add up.
        let passed =
            (0..20_000).filter(|at| allowance.takes(second(5) + Duration::from_micros(at * 50), 0)).count();
        assert!((240..270).contains(&passed), "{passed}");
    }
}
