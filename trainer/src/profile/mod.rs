//! `--profile`: a Chrome trace of a few steps and a table of where their time went.
//!
//! - [`recorder`]: libtorch's profiler.
//! - [`cost`]: operators by class, with the work that they must do.
//! - [`summary`]: events added up.
//! - [`roofline`]: what the machine can do.
//! - [`table`]: what a person reads.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use dyad_proto::{Fault, safe_file};
use roofline::Roofline;
use tch::{Device, Kind};

use crate::batch::TokenCounts;
use crate::ext::TorchError;

pub mod cost;
pub mod recorder;
pub mod roofline;
pub mod summary;
pub mod table;

/// Steps that are recorded.
const COUNT: u64 = 3;
/// First one of a process that has so many: earlier ones touch memory first, each that has more tokens than those before.
const SETTLED: u64 = 5;
/// First one of a shorter process.
const EARLIEST: u64 = 2;

/// Steps to record of a process that does so many.
fn recorded(steps: u64) -> RangeInclusive<u64> {
    let first = if steps >= SETTLED + COUNT - 1 { SETTLED } else { EARLIEST };
    first..=first + COUNT - 1
}

/// A profile that waits for its steps.
#[derive(Debug)]
pub struct Profile {
    dir: PathBuf,
    rank: u32,
    device: Device,
    kind: Kind,
    /// Steps to record.
    steps: RangeInclusive<u64>,
    /// Steps that this process has done.
    done: u64,
    tokens: TokenCounts,
    /// Measured before the first step: in a later one, the other ranks would wait for it.
    roofline: Roofline,
}

impl Profile {
    /// Will write `rank<N>.trace.json`, `rank<N>.json` and `rank<N>.txt` into the folder, about some of `steps`.
    #[must_use]
    pub fn new(dir: PathBuf, rank: u32, device: Device, kind: Kind, steps: u64) -> Self {
        Self {
            dir,
            rank,
            device,
            kind,
            steps: recorded(steps),
            done: 0,
            tokens: TokenCounts::default(),
            roofline: Roofline::measure(device, kind),
        }
    }

    /// Starts to record when it is time.
    pub fn before_step(&mut self) -> Result<(), Fault> {
        self.done += 1;
        if self.done == *self.steps.start() {
            recorder::start(self.device.is_cuda(), false).map_err(failed)?;
        }
        Ok(())
    }

    /// Counts the step's tokens; after the last step to record, writes everything.
    pub fn after_step(&mut self, tokens: TokenCounts) -> Result<(), Fault> {
        if !self.steps.contains(&self.done) {
            return Ok(());
        }
        self.tokens += tokens;
        if self.done == *self.steps.end() { self.write() } else { Ok(()) }
    }

    /// Writes what there is of a run that ended early.
    pub fn finish(&mut self) -> Result<(), Fault> {
        if self.done < *self.steps.start() {
            tracing::warn!("nothing was profiled: the run had no second step");
        } else if self.done < *self.steps.end() {
            self.write()?;
        }
        Ok(())
    }

    fn write(&self) -> Result<(), Fault> {
        let cannot = |path: &Path, error: &std::io::Error| {
            Fault::failed(format!("cannot write {}: {error}", path.display()))
        };
        safe_file::folder(&self.dir).map_err(|error| cannot(&self.dir, &error))?;
        let path = |ending: &str| self.dir.join(format!("rank{}.{ending}", self.rank));
        // The profiler opens the file by its name, and would follow a link.
        let trace = path("trace.json");
        safe_file::create(&trace).map_err(|error| cannot(&trace, &error))?;
        let events = recorder::stop(Some(&trace)).map_err(failed)?;
        let summary = summary::Summary::new(&events);
        let steps = summary.steps.max(1) as u64;
        let title = format!(
            "rank {}, {:?}, {:?}, {} threads, mean of {steps} steps",
            self.rank,
            self.device,
            self.kind,
            tch::get_num_threads()
        );
        // Other load on the machine comes and goes: the limits are those around the recorded steps.
        let roofline = self.roofline.mean(Roofline::measure(self.device, self.kind));
        let report = table::Report { title, summary, roofline, tokens: self.tokens.per(steps) };
        let json = serde_json::to_string_pretty(&report).map_err(|error| Fault::failed(error.to_string()))?;
        for (path, text) in [(path("json"), json), (path("txt"), report.render())] {
            safe_file::write(&path, text.as_bytes()).map_err(|error| cannot(&path, &error))?;
        }
        tracing::info!(table = %path("txt").display(), "profiled");
        Ok(())
    }
}

fn failed(error: TorchError) -> Fault {
    Fault::failed(format!("libtorch's profiler: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_long_enough_is_recorded_once_its_memory_is_touched() {
        assert_eq!((recorded(2), recorded(6)), (2..=4, 2..=4));
        assert_eq!((recorded(7), recorded(1000)), (5..=7, 5..=7));
    }
}
