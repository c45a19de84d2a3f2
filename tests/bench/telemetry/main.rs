//! `make bench-telemetry`: the cost of traces and metrics for runs of two models: a very small one, where they cost most, and one whose
//! steps take a tenth of a second. `bench-telemetry large` measures only the second one.
//!
//! Each round trains the same steps with everything off, with traces at the default sampling and metrics served, and with every
//! step traced. The order changes from round to round. A ratio is taken within its round, so that other load on the machine
//! affects both sides. Printed values are medians of the rounds.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark that cannot set itself up has failed, and prints its results"
)]

use dyad_tests::collector::Collector;
use dyad_tests::{Workspace, number, text};

const ROUNDS: usize = 7;
/// Steps left out at the start, because they touch memory for the first time.
const WARM: usize = 20;

/// A model and its number of steps.
struct Model {
    name: &'static str,
    hidden: &'static str,
    layers: &'static str,
    inner: &'static str,
    steps: usize,
}

const MODELS: [Model; 2] = [
    Model { name: "small", hidden: "64", layers: "4", inner: "176", steps: 400 },
    Model { name: "large", hidden: "256", layers: "8", inner: "704", steps: 80 },
];

const MODES: [(&str, Option<&str>); 3] =
    [("off", None), ("on, 1 step in 100", Some("100")), ("on, every step", Some("1"))];

/// Times of a run, in seconds.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Mean step.
    step: f64,
    /// Processor time of all processes.
    cpu: f64,
}

fn main() {
    let wanted = std::env::args().nth(1);
    for model in MODELS.iter().filter(|model| wanted.as_ref().is_none_or(|name| name == model.name)) {
        bench(model);
    }
}

fn bench(model: &Model) {
    let workspace = Workspace::with_model(64, &format!("max_steps = {}\n", model.steps));
    let sizes = ["--hidden-size", model.hidden, "--layers", model.layers, "--intermediate-size", model.inner];
    workspace.new_model("larger", &sizes);
    let collector = Collector::start();
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let mut costs = [Cost { step: 0.0, cpu: 0.0 }; MODES.len()];
        for place in 0..MODES.len() {
            let mode = (round + place) % MODES.len();
            costs[mode] = measure(&workspace, &collector, MODES[mode].1);
        }
        eprintln!("{}, round {}: {costs:?}", model.name, round + 1);
        rounds.push(costs);
    }
    println!(
        "{:20}{:>12}{:>12}{:>18}{:>18}",
        "traces", "ms/step", "x off", "x off, low-high", "processor x off"
    );
    for (mode, (name, _)) in MODES.iter().enumerate() {
        let step = median(rounds.iter().map(|costs| costs[mode].step));
        let ratios = || rounds.iter().map(|costs| costs[mode].step / costs[0].step);
        let cpu = median(rounds.iter().map(|costs| costs[mode].cpu / costs[0].cpu));
        let low = ratios().fold(f64::INFINITY, f64::min);
        let high = ratios().fold(0.0, f64::max);
        let spread = format!("{low:.3}-{high:.3}");
        println!("{name:20}{:>12.3}{:>12.4}{spread:>18}{cpu:>18.4}", step * 1e3, median(ratios()));
    }
    println!("{} spans arrived", collector.spans().len());
}

fn measure(workspace: &Workspace, collector: &Collector, every: Option<&str>) -> Cost {
    let mut launcher = workspace.launcher(2, &["--overwrite", "--set", "model=larger"]);
    if let Some(every) = every {
        launcher.args(["--trace-every", every, "--metrics-listen", "127.0.0.1:0"]);
        launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    }
    let before = children_cpu();
    let output = launcher.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let cpu = children_cpu() - before;
    let rows = workspace.rows("out/metrics.jsonl");
    let steps: Vec<f64> = rows.iter().skip(WARM).map(|row| number(row, "step_seconds")).collect();
    Cost { step: steps.iter().sum::<f64>() / steps.len() as f64, cpu }
}

/// Returns the processor time of all child processes that have ended, in seconds.
#[expect(unsafe_code, reason = "getrusage")]
fn children_cpu() -> f64 {
    // SAFETY: a zeroed rusage is a valid one, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
