//! `--profile`: a Chrome trace of a few steps and a table of where their time went.
//!
//! - [`recorder`]: libtorch's profiler.
//! - [`cost`]: classes of operators, and the least work that each does.
//! - [`summary`]: sums over events.
//! - [`roofline`]: limits of the machine.
//! - [`table`]: the report as text.

use dyad_torch::recorder;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use dyad_proto::{Fault, counted, safe_file};
use roofline::Roofline;
use tch::{Device, Kind};

use crate::batch::TokenCounts;
use dyad_torch::error::TorchError;

pub mod cost;
pub mod roofline;
pub mod summary;
pub mod table;

/// Number of steps to record.
const COUNT: u64 = 3;
/// First step worth profiling: earlier steps still allocate memory.
const SETTLED: u64 = 5;
/// First step to record in a shorter process.
const EARLIEST: u64 = 2;

/// Steps to record in a process that does `steps` steps.
fn recorded(steps: u64) -> RangeInclusive<u64> {
    let first = if steps >= SETTLED + COUNT - 1 { SETTLED } else { EARLIEST };
    first..=first + COUNT - 1
}

/// A profile of some steps of this process.
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
    /// Measured before the first step: later on, the other ranks would wait for the measurement.
    roofline: Roofline,
    /// True while libtorch's profiler runs.
    recording: bool,
}

impl Drop for Profile {
    /// Stops the profiler, so that an abandoned profile does not slow the steps that follow.
    fn drop(&mut self) {
        if self.recording {
            let _ = recorder::stop(None);
        }
    }
}

/// Checks before the first step that the profile can be written.
fn writable(dir: &Path, rank: u32) -> Result<(), Fault> {
    let refused = |path: &Path, why: &dyn std::fmt::Display| {
        Fault::input(format!("--profile cannot write {}: {why}", path.display()))
            .hint("move what stands there away, or start without --profile")
    };
    safe_file::folder(dir).map_err(|error| refused(dir, &error))?;
    let files = ENDINGS.map(|ending| file(dir, rank, ending));
    // Files of an earlier run are replaced.
    match files.iter().find(|path| path.exists() && !path.is_file()) {
        Some(path) => Err(refused(path, &"it is no file")),
        None => Ok(()),
    }
}

const ENDINGS: [&str; 3] = ["trace.json", "json", "txt"];

fn file(dir: &Path, rank: u32, ending: &str) -> PathBuf {
    dir.join(format!("rank{rank}.{ending}"))
}

impl Profile {
    /// Prepares a profile of some of `steps`, and creates its folder `dir`. The files are `rank<N>.trace.json`, `rank<N>.json` and
    /// `rank<N>.txt`.
    pub fn new(dir: PathBuf, rank: u32, device: Device, kind: Kind, steps: u64) -> Result<Self, Fault> {
        writable(&dir, rank)?;
        Ok(Self {
            dir,
            rank,
            device,
            kind,
            steps: recorded(steps),
            done: 0,
            tokens: TokenCounts::default(),
            roofline: Roofline::measure(device, kind),
            recording: false,
        })
    }

    /// Starts the profiler before the first step to record.
    pub fn before_step(&mut self) -> Result<(), Fault> {
        self.done += 1;
        if self.done == *self.steps.start() {
            recorder::start(self.device.is_cuda(), false).map_err(failed)?;
            self.recording = true;
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

    /// Writes the steps recorded so far, if the run ended early.
    pub fn finish(&mut self) -> Result<(), Fault> {
        if self.done < *self.steps.start() {
            tracing::warn!("nothing was profiled: the run had no second step");
        } else if self.done < *self.steps.end() {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), Fault> {
        let cannot = |path: &Path, error: &std::io::Error| {
            Fault::failed(format!("cannot write {}: {error}", path.display()))
        };
        safe_file::folder(&self.dir).map_err(|error| cannot(&self.dir, &error))?;
        let [trace, json_file, table_file] = ENDINGS.map(|ending| file(&self.dir, self.rank, ending));
        // The profiler opens the file by its name and would follow a link, so create it here.
        safe_file::create(&trace).map_err(|error| cannot(&trace, &error))?;
        self.recording = false;
        let events = recorder::stop(Some(&trace)).map_err(failed)?;
        let summary = summary::Summary::new(&events);
        let steps = summary.steps.max(1) as u64;
        let threads = i64::from(tch::get_num_threads());
        let title = format!(
            "rank {}, {:?}, {:?}, {}, mean of {}",
            self.rank,
            self.device,
            self.kind,
            counted(threads, "thread"),
            counted(steps, "step")
        );
        // Other load on the machine varies, so take the mean of the limits before and after the recorded steps.
        let roofline = self.roofline.mean(Roofline::measure(self.device, self.kind));
        let report = table::ProfileReport { title, summary, roofline, tokens: self.tokens.per(steps) };
        let json = serde_json::to_string_pretty(&report).map_err(|error| Fault::failed(error.to_string()))?;
        for (path, text) in [(&json_file, json), (&table_file, report.render())] {
            safe_file::write(path, text.as_bytes()).map_err(|error| cannot(path, &error))?;
        }
        tracing::info!(table = %table_file.display(), "profiled");
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
    fn an_unwritable_profile_is_found_before_the_first_step() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("profile");
        writable(&out, 0).unwrap();
        std::fs::write(file(&out, 0, "json"), "of an earlier run").unwrap();
        writable(&out, 0).unwrap();
        std::fs::create_dir(file(&out, 1, "trace.json")).unwrap();
        writable(&out, 0).unwrap();
        let fault = writable(&out, 1).unwrap_err();
        assert!(
            fault.message.contains("rank1.trace.json: it is no file") && !fault.hint.is_empty(),
            "{fault}"
        );
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::write(&out, "").unwrap();
        assert!(writable(&out, 0).unwrap_err().message.contains("it is a file"));
    }

    #[test]
    fn a_long_run_is_recorded_after_its_first_steps() {
        assert_eq!((recorded(2), recorded(6)), (2..=4, 2..=4));
        assert_eq!((recorded(7), recorded(1000)), (5..=7, 5..=7));
    }
}
