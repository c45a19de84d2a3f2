//! `launcher plan`: predicts memory, speed and cost of a run without running it.
//!
//! A plan uses the keys and defaults of a run's configuration. Constants of the hardware are in [`machine`], each with its source.
//!
//! - [`options`]: the command line. [`shapes`]: sizes of models. [`work`]: the computation of a run.
//! - [`memory`], [`comm`], [`time`]: its memory, communication and time. [`report`]: table and JSON.

pub mod comm;
pub mod machine;
pub mod memory;
pub mod options;
pub mod report;
pub mod shapes;
pub mod time;
pub mod work;

use dyad_proto::pairs::wanted::Wanted;
use dyad_proto::run_config::{ActivationCheckpointing, Optim, ReduceDtype, ReferenceLogps};
use dyad_proto::{Fault, RunConfig};
use dyad_sources::{open, places};

use crate::agent::machine::Hello;
use crate::process::trainer_check;
use crate::show::console;
use dyad_families::shape::{PairTokens, Shape};
use machine::{A100, DeviceSpec, GIB, H100, H200, Interconnect, cpu};
use memory::{as_flags, fits, gib, memory, remedy};
use options::{GpuModel, PlanOptions};
use report::{Extent, Prediction};
use work::{Method, ReferenceSource, Setup};

/// Bytes of an 8-bit moment, with its share of the float32 scale of a block of 256.
pub(crate) const EIGHT_BIT: f64 = 1.0 + 4.0 / 256.0;

/// Assumed tokens of a prompt and of each answer if the data is unknown.
pub(crate) const USUAL_PAIR: PairTokens = PairTokens { prompt: 150.0, chosen: 330.0, rejected: 330.0 };

/// Result of planning.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Table or JSON for standard output.
    pub text: String,
    /// An error if the run does not fit, with a hint on what would make it fit.
    pub verdict: Result<(), Fault>,
}

/// Predicts a run; fails if the options or the model are invalid.
pub fn plan(options: &PlanOptions) -> Result<Plan, Fault> {
    let config = options.run()?;
    let (here, gpus) = (Hello::of_this_machine(), options.gpus);
    let gpus = match gpus {
        Some(gpus) => gpus,
        None if options.gpu == GpuModel::Cpu => 1,
        None if here.gpus > 0 => here.gpus,
        None => {
            return Err(Fault::input("this machine has no GPU to plan for").hint(
                "give --gpus N, and --gpu h200, h100 or a100; or --gpu cpu --cpu-gflops X for trainers on CPUs",
            ));
        }
    };
    let known = look_at(options, &config)?;
    let pairs = options.pairs.map(f64::from).or(known.pairs);
    if options.price_per_gpu_hour.is_some() && pairs.is_none() {
        return Err(Fault::input("--price-per-gpu-hour needs the number of pairs")
            .hint("give --pairs N, or --config with a training_file that is here"));
    }
    let extent = match config.max_steps {
        Some(steps) => Extent {
            pairs: Some(steps as f64 * f64::from(config.batch_size)),
            epochs: 1.0,
            price: options.price_per_gpu_hour,
        },
        None => Extent { pairs, epochs: config.n_epochs.into(), price: options.price_per_gpu_hour },
    };
    let machine = machine(options, &here)?;
    let place =
        Hardware { machine, gpus, gpus_per_node: gpus_per_node(options, gpus)?, network: options.network };
    let pair = options.pair(known.pair.unwrap_or(USUAL_PAIR));
    let setup = chosen(setup(&config, &known.shape, &place, pair), &config);
    let verdict = verdict(&setup);
    let prediction = Prediction::of(setup, extent);
    let text = if options.json { format!("{:#}\n", prediction.json()) } else { prediction.table() };
    Ok(Plan { text, verdict })
}

/// Hardware of a run.
#[derive(Clone, Copy, Debug)]
pub struct Hardware {
    /// One GPU, or one CPU trainer.
    pub machine: DeviceSpec,
    /// Total number of GPUs or CPU trainers.
    pub gpus: u32,
    /// GPUs or CPU trainers per node.
    pub gpus_per_node: u32,
    /// Network between nodes.
    pub network: Interconnect,
}

/// Model and data, as far as this machine has them.
struct KnownModel {
    shape: Shape,
    pairs: Option<f64>,
    pair: Option<PairTokens>,
}

/// Reads model and data with the trainer's own code; fails if the model cannot be trained. Without the data file it returns no lengths.
fn look_at(options: &PlanOptions, config: &RunConfig) -> Result<KnownModel, Fault> {
    let model = match (&options.model, config.model.is_empty()) {
        (Some(model), _) => model,
        (None, false) => &config.model,
        (None, true) => config.from_checkpoint.as_ref().unwrap_or(&config.model),
    };
    let file = &config.training_file;
    if options.config.is_none() {
        return Ok(KnownModel { shape: shapes::find(model)?, pairs: None, pair: None });
    }
    if !places::are_here(file) {
        console::warn(&format!(
            "training_file {file} is not here: its pairs are not counted, and their lengths are assumed"
        ));
        return Ok(KnownModel { shape: shapes::find(model)?, pairs: None, pair: None });
    }
    let pairs = Some(open::pairs("training_file", file, Wanted::of(config))?.len() as f64);
    if shapes::is_size(model) {
        return Ok(KnownModel { shape: shapes::find(model)?, pairs, pair: None });
    }
    let report = trainer_check::run(config)?;
    let mean = report.pairs.filter(|looked| looked.pairs > looked.dropped);
    let pair = mean.map(|looked| PairTokens {
        prompt: looked.prompt,
        chosen: looked.chosen,
        rejected: looked.rejected,
    });
    Ok(KnownModel { shape: Shape::of(model, &report.model), pairs, pair })
}

/// Whether `modules_to_save` names this module.
fn saves(config: &RunConfig, module: &str) -> bool {
    let mut names = config.modules_to_save.iter().flatten();
    names.any(|name| name.rsplit('.').next() == Some(module))
}

/// The setup of a configuration on the given hardware.
#[must_use]
pub fn setup(config: &RunConfig, shape: &Shape, place: &Hardware, pair: PairTokens) -> Setup {
    let objective = config.objective();
    let one_output = !objective.scores_both_outputs();
    Setup {
        shape: shape.clone(),
        machine: place.machine,
        gpus: place.gpus.into(),
        gpus_per_node: place.gpus_per_node.into(),
        network: place.network,
        pair: if one_output { PairTokens { rejected: 0.0, ..pair } } else { pair },
        // A single sequence has no prompt to compute twice.
        sharing: config.prefix_sharing || one_output,
        batch: config.batch_size.into(),
        micro_batch_tokens: config.micro_batch_tokens.into(),
        method: if config.lora { Method::Lora(config.lora_r().into()) } else { Method::Full },
        zero: config.zero_stage,
        gradient_bytes: 4.0,
        travelling_bytes: if config.reduce_dtype == ReduceDtype::Bfloat16 { 2.0 } else { 4.0 },
        moment_bytes: if config.optim == Optim::Adamw8bit { 2.0 * EIGHT_BIT } else { 8.0 },
        offload_optimizer: config.offload_optimizer,
        offload_reference: config.offload_reference,
        moves_reference: config.sync_ref_model,
        saves_embedding: config.lora && saves(config, "embed_tokens"),
        saves_head: config.lora && saves(config, "lm_head"),
        checkpointing: config.activation_checkpointing != ActivationCheckpointing::None,
        reference: match config.reference_logps {
            _ if !objective.needs_reference() => ReferenceSource::None,
            ReferenceLogps::Compute => ReferenceSource::Compute,
            ReferenceLogps::Cache => ReferenceSource::Cache,
            ReferenceLogps::Precompute => ReferenceSource::Precompute,
        },
    }
}

/// Resolves `activation_checkpointing = auto` as a run does: checkpointing only if the run does not fit without it.
fn chosen(setup: Setup, config: &RunConfig) -> Setup {
    let kept = Setup { checkpointing: false, ..setup.clone() };
    if config.activation_checkpointing == ActivationCheckpointing::Auto && fits(&kept) { kept } else { setup }
}

fn verdict(setup: &Setup) -> Result<(), Fault> {
    if fits(setup) {
        return Ok(());
    }
    let needs = gib(memory(setup).total());
    let message = format!("the run does not fit: it needs {needs} of each {}", setup.machine.name);
    Err(Fault::failed(message).hint(match remedy(setup) {
        Some(changes) => format!("it would with {}", as_flags(&changes)),
        None => "take more or larger GPUs, or a smaller model".into(),
    }))
}

fn gpus_per_node(options: &PlanOptions, gpus: u32) -> Result<u32, Fault> {
    let gpus_per_node = options.gpus_per_node.min(gpus);
    match gpus.is_multiple_of(gpus_per_node) {
        true => Ok(gpus_per_node),
        false => {
            Err(Fault::input(format!("--gpus {gpus} is no multiple of --gpus-per-node {gpus_per_node}"))
                .hint("all nodes of a plan are alike"))
        }
    }
}

fn machine(options: &PlanOptions, here: &Hello) -> Result<DeviceSpec, Fault> {
    let machine = match (options.gpu, options.cpu_gflops) {
        (GpuModel::Cpu, Some(gflops)) => cpu(gflops * 1e9),
        (GpuModel::Cpu, None) => {
            return Err(Fault::input("--gpu cpu needs --cpu-gflops").hint(
                "run `launcher --profile` once: its table states the rate of one large matrix product",
            ));
        }
        (_, Some(_)) => {
            return Err(Fault::input("--cpu-gflops is for --gpu cpu").hint("leave one of them out"));
        }
        (GpuModel::H200, None) => H200,
        (GpuModel::H100, None) => H100,
        (GpuModel::A100, None) => A100,
    };
    // Without --gpus the plan is for this machine's GPUs: use their memory.
    let seen =
        here.gpu_memory.iter().min().filter(|_| options.gpus.is_none() && options.gpu != GpuModel::Cpu);
    let given = options.gpu_memory.map(|gib| gib * GIB);
    let memory = given.or(seen.map(|bytes| *bytes as f64)).or(machine.memory);
    Ok(DeviceSpec { memory, ..machine })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: PlanOptions,
    }

    fn planned(line: &str) -> Result<Plan, Fault> {
        let line = <Line as clap::Parser>::try_parse_from(format!("plan {line}").split(' ')).unwrap();
        plan(&line.options)
    }

    fn described(line: &str) -> Result<String, Fault> {
        planned(line).map(|plan| plan.text)
    }

    #[test]
    fn invalid_options_fail_with_a_hint() {
        for (line, message, hint) in [
            ("--gpus 12 --model 8B", "--gpus 12 is no multiple of --gpus-per-node 8", "alike"),
            ("--gpus 1 --model 8B --gpu cpu", "--gpu cpu needs --cpu-gflops", "--profile"),
            ("--gpus 1 --model 8B --cpu-gflops 150", "--cpu-gflops is for --gpu cpu", "leave"),
            (
                "--gpus 8 --model 8B --price-per-gpu-hour 3",
                "--price-per-gpu-hour needs the number of pairs",
                "--pairs",
            ),
        ] {
            let fault = described(line).unwrap_err();
            assert_eq!((fault.message.as_str(), fault.code.exit_status()), (message, 2));
            assert!(fault.hint.contains(hint), "{}", fault.hint);
        }
    }

    #[test]
    fn options_reach_the_prediction() {
        let verdict = |line: &str| {
            let json: serde_json::Value = serde_json::from_str(&described(line).unwrap()).unwrap();
            (json["gpus"].clone(), json["fits"].clone(), json["fits_with"].clone())
        };
        let large = verdict(
            "--gpus 8 --model 14b --zero 1 --batch-size 256 --micro-batch-tokens 16384 --checkpointing none --json",
        );
        assert_eq!(large, (8.into(), false.into(), "--set zero_stage=3".into()));
        let plain = described("--gpus 8 --model 8b --zero 1 --batch-size 256 --json").unwrap();
        for option in [
            "--network 10gbe --gpus-per-node 4",
            "--gpu a100",
            "--method lora",
            "--checkpointing full",
            "--optim adamw_8bit",
            "--offload-optimizer",
            "--reference precompute",
            "--reduce-dtype bfloat16",
            "--no-prefix-sharing",
            "--prompt-tokens 600",
            "--batch-size 64",
            "--micro-batch-tokens 2048",
            "--gpu-memory 40",
            "--training-method sft",
            "--set optim=adamw_8bit",
        ] {
            let batch = if option.contains("batch-size") { "" } else { "--batch-size 256 " };
            let changed = described(&format!("--gpus 8 --model 8b --zero 1 {batch}--json {option}")).unwrap();
            assert_ne!(changed, plain, "{option} changes nothing");
        }
    }

    /// A run that does not fit is an error, but its table is printed all the same.
    #[test]
    fn a_run_that_does_not_fit_says_what_would_make_it_fit() {
        let small = planned("--gpus 1 --model 8B").unwrap();
        assert!(small.text.contains("DOES NOT FIT"), "{}", small.text);
        let fault = small.verdict.unwrap_err();
        assert!(
            fault.message.starts_with("the run does not fit: it needs ") && fault.hint.contains("--set ")
        );
        assert_eq!(fault.code.exit_status(), 1);
        planned("--gpus 1 --model 8B --method lora").unwrap().verdict.unwrap();
    }

    #[test]
    fn a_plan_has_the_keys_and_defaults_of_a_run() {
        let line = |line: &str| {
            <Line as clap::Parser>::try_parse_from(format!("plan --model 8B {line}").split_whitespace())
                .unwrap()
        };
        let config = |flags: &str| line(flags).options.run().unwrap();
        let usual = RunConfig::default();
        let found = config("");
        assert_eq!(
            (found.batch_size, found.micro_batch_tokens, found.lora_r(), found.activation_checkpointing),
            (usual.batch_size, usual.micro_batch_tokens, usual.lora_r(), usual.activation_checkpointing)
        );
        let found =
            config("--zero-stage 2 --lora --lora-r 8 --optim adamw_8bit --n-epochs 3 --set dtype=float32");
        assert_eq!((found.zero_stage, found.lora, found.lora_r, found.n_epochs), (2, true, Some(8), 3));
        let fault = line("--zero-stage 7").options.run().unwrap_err();
        assert!(fault.message.contains("zero_stage"), "{fault}");
    }

    /// Full fine-tuning on H200 nodes of eight over NDR.
    pub(super) fn setup(model: &str, gpus: f64) -> Setup {
        Setup {
            shape: shapes::find(model).unwrap(),
            machine: H200,
            gpus,
            gpus_per_node: gpus.min(8.0),
            network: Interconnect::Ndr,
            pair: PairTokens { prompt: 150.0, chosen: 330.0, rejected: 330.0 },
            sharing: true,
            batch: 256.0,
            micro_batch_tokens: 16384.0,
            method: Method::Full,
            zero: 0,
            gradient_bytes: 4.0,
            travelling_bytes: 4.0,
            checkpointing: false,
            moment_bytes: 8.0,
            offload_optimizer: false,
            offload_reference: false,
            moves_reference: false,
            saves_embedding: false,
            saves_head: false,
            reference: ReferenceSource::Compute,
        }
    }
}
