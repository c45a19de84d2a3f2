//! How much a process may say. One that writes without end must fill neither memory nor disk, nor hide what others say. Pure: the
//! time is an argument.

use std::time::{Duration, Instant};

/// Longest line that is kept whole.
pub const LONGEST_LINE: usize = 16 << 10;
/// Every line costs as much as this beside its bytes: empty ones are no way around.
const LINE: u64 = 64;
/// How often a reader is told what was left out.
pub const REPORT: Duration = Duration::from_secs(10);

/// A bucket that fills with time and that lines take from.
#[derive(Debug)]
pub struct Allowance {
    most: u64,
    per_second: u64,
    left: u64,
    filled: Instant,
    left_out: LeftOut,
    reported: Instant,
}

/// What a reader does not get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Lines.
    pub lines: u64,
    /// And the bytes in them.
    pub bytes: u64,
}

impl Allowance {
    /// For a file: 16 MiB at once, such as a trace of every thread, and 256 KiB a second on end.
    #[must_use]
    pub fn of_file(now: Instant) -> Self {
        Self::new(now, 16 << 20, 256 << 10)
    }

    /// For a terminal, where a person reads: 64 KiB at once, and 8 KiB a second on end.
    #[must_use]
    pub fn of_terminal(now: Instant) -> Self {
        Self::new(now, 64 << 10, 8 << 10)
    }

    fn new(now: Instant, most: u64, per_second: u64) -> Self {
        let left_out = LeftOut::default();
        Self { most, per_second, left: most, filled: now, left_out, reported: now }
    }

    /// Whether a line of so many bytes may be shown. What may not is counted.
    pub fn takes(&mut self, now: Instant, bytes: usize) -> bool {
        let passed = now.saturating_duration_since(self.filled);
        // Less than a millisecond would round to nothing, again and again.
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

    /// What was left out since it was last asked, once a [`REPORT`]; at the end whatever there is.
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
    fn a_burst_passes_and_a_flood_is_counted() {
        let start = Instant::now();
        let mut allowance = Allowance::of_terminal(start);
        let passed = (0..100_000).filter(|_| allowance.takes(start, 36)).count();
        assert_eq!(passed, (64 << 10) / 100);
        assert_eq!(allowance.due(start, false), None, "not every line has a line that says so");
        let left_out = LeftOut { lines: 100_000 - passed as u64, bytes: 36 * (100_000 - passed as u64) };
        assert_eq!(allowance.due(start + REPORT, false), Some(left_out));
        assert_eq!(allowance.due(start + REPORT, true), None);
    }

    #[test]
    fn whoever_goes_on_writing_has_what_a_second_gives() {
        let start = Instant::now();
        let mut allowance = Allowance::of_terminal(start);
        while allowance.takes(start, 0) {}
        let second = |nth| start + Duration::from_secs(nth);
        for nth in 1..5 {
            let passed = (0..1000).filter(|_| allowance.takes(second(nth), 0)).count();
            assert!((127..=129).contains(&passed), "{passed}");
        }
        // Steps too small to count for themselves count together.
        let passed =
            (0..20_000).filter(|at| allowance.takes(second(5) + Duration::from_micros(at * 50), 0)).count();
        assert!((240..270).contains(&passed), "{passed}");
    }
}
