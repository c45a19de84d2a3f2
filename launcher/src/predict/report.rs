//! The prediction as a table and as JSON.

use std::fmt::Write;

use dyad_proto::{counted, grouped, thousands};
use serde_json::{Map, Value, json};

use super::machine::USABLE;
use super::memory::{Memory, as_flags, fits, gib, memory, remedy};
use super::time::{RunTime, StepTime, run, usual_step};
use super::work::{Method, ReferenceSource, Setup};

/// Length and price of the run.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Pairs of the data set.
    pub pairs: Option<f64>,
    /// Passes over it.
    pub epochs: f64,
    /// Price of a GPU per hour.
    pub price: Option<f64>,
}

/// The complete prediction of a run.
#[derive(Clone, Debug)]
pub struct Prediction {
    setup: Setup,
    extent: Extent,
    memory: Memory,
    step: StepTime,
    run: Option<RunTime>,
}

impl Prediction {
    /// Predicts a run.
    #[must_use]
    pub fn of(setup: Setup, extent: Extent) -> Self {
        let (memory, step) = (memory(&setup), usual_step(&setup));
        let run = extent.pairs.map(|pairs| run(&setup, pairs, extent.epochs));
        Self { setup, extent, memory, step, run }
    }

    /// Pairs per second, over all GPUs.
    fn pairs_per_second(&self) -> f64 {
        self.setup.batch / self.step.total()
    }

    /// Tokens per second, over all GPUs; the prompt counts twice per pair and padding does not count.
    fn tokens_per_second(&self) -> f64 {
        self.pairs_per_second() * self.setup.pair.separate().tokens
    }

    fn utilisation(&self, flops_per_pair: f64) -> f64 {
        flops_per_pair * self.pairs_per_second() / (self.setup.gpus * self.setup.machine.peak)
    }

    fn hardware_mfu(&self) -> f64 {
        self.utilisation(self.setup.executed(self.setup.reference == ReferenceSource::Compute))
    }

    fn effective_mfu(&self) -> f64 {
        self.utilisation(self.setup.model_flops())
    }

    fn exposed_share(&self) -> f64 {
        self.step.exposed / self.step.total()
    }

    fn gpu_hours(&self) -> Option<f64> {
        self.run.map(|run| run.seconds / 3600.0 * self.setup.gpus)
    }

    fn cost(&self) -> Option<f64> {
        Some(self.gpu_hours()? * self.extent.price?)
    }

    /// The table for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let sections =
            [self.heading(), self.memory_table(), self.step_table(), self.rates(), self.run_table()];
        let mut out = sections.concat();
        out += "\nA prediction, not a measurement. Not validated:\n";
        for note in self.caveats() {
            let _ = writeln!(out, "  - {note}");
        }
        out
    }

    fn heading(&self) -> String {
        let (setup, shape) = (&self.setup, &self.setup.shape);
        let mut out = format!("prediction for {} on {} {}", shape.name, setup.gpus, setup.machine.name);
        if setup.nodes() > 1.0 {
            let network = clap::ValueEnum::to_possible_value(&setup.network);
            let network = network.map(|value| value.get_name().to_owned()).unwrap_or_default();
            let _ = write!(out, ", {} over {network}", counted(setup.nodes(), "node"));
        }
        let _ = writeln!(out, "\n\nparameters{:>28}", thousands(shape.parameters() as u64));
        if let Method::Lora(r) = setup.method {
            let trained = thousands(setup.trained() as u64);
            let _ = writeln!(out, "  trained, LoRA rank {r:<4}{trained:>14}");
        }
        out
    }

    /// What one rank computes on.
    fn unit(&self) -> &'static str {
        if self.setup.machine.gpu { "GPU" } else { "trainer" }
    }

    fn memory_table(&self) -> String {
        let mut out = format!("\nmemory per {}\n", self.unit());
        for (name, bytes) in self.memory.parts() {
            let _ = writeln!(out, "  {name:24}{:>12}", gib(bytes));
        }
        let _ = writeln!(out, "  {:24}{:>12}", "total", gib(self.memory.total()));
        let Some(has) = self.setup.machine.memory else {
            return out + "  how much there is depends on the machine\n";
        };
        let verdict = match (fits(&self.setup), remedy(&self.setup)) {
            (true, _) => "fits".to_owned(),
            (false, Some(keys)) => format!("DOES NOT FIT; it would with {}", as_flags(&keys)),
            (false, None) => "DOES NOT FIT, whatever the options; take more or larger GPUs".to_owned(),
        };
        let _ = writeln!(out, "  of {} usable: {verdict}", gib(USABLE * has));
        out
    }

    fn step_table(&self) -> String {
        let setup = &self.setup;
        let mut out = format!(
            "\nstep of {}; per {} at most {} of {}, {}\n",
            counted(setup.batch, "pair"),
            self.unit(),
            counted(setup.micro_batches(), "micro-batch"),
            counted(setup.pairs_per_micro_batch(), "pair"),
            grouped((setup.pairs_per_micro_batch() * setup.tokens()) as u64, "token")
        );
        let total = self.step.total();
        for (name, seconds) in self.step.parts() {
            let _ = writeln!(out, "  {name:24}{:>12}{:>6.1} %", time(seconds), 100.0 * seconds / total);
        }
        let _ = writeln!(out, "  {:24}{:>12}", "total", time(total));
        let _ = writeln!(out, "  {:24}{:>12}", "all communication", time(self.step.communication));
        out
    }

    fn rates(&self) -> String {
        let (gpus, pairs, tokens) = (self.setup.gpus, self.pairs_per_second(), self.tokens_per_second());
        let mut out =
            format!("\n{:26}{:>12}{:>14}\n", "throughput", format!("per {}", self.unit()), "in all");
        let _ = writeln!(out, "  {:24}{:>12.2}{pairs:>14.2}", "pairs/s", pairs / gpus);
        let bound = self.setup.batch / (self.step.total() - self.step.gaps);
        let _ = writeln!(
            out,
            "  {:24}{:>12.2}{bound:>14.2}   nothing lost to throttling or launches",
            "pairs/s, upper bound",
            bound / gpus
        );
        let _ = writeln!(
            out,
            "  {:24}{:>12}{:>14}   prompt counted with both outputs",
            "tokens/s",
            thousands((tokens / gpus) as u64),
            thousands(tokens as u64)
        );
        out + &self.shares()
    }

    fn shares(&self) -> String {
        let mut out = String::new();
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let rows = [
            ("hardware MFU", self.hardware_mfu(), "FLOPs executed: reference, recomputation and all"),
            (
                "effective MFU",
                self.effective_mfu(),
                "FLOPs of a step without sharing, reference, recomputation",
            ),
            ("exposed communication", self.exposed_share(), "of the step"),
        ];
        for (name, share, what) in rows {
            let _ = writeln!(out, "  {name:24}{:>12}{:14}   {what}", percent(share), "");
        }
        out
    }

    fn run_table(&self) -> String {
        let (Some(run), Some(gpu_hours), Some(pairs)) = (self.run, self.gpu_hours(), self.extent.pairs)
        else {
            return String::new();
        };
        let mut out =
            format!("\nrun of {}, {}\n", grouped(pairs as u64, "pair"), counted(self.extent.epochs, "epoch"));
        let _ = writeln!(out, "  {:24}{:>12}", "steps", thousands(run.steps as u64));
        let _ = writeln!(out, "  {:24}{:>12.2}", "hours", run.seconds / 3600.0);
        let _ = writeln!(out, "  {:24}{gpu_hours:>12.2}", "GPU hours");
        if let Some(cost) = self.cost() {
            let _ = writeln!(out, "  {:24}{cost:>12.2}", "cost");
        }
        out
    }

    /// Assumptions of the prediction that are not validated.
    fn caveats(&self) -> Vec<&'static str> {
        let setup = &self.setup;
        let sharded = setup.zero > 0
            || (!fits(setup)
                && remedy(setup).is_some_and(|keys| keys.iter().any(|(key, _)| *key == "zero_stage")));
        let mut notes = if setup.machine.gpu {
            vec!["measured on one GPU alone, with an 8B model on an H200 (docs/plan.md)"]
        } else {
            vec!["CPUs beyond one workload: 58M parameters, float32, two cores, predicted a fifth too fast"]
        };
        notes.push("pairs are all as long as the mean one: padding, stragglers and uneven ranks cost more");
        notes.push("loading, validation and checkpoints are left out");
        if setup.batch < setup.gpus {
            notes.push("there are fewer pairs in a step than GPUs: some compute nothing");
        }
        if sharded {
            notes.push("zero_stage has been run over Gloo on CPUs, not over NCCL");
        }
        if setup.machine.gpu && setup.rounds_gradients() {
            notes.push("reduce_dtype has been run over Gloo on CPUs, not over NCCL");
        }
        if setup.nodes() > 1.0 {
            notes.push(
                "several nodes are modelled from published bandwidths; no cluster of GPUs has been measured",
            );
        }
        notes
    }

    /// The prediction as JSON: bytes, seconds, shares.
    #[must_use]
    pub fn json(&self) -> Value {
        let object = |parts: &[(&'static str, f64)]| -> Map<String, Value> {
            parts
                .iter()
                .map(|(name, value)| (name.replace(", ", "_").replace(' ', "_"), json!(value)))
                .collect()
        };
        json!({
            "model": self.setup.shape.name,
            "gpus": self.setup.gpus as u64,
            "gpu": self.setup.machine.name,
            "parameters": self.setup.shape.parameters() as u64,
            "trained_parameters": self.setup.trained() as u64,
            "memory_bytes": object(&self.memory.parts()),
            "memory_bytes_total": self.memory.total(),
            "memory_bytes_usable": self.setup.machine.memory.map(|bytes| USABLE * bytes),
            "fits": self.setup.machine.memory.map(|_| fits(&self.setup)),
            "fits_with": if fits(&self.setup) { None } else { remedy(&self.setup).map(|keys| as_flags(&keys)) },
            "step_seconds": object(&self.step.parts()),
            "step_seconds_total": self.step.total(),
            "communication_seconds": self.step.communication,
            "exposed_communication_share": self.exposed_share(),
            "pairs_per_second": self.pairs_per_second(),
            "tokens_per_second": self.tokens_per_second(),
            "hardware_mfu": self.hardware_mfu(),
            "effective_mfu": self.effective_mfu(),
            "steps": self.run.map(|run| run.steps as u64),
            "hours": self.run.map(|run| run.seconds / 3600.0),
            "gpu_hours": self.gpu_hours(),
            "cost": self.cost(),
            "not_validated": self.caveats(),
        })
    }
}

/// Seconds as text, such as `1.23 s` or `45.6 ms`.
fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", 1e3 * seconds) } else { format!("{seconds:.2} s") }
}

#[cfg(test)]
mod tests {
    use super::super::tests::setup;
    use super::*;

    const RUN: Extent = Extent { pairs: Some(60_000.0), epochs: 2.0, price: Some(3.0) };

    #[test]
    fn the_table_lists_what_is_not_validated() {
        let mut setup = setup("8B", 64.0);
        let table = Prediction::of(setup.clone(), RUN).table();
        for part in [
            "prediction for 8B on 64 h200, 8 nodes over ndr",
            "8,029,995,008",
            "DOES NOT FIT; it would with --set zero_stage=1",
            "A prediction, not a measurement",
            "measured on one GPU alone",
            "run of 60,000 pairs, 2 epochs",
            "steps                            470",
        ] {
            assert!(table.contains(part), "{part} is not in\n{table}");
        }
        setup.zero = 1;
        let table = Prediction::of(setup, RUN).table();
        assert!(
            table.contains("zero_stage has been run over Gloo on CPUs") && table.contains("usable: fits"),
            "{table}"
        );
    }

    #[test]
    fn shares_stay_within_reason() {
        for (gpus, network) in [(1.0, "ndr"), (8.0, "ndr"), (64.0, "ndr"), (64.0, "10gbe")] {
            let mut setup = setup("1B", gpus);
            setup.network = clap::ValueEnum::from_str(network, true).unwrap();
            let prediction = Prediction::of(setup, RUN);
            let (mfu, exposed) = (prediction.hardware_mfu(), prediction.exposed_share());
            assert!(
                mfu > 0.0 && mfu < 0.8 && (0.0..1.0).contains(&exposed),
                "{gpus} {network}: {mfu} {exposed}"
            );
            assert_eq!(exposed == 0.0, gpus == 1.0);
            let json = prediction.json();
            let cost = json["cost"].as_f64().unwrap();
            assert!((cost / (json["hours"].as_f64().unwrap() * gpus * 3.0) - 1.0).abs() < 1e-9);
        }
    }
}
