//! A real coordinator process, and the time in which it reads a file.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use dyad_tests::binary;

use crate::usage::{cpu_seconds, peak_memory};

/// A coordinator that has read its data and listens.
#[derive(Debug)]
pub(crate) struct Coordinator {
    child: Child,
    /// Kept open: a coordinator that cannot print its address fails.
    _stdout: BufReader<ChildStdout>,
    pub(crate) url: String,
    /// Time from the start of the process until it listens.
    pub(crate) ready_after: Duration,
}

impl Coordinator {
    /// Starts a coordinator and waits until it listens.
    pub(crate) fn start(dir: &Path, data: &Path, trainers: usize, config: &str) -> Self {
        let run = dir.join("run.toml");
        let (data, out) = (data.display(), dir.join("out").display().to_string());
        std::fs::write(
            &run,
            format!("model = \"m\"\ntraining_file = \"{data}\"\noutput_dir = \"{out}\"\n{config}\n"),
        )
        .unwrap();
        let mut command = Command::new(binary("coordinator"));
        command.arg("--config").arg(&run).args(["--overwrite", "--world-size", &trainers.to_string()]);
        command.env("DYAD_LOG", "warn").stdin(Stdio::null()).stdout(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let ready_after = start.elapsed();
        let announced: serde_json::Value = serde_json::from_str(&line).unwrap();
        let url = format!("http://{}", announced["listening"].as_str().unwrap());
        Self { child, _stdout: stdout, url, ready_after }
    }

    /// Returns the processor seconds used so far.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        cpu_seconds(&PathBuf::from(format!("/proc/{}/stat", self.child.id())))
    }

    /// Returns the largest resident set so far, in MiB.
    pub(crate) fn peak_memory(&self) -> f64 {
        peak_memory(self.child.id())
    }

    /// Waits for the end of the run. Panics unless it succeeds.
    pub(crate) fn end(mut self) {
        assert!(self.child.wait().unwrap().success(), "the coordinator failed");
    }

    /// Kills the coordinator before the end of its run.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Measures how the coordinator reads, checks and hashes a large file.
pub(crate) fn index(dir: &Path, data: &Path, pairs: usize) -> Vec<(String, String)> {
    let bytes = std::fs::metadata(data).unwrap().len();
    let coordinator = Coordinator::start(dir, data, 1, "");
    let seconds = coordinator.ready_after.as_secs_f64();
    let mib = bytes as f64 / f64::from(1 << 20);
    let rows = vec![
        (
            format!("{pairs} pairs, {mib:.0} MiB: until the coordinator listens"),
            format!("{seconds:.2} s, {:.0} MiB/s", mib / seconds),
        ),
        ("its processor time".into(), format!("{:.2} s", coordinator.cpu_seconds())),
        ("its peak memory".into(), format!("{:.0} MiB", coordinator.peak_memory())),
    ];
    coordinator.kill();
    rows
}
