//! Seconds of a step by phase, and the peak memory of this process.

use std::collections::HashMap;
use std::time::Instant;

use crate::observe::progress;
use crate::observe::trace;
use dyad_torch::recorder::Span;

/// Seconds by phase. The times of a phase that is entered twice add up.
#[derive(Clone, Debug, Default)]
pub struct Phases(HashMap<String, f64>);

impl Phases {
    /// Runs `work` and adds its time to `phase`.
    pub fn measure<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let _span = Span::enter(phase);
        let _part = trace::part(phase);
        let start = Instant::now();
        let result = work();
        progress::advance();
        *self.0.entry(phase.to_owned()).or_default() += start.elapsed().as_secs_f64();
        result
    }

    /// Adds time that was measured elsewhere to `phase`.
    pub fn add(&mut self, phase: &'static str, seconds: f64) {
        *self.0.entry(phase.to_owned()).or_default() += seconds;
    }

    /// Seconds of every phase.
    #[must_use]
    pub fn into_map(self) -> HashMap<String, f64> {
        self.0
    }
}

/// Peak resident memory of this process as the kernel reports it, in bytes; 0 if unknown.
#[must_use]
pub fn peak_resident_bytes() -> u64 {
    let status = dyad_proto::files::of_kernel("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
