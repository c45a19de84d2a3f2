//! Whether a run that failed is started again, as torchrun does it. Pure but for a look into the run's folder.
//!
//! - LNC-R1: what would fail again is not tried again: bad input, a full disk, a loss that is no number, the same failure at the same step
//!   three times.
//! - LNC-R2: who was told to stop is not started again.
//! - LNC-R3: the count starts afresh once the run has come to a later checkpoint than at the last failure.

use dyad_proto::{ErrorCode, Fault, counted};

use crate::show::reached::Reached;

/// As often the same failure at the same step ends the run.
const SAME: u32 = 3;

/// What the attempts so far have come to.
#[derive(Debug)]
pub struct Restarts {
    most: u32,
    /// Since the last progress.
    count: u32,
    /// In all.
    total: u32,
    reached: Reached,
    last: Option<LastFailure>,
}

/// The failure of the last attempt.
#[derive(Debug)]
struct LastFailure {
    said: String,
    step: u64,
    /// How often it has come at that step.
    count: u32,
}

impl Restarts {
    /// At most so many without progress.
    #[must_use]
    pub fn new(most: u32) -> Self {
        Self { most, count: 0, total: 0, reached: Reached::default(), last: None }
    }

    /// How often the run was started again.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.total
    }

    /// The run has rows, from whichever attempt.
    #[must_use]
    pub fn has_rows(&self) -> bool {
        self.reached.rows
    }

    /// For the summary: how often the run was started again, and why the last time.
    #[must_use]
    pub fn summary(&self) -> Option<String> {
        let last = self.last.as_ref().filter(|_| self.total > 0)?;
        Some(format!("{}, the last one after: {}", self.total, last.said))
    }

    /// What a run ends with that was told to stop.
    #[must_use]
    pub fn stopped(&self, fault: Fault) -> Fault {
        self.ends(fault, "")
    }

    /// After a failure: the line that announces another attempt, or the failure that the run ends with.
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

/// Two reports of one failure differ in numbers alone: process ids, ports, seconds and losses change from one attempt to the next. The rank
/// says which trainer it was.
fn is_same(one: &str, other: &str) -> bool {
    let words = |said: &str| -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for word in said.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()) {
            let number = word.contains(|letter: char| letter.is_ascii_digit());
            let of_a_rank = words.last().is_some_and(|last| last == "rank");
            let word = if number && !of_a_rank { "#" } else { word };
            // An address or a fraction is one number.
            if word != "#" || words.last().is_none_or(|last| last != "#") {
                words.push(word.to_owned());
            }
        }
        words
    };
    words(one) == words(other)
}

/// A process or host that is gone may be there again. What failed with words of its own before the first row of this attempt would
/// most likely do so again: a missing library, a model that does not fit. Later, a device or a link may have failed.
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
    fn lost_processes_are_worth_another_attempt_and_what_fails_for_good_is_not() {
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
    fn the_count_starts_afresh_on_progress_and_the_end_says_how_often() {
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
    fn a_failure_is_the_same_whatever_its_numbers_are() {
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
    fn events_tell_how_far_a_run_has_come() {
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
