//! Helpers of whole-run tests: a workspace folder with a small model and pairs, the release binaries, and their output.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a test that cannot set itself up has failed"
)]

pub mod apart;
pub mod clock;
pub mod cluster;
pub mod collector;
pub mod imports;
pub mod processes;
pub mod python;
pub mod refusal;
pub mod serving;
pub mod slurm;
pub mod terminal;
pub mod tools;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value, json};

/// One row of `metrics.jsonl`.
pub type Row = Map<String, Value>;

/// Returns a binary of the target folder that this test was built in.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.is_file(), "{} is missing; run `make build`", path.display());
    path
}

/// Root of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A temporary folder for runs.
#[derive(Debug)]
pub struct Workspace {
    dir: tempfile::TempDir,
}

impl Workspace {
    /// Creates an empty folder.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// Creates a folder with `pairs.jsonl`, a model in `model/`, and `run.toml` ([`BASE`] and the lines of `config`).
    pub fn with_model(pairs: usize, config: &str) -> Self {
        let workspace = Self::empty();
        workspace.write("pairs.jsonl", &pair_lines(pairs));
        workspace.new_model("model", &[]);
        workspace.write("run.toml", &format!("{BASE}{config}"));
        workspace
    }

    /// A path below the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Makes a small random model.
    pub fn new_model(&self, name: &str, extra: &[&str]) {
        let mut command = Command::new(binary("trainer"));
        command.current_dir(self.dir.path()).args(["new-model", "--out", name, "--texts", "pairs.jsonl"]);
        let sizes = [
            ("--vocab-size", "320"),
            ("--hidden-size", "32"),
            ("--layers", "2"),
            ("--intermediate-size", "64"),
        ];
        for (flag, value) in sizes.iter().filter(|(flag, _)| !extra.contains(flag)) {
            command.args([flag, value]);
        }
        let output = command.args(extra).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    }

    /// Returns the launcher's command for `run.toml`: on CPUs and without restarts unless `args` says otherwise.
    pub fn launcher(&self, nodes: usize, args: &[&str]) -> Command {
        let mut command = Command::new(binary("launcher"));
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command.args(["--nodes", &nodes.to_string(), "--config", "run.toml"]).args(args);
        if !args.contains(&"--gpus-per-node") {
            command.args(["--gpus-per-node", "0"]);
        }
        // Most tests check how a run ends; a restart would hide that.
        if !args.contains(&"--max-restarts") {
            command.args(["--max-restarts", "0"]);
        }
        processes::die_with_me(&mut command);
        command
    }

    /// Runs the launcher to its end.
    pub fn launch(&self, nodes: usize, args: &[&str]) -> Output {
        self.launcher(nodes, args).output().unwrap()
    }

    /// Trains into `output_dir` and returns the rows of its metrics.
    pub fn train(&self, nodes: usize, output_dir: &str, args: &[&str]) -> Vec<Row> {
        let target = format!("output_dir={output_dir}");
        let output = self.launch(nodes, &[&["--set", &target], args].concat());
        assert!(output.status.success(), "{}", text(&output));
        self.rows(&format!("{output_dir}/metrics.jsonl"))
    }

    /// Returns how many rows a run has written to `out/metrics.jsonl` so far.
    pub fn steps_so_far(&self) -> usize {
        let metrics = std::fs::read_to_string(self.path("out/metrics.jsonl")).unwrap_or_default();
        metrics.matches('\n').count()
    }

    /// Waits until a run into `out/` has done a step.
    pub fn wait_for_a_step(&self) {
        processes::wait_for("the first step", || (self.steps_so_far() > 0).then_some(()));
    }

    /// Rows of a JSON Lines file.
    pub fn rows(&self, name: &str) -> Vec<Row> {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Configuration that every run of the small model shares.
pub const BASE: &str = "model = \"model\"\ntraining_file = \"pairs.jsonl\"\noutput_dir = \"out\"\nbatch_size = 8\n\
learning_rate = 1e-2\nlr_scheduler_type = \"linear\"\ndtype = \"float32\"\n";

/// Returns pairs of different lengths, as JSON Lines.
pub fn pair_lines(count: usize) -> String {
    let mut lines = String::new();
    for index in 0..count {
        let prompt =
            format!("What comes after {index}?{}", " Please answer in a sentence.".repeat(index % 3));
        let good = format!("After {index} comes {}.{}", index + 1, " I hope that helps.".repeat(index % 4));
        let bad = format!("No idea about {index}{}", ", ask somebody else".repeat(index % 5));
        writeln!(lines, "{}", pair(&prompt, &good, &bad)).unwrap();
    }
    lines
}

/// Returns one pair with a single question.
pub fn pair(prompt: &str, good: &str, bad: &str) -> Value {
    let answer = |content: &str| json!([{ "role": "assistant", "content": content }]);
    json!({
        "input": { "messages": [{ "role": "user", "content": prompt }] },
        "preferred_output": answer(good),
        "non_preferred_output": answer(bad),
    })
}

/// Returns stdout followed by stderr.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Returns a metric of a row.
pub fn number(row: &Row, name: &str) -> f64 {
    row.get(name).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {name} in {row:?}"))
}

/// Fails unless every named metric of every row agrees within `tolerance`, relative to the larger of `a` and 1.
pub fn assert_same_curve(a: &[Row], b: &[Row], names: &[&str], tolerance: f64) {
    assert!(!a.is_empty() && a.len() == b.len(), "{} and {} rows", a.len(), b.len());
    for (x, y) in a.iter().zip(b) {
        for name in names {
            let (x, y) = (number(x, name), number(y, name));
            // Written so that NaN fails.
            let close = (x - y).abs() <= tolerance * x.abs().max(1.0);
            assert!(close, "{name}: {x} and {y}");
        }
    }
}

/// Metrics that describe the mathematics of a step, not its speed.
pub const CURVE: [&str; 10] = [
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
];
