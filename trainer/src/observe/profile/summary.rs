//! Computes where a step's time goes from the profiler's events. Pure functions.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::cost::{Class, bytes, flops, plain_name};
use dyad_torch::recorder::ProfilerEvent;

/// Span around a whole optimizer step.
pub const STEP: &str = "step";

/// Where the time of the profiled steps went. Every number is per step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Optimizer steps that were profiled.
    pub steps: usize,
    /// Seconds.
    pub step_seconds: f64,
    /// Seconds in which a collective was in flight, mostly in parallel with other work.
    pub communication_seconds: f64,
    /// Parts of the step, longest first. Time in no part belongs to `step` itself.
    pub phases: Vec<ProfilePhase>,
    /// Host time by class of operator, longest first.
    pub classes: Vec<ProfileRow>,
    /// Host time by operator, longest first.
    pub operators: Vec<ProfileRow>,
    /// Accelerator time by class of kernel, longest first.
    pub kernels: Vec<ProfileRow>,
}

/// A part of the step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProfilePhase {
    /// Name of its span.
    pub name: String,
    /// Seconds, without the parts inside it.
    pub seconds: f64,
    /// Seconds in operators of each class.
    pub classes: BTreeMap<Class, f64>,
}

/// One class or operator.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProfileRow {
    /// Class or operator.
    pub name: String,
    /// Seconds in it, without the operators that it called.
    pub seconds: f64,
    /// Number of calls.
    pub calls: f64,
    /// Floating-point operations of matrix products and attention.
    pub flops: f64,
    /// Lower bound of the bytes that it read and wrote.
    pub bytes: f64,
}

impl Summary {
    /// Adds up the events.
    #[must_use]
    pub fn new(events: &[ProfilerEvent]) -> Self {
        let steps = events.iter().filter(|event| event.is_span && event.name == STEP).count();
        let share = 1.0 / steps.max(1) as f64;
        let mut phases: BTreeMap<&str, ProfilePhase> = BTreeMap::new();
        let (mut classes, mut operators, mut kernels) =
            (Tally::default(), Tally::default(), Tally::default());
        let mut step_seconds = 0.0;
        for Timed { event, own_ns, phase, leaf } in timed(events) {
            let seconds = own_ns as f64 * 1e-9 * share;
            if event.is_span {
                phases.entry(&event.name).or_default().seconds += seconds;
                if event.name == STEP {
                    step_seconds += event.duration_ns as f64 * 1e-9 * share;
                }
                continue;
            }
            let class = Class::of(&event.name);
            let least = if leaf { bytes(event) } else { 0.0 };
            let row = ProfileRow {
                seconds,
                calls: 1.0,
                flops: flops(event),
                bytes: least,
                ..ProfileRow::default()
            };
            *phases.entry(phase).or_default().classes.entry(class).or_default() += seconds;
            classes.add(class.name(), &row, share);
            operators.add(plain_name(&event.name), &row, share);
        }
        for event in events.iter().filter(|event| collective(event)) {
            let seconds = event.duration_ns as f64 * 1e-9 * share;
            operators.add(&event.name, &ProfileRow { seconds, calls: 1.0, ..ProfileRow::default() }, share);
        }
        for event in events.iter().filter(|event| event.on_device && !event.is_span) {
            let seconds = event.duration_ns as f64 * 1e-9 * share;
            let row = ProfileRow { seconds, calls: 1.0, ..ProfileRow::default() };
            kernels.add(Class::of(&event.name).name(), &row, share);
        }
        let named = phases.into_iter().map(|(name, phase)| ProfilePhase { name: name.to_owned(), ..phase });
        let mut summary = Self {
            steps,
            step_seconds,
            communication_seconds: in_flight_ns(events) as f64 * 1e-9 * share,
            phases: longest_first(named.collect(), |phase| phase.seconds),
            classes: classes.rows(),
            operators: operators.rows(),
            kernels: kernels.rows(),
        };
        summary.credit_kernels();
        summary
    }

    /// With an accelerator, moves the operations from the host's operators to the kernels: the host only launches them.
    fn credit_kernels(&mut self) {
        if self.kernels.is_empty() {
            return;
        }
        for row in &mut self.classes {
            if let Some(kernel) = self.kernels.iter_mut().find(|kernel| kernel.name == row.name) {
                kernel.flops += std::mem::take(&mut row.flops);
            }
        }
        let host = self.classes.iter_mut().chain(&mut self.operators);
        host.for_each(|row| (row.flops, row.bytes) = (0.0, 0.0));
    }

    /// Attention operators that ran, longest first. They show which kernel was used.
    #[must_use]
    pub fn attention(&self) -> Vec<&str> {
        let operators = self.operators.iter().map(|row| row.name.as_str());
        let all: Vec<&str> = operators.filter(|name| Class::of(name) == Class::Attention).collect();
        // The bridge's operators name the kernel that they call.
        let own: Vec<&str> = all.iter().copied().filter(|name| name.starts_with("dyad::")).collect();
        if own.is_empty() { all } else { own }
    }

    /// Floating-point operations of matrix products and attention.
    #[must_use]
    pub fn flops(&self) -> f64 {
        self.classes.iter().chain(&self.kernels).map(|row| row.flops).sum()
    }
}

/// True for a collective. It may begin in one part of the step and end in another.
fn collective(event: &ProfilerEvent) -> bool {
    event.is_span && Class::of(&event.name) == Class::Communication
}

/// Nanoseconds in which at least one collective was in flight; overlapping ones count once.
fn in_flight_ns(events: &[ProfilerEvent]) -> u64 {
    let mut spans: Vec<(u64, u64)> = events
        .iter()
        .filter(|event| collective(event))
        .map(|event| (event.start_ns, event.start_ns + event.duration_ns))
        .collect();
    spans.sort_unstable();
    let (mut total, mut covered) = (0, 0);
    for (start, end) in spans {
        total += end.saturating_sub(start.max(covered));
        covered = covered.max(end);
    }
    total
}

/// An event on the host, with its own time.
struct Timed<'a> {
    event: &'a ProfilerEvent,
    /// An operator's time without the operators that it called; a span's time without the spans inside it.
    own_ns: u64,
    /// Name of the innermost span around it.
    phase: &'a str,
    /// True if it called no other operator.
    leaf: bool,
}

struct OpenOperator<'a> {
    timed: Timed<'a>,
    end_ns: u64,
}

/// Nests the host's events by thread and time.
fn timed(events: &[ProfilerEvent]) -> Vec<Timed<'_>> {
    let mut ordered: Vec<&ProfilerEvent> = events
        .iter()
        .filter(|event| !event.on_device && event.name != "[memory]" && !collective(event))
        .collect();
    ordered.sort_by_key(|event| (event.thread, event.start_ns, Reverse(event.duration_ns)));
    let (mut done, mut open): (Vec<Timed<'_>>, Vec<OpenOperator<'_>>) = (Vec::new(), Vec::new());
    let mut thread = None;
    for event in ordered {
        let elsewhere = thread.replace(event.thread) != Some(event.thread);
        while let Some(top) = open.pop_if(|top| elsewhere || top.end_ns <= event.start_ns) {
            done.push(top.timed);
        }
        let phase = open.iter().rev().find(|outer| outer.timed.event.is_span);
        let phase = phase.map_or("outside the step", |outer| outer.timed.event.name.as_str());
        if let Some(outer) = open.last_mut() {
            outer.timed.leaf = false;
            // An operator inside a span is part of the span's own time.
            if event.is_span || !outer.timed.event.is_span {
                outer.timed.own_ns = outer.timed.own_ns.saturating_sub(event.duration_ns);
            }
        }
        let timed = Timed { event, own_ns: event.duration_ns, phase, leaf: true };
        open.push(OpenOperator { timed, end_ns: event.start_ns + event.duration_ns });
    }
    done.extend(open.into_iter().map(|open| open.timed));
    done
}

#[derive(Default)]
struct Tally(BTreeMap<String, ProfileRow>);

impl Tally {
    fn add(&mut self, name: &str, row: &ProfileRow, share: f64) {
        let total = self.0.entry(name.to_owned()).or_default();
        total.seconds += row.seconds;
        total.calls += row.calls * share;
        total.flops += row.flops * share;
        total.bytes += row.bytes * share;
    }

    fn rows(self) -> Vec<ProfileRow> {
        longest_first(self.0.into_iter().map(|(name, row)| ProfileRow { name, ..row }).collect(), |row| {
            row.seconds
        })
    }
}

fn longest_first<T>(mut items: Vec<T>, seconds: impl Fn(&T) -> f64) -> Vec<T> {
    items.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)));
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, start_ns: u64, duration_ns: u64, is_span: bool) -> ProfilerEvent {
        ProfilerEvent { name: name.into(), start_ns, duration_ns, is_span, ..ProfilerEvent::default() }
    }

    /// Two steps of 100 ns; in each a phase of 60 ns with a product of 40 ns that copies for 10 ns.
    fn two_steps() -> Vec<ProfilerEvent> {
        let mut events = Vec::new();
        for start in [1000, 2000] {
            let product = ProfilerEvent {
                shapes: vec![vec![3, 4], vec![4, 5]],
                kinds: vec!["float".into(), "float".into()],
                ..event("aten::mm", start + 20, 40, false)
            };
            let copy = ProfilerEvent {
                shapes: vec![vec![10]],
                kinds: vec!["float".into()],
                ..event("aten::copy_", start + 25, 10, false)
            };
            events.extend([
                copy,
                product,
                event("forward", start + 10, 60, true),
                event(STEP, start, 100, true),
            ]);
        }
        events
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} instead of {expected}");
    }

    #[test]
    fn time_is_counted_once() {
        let summary = Summary::new(&two_steps());
        assert_eq!(summary.steps, 2);
        close(summary.step_seconds, 100e-9);
        let names: Vec<&str> = summary.phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["forward", STEP]);
        close(summary.phases[0].seconds, 60e-9);
        close(summary.phases[1].seconds, 40e-9);
        close(summary.phases[0].classes[&Class::Gemm], 30e-9);
        close(summary.phases[0].classes[&Class::Copy], 10e-9);
    }

    #[test]
    fn operations_and_bytes_are_per_step() {
        let summary = Summary::new(&two_steps());
        let [product, copy] = &summary.operators[..] else { panic!("{summary:?}") };
        assert_eq!((product.name.as_str(), product.calls, product.flops), ("aten::mm", 1.0, 120.0));
        // Only the innermost operator moves bytes.
        assert_eq!((product.bytes, copy.bytes), (0.0, 80.0));
        assert_eq!(summary.flops(), 120.0);
    }

    #[test]
    fn the_attention_kernel_that_ran_is_named_once() {
        let mut events = two_steps();
        for (start, operations) in [(1012, 7), (2012, 9)] {
            events.push(event(&format!("dyad::attention flash forward {operations}"), start, 5, false));
        }
        let summary = Summary::new(&events);
        assert_eq!(summary.attention(), ["dyad::attention flash forward"]);
        assert_eq!(summary.flops(), 128.0);
    }

    /// A collective lasts from one part into another, and takes no time from either.
    #[test]
    fn a_collective_in_flight_takes_no_time_from_the_parts_of_the_step() {
        let mut events = two_steps();
        events.push(event("gloo:all_reduce", 1030, 60, true));
        let summary = Summary::new(&events);
        close(summary.communication_seconds, 30e-9);
        close(summary.phases[0].seconds, 60e-9);
        assert!(summary.operators.iter().any(|row| row.name == "gloo:all_reduce"));
    }

    #[test]
    fn overlapping_collectives_count_once() {
        let mut events = two_steps();
        for (start, duration) in [(1030, 60), (1040, 20), (1080, 30), (2050, 10)] {
            events.push(event("gloo:all_reduce", start, duration, true));
        }
        close(Summary::new(&events).communication_seconds, 45e-9);
    }

    #[test]
    fn kernels_of_an_accelerator_are_listed_separately() {
        let mut events = two_steps();
        events.push(ProfilerEvent { on_device: true, ..event("some_gemm_kernel", 1030, 500, false) });
        let summary = Summary::new(&events);
        close(summary.step_seconds, 100e-9);
        assert_eq!(summary.kernels[0].name, "matrix product");
        close(summary.kernels[0].seconds, 250e-9);
        // The operations count for the kernel.
        assert_eq!(
            (summary.kernels[0].flops, summary.classes[0].flops, summary.flops()),
            (120.0, 0.0, 120.0)
        );
    }

    #[test]
    fn threads_are_nested_separately() {
        let mut events = two_steps();
        events.push(ProfilerEvent { thread: 7, ..event("aten::add", 1005, 90, false) });
        let summary = Summary::new(&events);
        close(summary.phases[0].seconds, 60e-9);
        assert!(summary.phases.iter().any(|phase| phase.name == "outside the step"));
    }
}
