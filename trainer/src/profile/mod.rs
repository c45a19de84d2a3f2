//! `--profile`: a Chrome trace of a few steps and a table of where their time went.
//!
//! - [`recorder`]: libtorch's profiler.
//! - [`cost`]: operators by class, with the work that they must do.
//! - [`summary`]: events added up.
//! - [`roofline`]: what the machine can do.
//! - [`table`]: what a person reads.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use roofline::Roofline;
use tch::{Device, Kind};

use crate::batch::TokenCounts;
use crate::ext::TorchError;

pub mod cost;
pub mod recorder;
pub mod roofline;
pub mod summary;
pub mod table;

/// Steps of a process that are recorded: the first is left out, because memory is touched first there.
const STEPS: RangeInclusive<u64> = 2..=4;

/// A profile that waits for its steps.
#[derive(Debug)]
pub struct Profile {
    dir: PathBuf,
    rank: u32,
    device: Device,
    kind: Kind,
    /// Steps that this process has done.
    done: u64,
    tokens: TokenCounts,
    /// Measured before the first step: in a later one, the other ranks would wait for it.
    roofline: Roofline,
}

impl Profile {
    /// Will write `rank<N>.trace.json`, `rank<N>.json` and `rank<N>.txt` into the folder.
    #[must_use]
    pub fn new(dir: PathBuf, rank: u32, device: Device, kind: Kind) -> Self {
        Self {
            dir,
            rank,
            device,
            kind,
            done: 0,
            tokens: TokenCounts::default(),
            roofline: Roofline::measure(device, kind),
        }
    }

    /// Starts to record when it is time.
    pub fn before_step(&mut self) -> Result<(), Fault> {
        self.done += 1;
        if self.done == *STEPS.start() {
            recorder::start(self.device.is_cuda(), false).map_err(failed)?;
        }
        Ok(())
    }

    /// Counts the step's tokens; after the last step to record, writes everything.
    pub fn after_step(&mut self, tokens: TokenCounts) -> Result<(), Fault> {
        if !STEPS.contains(&self.done) {
            return Ok(());
        }
        self.tokens += tokens;
        if self.done == *STEPS.end() { self.write() } else { Ok(()) }
    }

    /// Writes what there is of a run that ended early.
    pub fn finish(&mut self) -> Result<(), Fault> {
        match self.done {
            0 | 1 => {
                tracing::warn!("nothing was profiled: the run had no second step");
                Ok(())
            }
            done if done < *STEPS.end() => self.write(),
            _ => Ok(()),
        }
    }

    fn write(&self) -> Result<(), Fault> {
        let cannot = |path: &Path, error: &std::io::Error| {
            Fault::failed(format!("cannot write {}: {error}", path.display()))
        };
        std::fs::create_dir_all(&self.dir).map_err(|error| cannot(&self.dir, &error))?;
        let path = |ending: &str| self.dir.join(format!("rank{}.{ending}", self.rank));
        let events = recorder::stop(Some(&path("trace.json"))).map_err(failed)?;
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
            std::fs::write(&path, text).map_err(|error| cannot(&path, &error))?;
        }
        tracing::info!(table = %path("txt").display(), "profiled");
        Ok(())
    }
}

fn failed(error: TorchError) -> Fault {
    Fault::failed(format!("libtorch's profiler: {error}"))
}
