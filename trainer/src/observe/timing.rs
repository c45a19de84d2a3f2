//! Where a step's time goes.

use std::collections::HashMap;
use std::time::Instant;

use crate::observe::progress;
use crate::observe::trace;
use dyad_torch::recorder::Span;

/// Seconds by phase; a phase entered twice adds up.
#[derive(Clone, Debug, Default)]
pub struct Phases(HashMap<String, f64>);

impl Phases {
    /// Runs `work` and books its time under `phase`.
    pub fn measure<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let _span = Span::enter(phase);
        let _part = trace::part(phase);
        let start = Instant::now();
        let result = work();
        progress::advance();
        *self.0.entry(phase.to_owned()).or_default() += start.elapsed().as_secs_f64();
        result
    }

    /// Books time that was measured elsewhere.
    pub fn add(&mut self, phase: &'static str, seconds: f64) {
        *self.0.entry(phase.to_owned()).or_default() += seconds;
    }

    /// Seconds of every phase.
    #[must_use]
    pub fn into_map(self) -> HashMap<String, f64> {
        self.0
    }
}

/// Most resident memory this process has had, in bytes, by the kernel's account.
#[must_use]
pub fn peak_resident_bytes() -> u64 {
    let status = dyad_proto::files::of_kernel("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
