//! Spans of a step's parts, kept in memory until it is known whether to export them.
//!
//! The coordinator decides for all ranks: a step's trace context comes with its assignment. If its sampled flag is set, the spans are
//! exported when the step ends. Otherwise the last few steps stay in memory, and a step is exported if the coordinator finds that it was
//! slow. A step that fails is always exported. Recording a part costs two readings of the clock and an uncontended lock.

use dyad_proto::names::phase;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use dyad_telemetry::{ContextGuard, KeyValue, SpanContext, SpanRecord, Spans, current, parse, spans};

/// Steps kept in memory for the coordinator's decision, which comes at most a window of assignments later.
const KEPT: usize = 16;

/// Most parts of one step; more are only counted, because tracing back ends reject larger traces.
const MOST_PARTS: usize = 4096;

/// A part of a step.
#[derive(Clone, Debug)]
struct SpanPart {
    name: &'static str,
    /// Index of the part around it.
    within: Option<usize>,
    start: SystemTime,
    end: Option<SystemTime>,
    attributes: Vec<KeyValue>,
}

/// One step of this rank.
#[derive(Clone, Debug)]
struct StepTrace {
    step: u64,
    /// The step's span at the coordinator.
    parent: SpanContext,
    /// This rank's span below it.
    context: SpanContext,
    start: SystemTime,
    attributes: Vec<KeyValue>,
    parts: Vec<SpanPart>,
    /// Index of the open part.
    open: Option<usize>,
    /// Collectives in flight: bucket, and index of the part.
    in_flight: Vec<(usize, usize)>,
    dropped: i64,
    /// The coordinator asked for the step before it ended.
    asked_for: bool,
}

#[derive(Debug)]
struct Recorder {
    current: Option<StepTrace>,
    done: VecDeque<(StepTrace, SystemTime)>,
}

impl Recorder {
    /// Ends the current step. Returns it for export, or keeps it for the coordinator's decision.
    fn finish(&mut self, now: SystemTime) -> Option<StepTrace> {
        let step = self.current.take()?;
        if step.parent.is_sampled() || step.asked_for {
            return Some(step);
        }
        if self.done.len() >= KEPT {
            self.done.pop_front();
        }
        self.done.push_back((step, now));
        None
    }

    /// Returns a finished step with its end. Marks the current step, so that it is exported when it ends.
    fn ask_for(&mut self, number: u64) -> Option<(StepTrace, SystemTime)> {
        if let Some(step) = self.current.as_mut().filter(|step| step.step == number) {
            step.asked_for = true;
        }
        let place = self.done.iter().position(|(step, _)| step.step == number)?;
        self.done.remove(place)
    }
}

static ON: AtomicBool = AtomicBool::new(false);
static RECORDER: Mutex<Recorder> = Mutex::new(Recorder { current: None, done: VecDeque::new() });

fn recorder() -> MutexGuard<'static, Recorder> {
    RECORDER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Facts about a step that begins.
#[derive(Debug)]
pub struct Beginning<'a> {
    /// Number of the step.
    pub step: u64,
    /// This rank.
    pub rank: u32,
    /// Number of this rank's pairs.
    pub pairs: usize,
    /// The context that came with the assignment.
    pub traceparent: &'a str,
    /// How long the rank waited for the assignment and its tokens, up to now.
    pub waited: Duration,
}

/// Begins a step. Log lines of this thread carry its ids until the guard is dropped.
#[must_use]
pub fn begin(beginning: &Beginning<'_>) -> Option<ContextGuard> {
    let Some((spans, parent)) = spans().zip(parse(beginning.traceparent)) else {
        ON.store(false, Ordering::Relaxed);
        return None;
    };
    let now = SystemTime::now();
    let start = now - beginning.waited;
    let context = spans.child(&parent);
    let fetch = SpanPart { name: phase::FETCH, within: None, start, end: Some(now), attributes: Vec::new() };
    let attributes = vec![
        KeyValue::new("train.step", beginning.step as i64),
        KeyValue::new("train.rank", i64::from(beginning.rank)),
        KeyValue::new("train.pairs", beginning.pairs as i64),
    ];
    let guard = current(&context);
    recorder().current = Some(StepTrace {
        step: beginning.step,
        parent,
        context,
        start,
        attributes,
        parts: vec![fetch],
        open: None,
        in_flight: Vec::new(),
        dropped: 0,
        asked_for: false,
    });
    ON.store(true, Ordering::Relaxed);
    Some(guard)
}

/// A part of the step; it ends when this is dropped.
#[derive(Debug)]
pub struct PartGuard(Option<usize>);

/// Begins a part of the step.
pub fn part(name: &'static str) -> PartGuard {
    PartGuard(with_current(|step| {
        let index = step.add(name, Vec::new())?;
        step.open = Some(index);
        Some(index)
    }))
}

impl Drop for PartGuard {
    fn drop(&mut self) {
        let Some(index) = self.0 else { return };
        with_current(|step| {
            let part = step.parts.get_mut(index)?;
            part.end = Some(SystemTime::now());
            step.open = part.within;
            Some(())
        });
    }
}

/// Begins a bucket's reduction, which runs in parallel with the parts that follow.
pub fn reduction(operation: &'static str, bucket: usize, bytes: usize) {
    with_current(|step| {
        let attributes = vec![
            KeyValue::new("train.bucket", bucket as i64),
            KeyValue::new("train.bucket.size", bytes as i64),
        ];
        let index = step.add(operation, attributes)?;
        step.in_flight.push((bucket, index));
        Some(())
    });
}

/// Ends a bucket's reduction.
pub fn reduced(bucket: usize) {
    with_current(|step| {
        let place = step.in_flight.iter().position(|(other, _)| *other == bucket)?;
        let (_, index) = step.in_flight.swap_remove(place);
        step.parts.get_mut(index)?.end = Some(SystemTime::now());
        Some(())
    });
}

fn with_current<T>(act: impl FnOnce(&mut StepTrace) -> Option<T>) -> Option<T> {
    if !ON.load(Ordering::Relaxed) {
        return None;
    }
    recorder().current.as_mut().and_then(act)
}

/// Ends the step: exports its spans, or keeps them.
pub fn end() {
    let now = SystemTime::now();
    let leaving = recorder().finish(now);
    if let (Some(step), Some(spans)) = (leaving, spans()) {
        step.export(spans, now, None);
    }
}

/// Exports a step that the coordinator asks for.
pub fn keep(number: u64) {
    let leaving = recorder().ask_for(number);
    if let (Some((step, end)), Some(spans)) = (leaving, spans()) {
        step.export(spans, end, None);
    }
}

/// Exports the unfinished step of a process that fails.
pub fn fail(reason: &str) {
    if let (Some(step), Some(spans)) = (recorder().current.take(), spans()) {
        step.export(spans, SystemTime::now(), Some(reason));
    }
}

impl StepTrace {
    fn add(&mut self, name: &'static str, attributes: Vec<KeyValue>) -> Option<usize> {
        if self.parts.len() >= MOST_PARTS {
            self.dropped += 1;
            return None;
        }
        self.parts.push(SpanPart {
            name,
            within: self.open,
            start: SystemTime::now(),
            end: None,
            attributes,
        });
        Some(self.parts.len() - 1)
    }

    /// Exports all spans. An error is put on the parts without an end, because the step failed in them.
    fn export(self, spans: &Spans, end: SystemTime, error: Option<&str>) {
        let contexts: Vec<SpanContext> = self.parts.iter().map(|_| spans.child(&self.context)).collect();
        for (index, part) in self.parts.into_iter().enumerate() {
            let parent = part.within.map_or(&self.context, |within| &contexts[within]);
            let times = part.start..part.end.unwrap_or(end);
            let mut record = SpanRecord::new(part.name, contexts[index].clone(), Some(parent.clone()), times);
            record.attributes = part.attributes;
            record.error = error.filter(|_| part.end.is_none()).map(str::to_owned);
            spans.emit(record);
        }
        let mut record = SpanRecord::new("train_step", self.context, Some(self.parent), self.start..end);
        record.attributes = self.attributes;
        if self.dropped > 0 {
            record.attributes.push(KeyValue::new("train.dropped_spans", self.dropped));
        }
        record.error = error.map(str::to_owned);
        spans.emit(record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> StepTrace {
        let parent = parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00").unwrap();
        StepTrace {
            step: 1,
            context: parent.clone(),
            parent,
            start: SystemTime::now(),
            attributes: Vec::new(),
            parts: Vec::new(),
            open: None,
            in_flight: Vec::new(),
            dropped: 0,
            asked_for: false,
        }
    }

    /// A rank reports a step before it closes its spans, so the coordinator may ask for the step first.
    #[test]
    fn a_step_that_is_asked_for_before_it_ends_is_exported_at_its_end() {
        let now = SystemTime::now();
        let mut recorder = Recorder { current: Some(step()), done: VecDeque::new() };
        assert!(recorder.ask_for(1).is_none());
        assert_eq!(recorder.finish(now).map(|step| step.step), Some(1));

        recorder.current = Some(step());
        assert!(recorder.ask_for(2).is_none() && recorder.finish(now).is_none());
        assert_eq!(recorder.ask_for(1).map(|(step, end)| (step.step, end)), Some((1, now)));
        assert!(recorder.ask_for(1).is_none());
    }

    #[test]
    fn a_step_keeps_a_bounded_number_of_parts_and_counts_the_rest() {
        let mut step = step();
        let kept = (0..MOST_PARTS + 5).filter_map(|_| step.add("backward", Vec::new())).count();
        assert_eq!((kept, step.dropped), (MOST_PARTS, 5));
    }

    /// Without an endpoint nothing is recorded, whatever the coordinator sends.
    #[test]
    fn nothing_is_recorded_without_an_endpoint() {
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let beginning = Beginning { step: 1, rank: 0, pairs: 2, traceparent, waited: Duration::ZERO };
        assert!(begin(&beginning).is_none());
        drop(part("forward_policy"));
        reduction("all_reduce", 0, 4);
        reduced(0);
        end();
        let recorder = recorder();
        assert!(recorder.current.is_none() && recorder.done.is_empty());
    }
}
