//! Reads steps and evaluations that are no longer in memory from the metrics files.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::RangeInclusive;
use std::path::Path;

use dyad_proto::files;
use dyad_proto::run_folder::{EVALUATION_METRICS, METRICS};
use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{EvaluationMetrics, RunEvent, StepMetrics};

/// Order of an event among all steps and evaluations of a run. An evaluation comes after its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    step: u64,
    evaluation: bool,
}

impl Position {
    /// `None` for events without a row.
    pub(super) fn of(event: &Body) -> Option<Self> {
        match event {
            Body::Step(step) => Some(Self { step: step.step, evaluation: false }),
            Body::Evaluation(evaluation) => Some(Self { step: evaluation.step, evaluation: true }),
            _ => None,
        }
    }
}

/// Reads both metrics files in parallel, from their beginning.
pub(super) struct MetricsReader {
    steps: RowLines,
    evaluations: RowLines,
}

/// One metrics file.
struct RowLines {
    /// `None` after the last row, or if there is no file.
    file: Option<BufReader<File>>,
    evaluation: bool,
    /// The next row, if it was read already.
    next: Option<(Position, RunEvent)>,
}

impl MetricsReader {
    /// The rows in a run's output folder.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let lines = |name: &str, evaluation| match files::open(&dir.join(name)) {
            Ok(file) => Ok(RowLines { file: Some(BufReader::new(file)), evaluation, next: None }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(RowLines { file: None, evaluation, next: None })
            }
            Err(error) => Err(error),
        };
        Ok(Self { steps: lines(METRICS, false)?, evaluations: lines(EVALUATION_METRICS, true)? })
    }

    /// At most `most` rows of the range, in order, that come after `seen`, the last row shown to the watcher.
    pub(super) fn take(
        &mut self,
        range: &RangeInclusive<Position>,
        seen: Option<Position>,
        most: usize,
    ) -> io::Result<Vec<RunEvent>> {
        let mut taken = Vec::new();
        while taken.len() < most {
            let (step, evaluation) = (self.steps.position()?, self.evaluations.position()?);
            let lines = match (step, evaluation) {
                (Some(step), Some(evaluation)) if evaluation < step => &mut self.evaluations,
                (Some(_), _) => &mut self.steps,
                (None, Some(_)) => &mut self.evaluations,
                (None, None) => break,
            };
            match lines.next.take() {
                Some((at, event)) if at > *range.end() => {
                    lines.next = Some((at, event));
                    break;
                }
                Some((at, event)) if range.contains(&at) && Some(at) > seen => taken.push(event),
                _ => {}
            }
        }
        Ok(taken)
    }
}

impl RowLines {
    /// Position of the next row; lines that hold no row are skipped.
    fn position(&mut self) -> io::Result<Option<Position>> {
        while self.next.is_none() {
            let Some(file) = &mut self.file else { break };
            let mut line = Vec::new();
            if file.read_until(b'\n', &mut line)? == 0 {
                self.file = None;
            }
            self.next = event(&line, self.evaluation)
                .and_then(|body| Some((Position::of(&body)?, RunEvent { body: Some(body) })));
        }
        Ok(self.next.as_ref().map(|(at, _)| *at))
    }
}

/// The event from which a row was written. A null in the row (a value that was not finite) becomes NaN.
fn event(line: &[u8], evaluation: bool) -> Option<Body> {
    let row: HashMap<String, Option<f64>> = serde_json::from_slice(line).ok()?;
    let mut values: HashMap<String, f64> =
        row.into_iter().map(|(key, value)| (key, value.unwrap_or(f64::NAN))).collect();
    let step = *values.get("step")? as u64;
    Some(match evaluation {
        true => {
            values.remove("step");
            Body::Evaluation(EvaluationMetrics { step, values })
        }
        false => Body::Step(StepMetrics { step, values }),
    })
}
