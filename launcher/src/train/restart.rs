//! Decides whether a failed run is restarted, like torchrun's `--max-restarts`. Pure.
//!
//! - LNC-R1: no restart after failures that would repeat: bad input, a full disk, a NaN loss, the same failure at the same step three
//!   times.
//! - LNC-R2: no restart of a run that was told to stop.
//! - LNC-R3: the count returns to zero if the run has a newer checkpoint than at the last failure.

use dyad_proto::{ErrorCode, Fault, counted};

use crate::show::reached::Reached;

/// The run ends when the same failure comes at the same step for this many times.
const SAME: u32 = 3;

/// Restarts and progress of a run so far.
#[derive(Debug)]
pub struct Restarts {
    most: u32,
    /// Restarts since the last new checkpoint.
    count: u32,
    /// All restarts.
    total: u32,
    reached: Reached,
    last: Option<LastFailure>,
}

/// The failure of the last attempt.
#[derive(Debug)]
struct LastFailure {
    said: String,
    step: u64,
    /// How often in a row it has come at that step.
    count: u32,
}

impl Restarts {
    /// Permits `most` restarts without a new checkpoint.
    #[must_use]
    pub fn new(most: u32) -> Self {
        Self { most, count: 0, total: 0, reached: Reached::default(), last: None }
    }

    /// Number of restarts so far.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Whether any attempt has written rows.
    #[must_use]
    pub fn has_rows(&self) -> bool {
        self.reached.rows
    }

    /// Text for the summary: number of restarts and reason of the last one; `None` without restarts.
    #[must_use]
    pub fn summary(&self) -> Option<String> {
        let last = self.last.as_ref().filter(|_| self.total > 0)?;
        Some(format!("{}, the last one after: {}", self.total, last.said))
    }

    /// The final error of a run that is not restarted.
    #[must_use]
    pub fn stopped(&self, fault: Fault) -> Fault {
        self.ends(fault, "")
    }

    /// Records a failure. Returns the line that announces a restart, or the run's final error.
    pub fn after(&mut self, fault: Fault, reached: &Reached) -> Result<String, Fault> {
        let progress = reached.saved > self.reached.saved;
        self.reached.saved = self.reached.saved.max(reached.saved);
        self.reached.rows |= reached.rows;
        let said = fault.to_string();
        let before = match &self.last {
            Some(last) if is_same(&last.said, &said) && last.step == reached.step => last.count,
            _ => 0,
        };
        if !is_worth_another(&fault, reached) {
            return Err(self.ends(fault, ""));
        }
        self.last = Some(LastFailure { said: said.clone(), step: reached.step, count: before + 1 });
        if before + 1 >= SAME {
            let why = format!("the same failure at step {} for the {SAME}rd time", reached.step);
            return Err(self.ends(fault, &why));
        }
        if progress {
            self.count = 0;
        }
        if self.count >= self.most {
            return Err(self.ends(fault, ""));
        }
        self.count += 1;
        self.total += 1;
        let from = match self.reached.saved {
            Some(step) => format!("going on from checkpoint-{step}"),
            None => "there is no checkpoint yet, so it begins anew".into(),
        };
        Ok(format!("restart  {} of {}: {said}; {from}", self.count, self.most))
    }

    fn ends(&self, fault: Fault, why: &str) -> Fault {
        let again = (self.total > 0).then(|| format!("after {}", counted(self.total, "restart")));
        let words: Vec<&str> =
            [why, again.as_deref().unwrap_or("")].into_iter().filter(|word| !word.is_empty()).collect();
        if words.is_empty() {
            return fault;
        }
        Fault { message: format!("{} ({})", fault.message, words.join(", ")), ..fault }
    }
}

/// Whether two messages report the same failure. Numbers are ignored, because process ids, ports, seconds and losses change between
/// attempts; except ranks, which identify the trainer.
fn is_same(one: &str, other: &str) -> bool {
    let words = |said: &str| -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for word in said.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()) {
            let number = word.contains(|letter: char| letter.is_ascii_digit());
            let of_a_rank = words.last().is_some_and(|last| last == "rank");
            let word = if number && !of_a_rank { "#" } else { word };
            // Adjacent numbers count as one: an address or a fraction.
            if word != "#" || words.last().is_none_or(|last| last != "#") {
                words.push(word.to_owned());
            }
        }
        words
    };
    words(one) == words(other)
}

/// Whether a restart may succeed. A lost process or host may come back. A reported failure before the attempt's first row would probably
/// repeat (a missing library, a model that does not fit); later, a device or link may have failed.
fn is_worth_another(fault: &Fault, reached: &Reached) -> bool {
    fault.code == ErrorCode::Failed && !fault.lasting && (fault.lost || reached.rows)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dyad_proto::wire::run_event::Body;

    use super::*;

    fn at(step: u64, saved: Option<u64>) -> Reached {
        Reached { step, rows: step > 0, saved }
    }

    fn died(rank: u32) -> Fault {
        Fault::lost(format!("trainer rank {rank} died"))
    }

    #[test]
    fn lost_processes_are_restarted_and_lasting_failures_are_not() {
        let again = |fault: Fault, reached| Restarts::new(3).after(fault, &reached);
        let line = again(died(1), at(0, None)).unwrap();
        assert_eq!(
            line,
            "restart  1 of 3: trainer rank 1 died; there is no checkpoint yet, so it begins anew"
        );
        assert!(again(died(1), at(7, Some(5))).unwrap().ends_with("; going on from checkpoint-5"));
        assert!(again(Fault::failed("NCCL: a link is down"), at(7, None)).is_ok());
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        for (fault, reached) in [
            (Fault::input("bad"), at(7, None)),
            (Fault::new(ErrorCode::Interrupted, "stopped"), at(7, None)),
            (Fault::unavailable("the port is taken"), at(0, None)),
            (Fault::unwritten(Path::new("x"), &full), at(7, Some(5))),
            (Fault::failed("cannot open shared object"), at(0, None)),
            (Fault::failed("step 8: the loss is NaN").lasting(), at(7, Some(5))),
        ] {
            assert_eq!(again(fault.clone(), reached), Err(fault));
        }
        assert_eq!(Restarts::new(0).after(died(1), &at(7, Some(5))), Err(died(1)));
    }

    #[test]
    fn the_count_returns_to_zero_on_progress_and_the_error_has_the_total() {
        let mut restarts = Restarts::new(2);
        for (rank, saved) in [(0, 2), (1, 2), (2, 4), (3, 4)] {
            assert!(restarts.after(died(rank), &at(9, Some(saved))).is_ok(), "{rank}");
        }
        let end = restarts.after(died(4), &at(9, Some(4))).unwrap_err();
        assert_eq!(end.message, "trainer rank 4 died (after 4 restarts)");
        assert_eq!(restarts.total(), 4);
    }

    #[test]
    fn the_same_failure_at_the_same_step_ends_the_run_the_third_time() {
        let mut restarts = Restarts::new(9);
        assert!(restarts.after(died(1), &at(7, Some(5))).is_ok());
        assert!(restarts.after(died(1), &at(7, Some(5))).is_ok());
        let end = restarts.after(died(1), &at(7, Some(5))).unwrap_err();
        assert_eq!(
            end.message,
            "trainer rank 1 died (the same failure at step 7 for the 3rd time, after 2 restarts)"
        );
        let mut elsewhere = Restarts::new(9);
        for step in [7, 8, 7, 8, 7] {
            assert!(elsewhere.after(died(1), &at(step, Some(5))).is_ok());
        }
        assert!(elsewhere.summary().unwrap().starts_with("5, the last one after: trainer rank 1"));
    }

    /// Process ids, ports and seconds change at each restart.
    #[test]
    fn failures_are_compared_without_their_numbers() {
        let stall = |pid: u32, seconds: u32| {
            Fault::lost(format!(
                "trainer rank 1 (node0-cpu), pid {pid} on h, stands still although its heart beats: no progress for {seconds} s during \
                 the optimizer step; it waits for collective {pid}"
            ))
        };
        let mut restarts = Restarts::new(9);
        assert!(restarts.after(stall(101, 300), &at(7, Some(5))).is_ok());
        assert!(restarts.after(stall(2202, 301), &at(7, Some(5))).is_ok());
        let end = restarts.after(stall(30303, 300), &at(7, Some(5))).unwrap_err();
        assert!(
            end.message.ends_with("(the same failure at step 7 for the 3rd time, after 2 restarts)"),
            "{end}"
        );
        for (one, other, same) in [
            ("cannot connect to 10.0.0.1:4711", "cannot connect to 10.0.0.2:99", true),
            ("step 8: the loss is 1e30", "step 8: the loss is 2.5e31", true),
            ("trainer rank 1 died", "trainer rank 2 died", false),
            ("trainer rank 1 died", "trainer rank 1 left", false),
        ] {
            assert_eq!(is_same(one, other), same, "{one}; {other}");
        }
    }

    #[test]
    fn progress_is_read_from_events() {
        use dyad_proto::wire::{CheckpointReport, DataReport, EvaluationMetrics, StepMetrics};
        let mut reached = Reached::default();
        reached.note(&Body::Data(DataReport { start_step: 4, ..DataReport::default() }));
        assert_eq!(reached, Reached { step: 4, rows: false, saved: Some(4) });
        reached.note(&Body::Evaluation(EvaluationMetrics::default()));
        assert!(reached.rows);
        reached.note(&Body::Step(StepMetrics { step: 6, ..StepMetrics::default() }));
        reached.note(&Body::Checkpoint(CheckpointReport { step: 6, ..CheckpointReport::default() }));
        assert_eq!(reached, at(6, Some(6)));
    }
}
