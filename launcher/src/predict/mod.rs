//! `launcher plan`: memory, speed and cost of a run before anybody rents a GPU.
//!
//! Pure, but for reading a model's `config.json`. Constants are in [`machine`] alone, each with its source.
//!
//! - [`shapes`]: sizes of models. [`work`]: what a run computes.
//! - [`memory`], [`comm`], [`time`]: what that takes. [`report`]: how it is shown.

pub mod comm;
pub mod machine;
pub mod memory;
pub mod report;
pub mod shapes;
pub mod time;
pub mod work;

use clap::{Args, ValueEnum};
use dyad_proto::Fault;

use machine::{A100, H100, H200, Machine, Network, cpu};
use report::{Extent, Prediction};
use shapes::Shape;
use work::{Method, Pair, Reference, Setup};

/// What the GPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Gpu {
    /// NVIDIA H200 SXM, 141 GB.
    H200,
    /// NVIDIA H100 SXM, 80 GB.
    H100,
    /// NVIDIA A100 SXM, 80 GB.
    A100,
    /// No GPU: trainers on CPUs, in float32.
    Cpu,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodName {
    /// All weights.
    Full,
    /// Low-rank adapters on all linear layers.
    Lora,
}

/// What is computed again in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Checkpointing {
    /// Nothing.
    None,
    /// Every layer.
    Full,
}

/// Precision in which gradients travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReduceDtype {
    /// As they are kept.
    Float32,
    /// Half the bytes.
    Bfloat16,
}

/// A moment of eight bits, and its share of a block's float32 scale.
pub(crate) const EIGHT_BIT: f64 = 1.0 + 4.0 / 256.0;

/// Optimizer, by the names of `optim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OptimName {
    /// Moments of four bytes.
    Adamw,
    /// Moments of one byte.
    #[value(name = "adamw_8bit")]
    Adamw8bit,
}

/// Options of `launcher plan`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  launcher plan --gpus 64 --model 8B --zero 1 --pairs 60000 --epochs 2 --price-per-gpu-hour 3.50
  launcher plan --gpus 1 --model path/to/model --method lora --checkpointing full --json
  launcher plan --gpus 1 --gpu cpu --cpu-gflops 150 --model 135M --batch-size 8")]
pub struct PlanOptions {
    /// GPUs in all; trainers in all with --gpu cpu.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub gpus: u32,
    /// 135M, 0.5B, 1B, 3B, 8B, 14B, 70B, or a model folder.
    #[arg(long, value_name = "SIZE|FOLDER")]
    pub model: String,
    /// GPUs of a node; fewer where --gpus is smaller.
    #[arg(long, default_value_t = 8, value_name = "G", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub gpus_per_node: u32,
    /// What the GPU is.
    #[arg(long, value_enum, default_value_t = Gpu::H200)]
    pub gpu: Gpu,
    /// With --gpu cpu: GFLOP/s of large float32 matrix products per trainer; `launcher --profile` measures them.
    #[arg(long, value_name = "X", value_parser = positive)]
    pub cpu_gflops: Option<f64>,
    /// What joins the nodes.
    #[arg(long, value_enum, default_value_t = Network::Ndr)]
    pub network: Network,
    /// What is trained.
    #[arg(long, value_enum, default_value_t = MethodName::Full)]
    pub method: MethodName,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 16, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub lora_r: u32,
    /// ZeRO stage: 1 shards the optimizer's states, 2 gradients as well, 3 weights as well.
    #[arg(long, default_value_t = 0, value_name = "STAGE", value_parser = clap::value_parser!(u8).range(0..=3))]
    pub zero: u8,
    /// Moments of 32 or 8 bits.
    #[arg(long, value_enum, default_value_t = OptimName::Adamw)]
    pub optim: OptimName,
    /// Master weights and moments live in host memory; the time that takes is not predicted.
    #[arg(long)]
    pub offload_optimizer: bool,
    /// Precision in which gradients travel; they are kept in float32.
    #[arg(long, value_enum, default_value_t = ReduceDtype::Float32)]
    pub reduce_dtype: ReduceDtype,
    /// Mean tokens of a prompt.
    #[arg(long, default_value_t = 150, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    pub prompt_tokens: u32,
    /// Mean tokens of one output.
    #[arg(long, default_value_t = 330, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub output_tokens: u32,
    /// Compute the prompt once per output instead of once per pair.
    #[arg(long)]
    pub no_prefix_sharing: bool,
    /// Pairs per optimizer step, over all GPUs.
    #[arg(long, default_value_t = 256, value_name = "PAIRS", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_size: u32,
    /// Most tokens computed at once per GPU.
    #[arg(long, default_value_t = 16384, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub micro_batch_tokens: u32,
    /// What is computed again in the backward pass.
    #[arg(long, value_enum, default_value_t = Checkpointing::None)]
    pub checkpointing: Checkpointing,
    /// How DPO comes by the reference model's log-probabilities.
    #[arg(long, value_enum, default_value_t = Reference::Compute)]
    pub reference: Reference,
    /// Pairs of the data set: also predicts the whole run.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub pairs: Option<u32>,
    /// Passes over the data set.
    #[arg(long, default_value_t = 1, value_name = "E", value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: u32,
    /// What a GPU costs per hour, in any currency; needs --pairs.
    #[arg(long, value_name = "X", value_parser = positive, requires = "pairs")]
    pub price_per_gpu_hour: Option<f64>,
    /// Print JSON: bytes, seconds, shares.
    #[arg(long)]
    pub json: bool,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("expected a number above 0".into()),
    }
}

/// Text for standard output.
pub fn describe(options: &PlanOptions) -> Result<String, Fault> {
    let extent = Extent {
        pairs: options.pairs.map(f64::from),
        epochs: options.epochs.into(),
        price: options.price_per_gpu_hour,
    };
    let prediction = Prediction::of(setup(options)?, extent);
    Ok(if options.json { format!("{:#}\n", prediction.json()) } else { prediction.table() })
}

fn setup(options: &PlanOptions) -> Result<Setup, Fault> {
    let gpus_per_node = options.gpus_per_node.min(options.gpus);
    if !options.gpus.is_multiple_of(gpus_per_node) {
        let gpus = options.gpus;
        return Err(Fault::input(format!("--gpus {gpus} is no multiple of --gpus-per-node {gpus_per_node}"))
            .hint("all nodes of a plan are alike"));
    }
    let machine = machine(options)?;
    let output = f64::from(options.output_tokens);
    Ok(Setup {
        shape: Shape::find(&options.model)?,
        machine,
        gpus: options.gpus.into(),
        gpus_per_node: gpus_per_node.into(),
        network: options.network,
        pair: Pair { prompt: options.prompt_tokens.into(), chosen: output, rejected: output },
        sharing: !options.no_prefix_sharing,
        batch: options.batch_size.into(),
        micro_batch_tokens: options.micro_batch_tokens.into(),
        method: match options.method {
            MethodName::Full => Method::Full,
            MethodName::Lora => Method::Lora(options.lora_r.into()),
        },
        zero: options.zero,
        gradient_bytes: 4.0,
        travelling_bytes: if options.reduce_dtype == ReduceDtype::Bfloat16 { 2.0 } else { 4.0 },
        moment_bytes: if options.optim == OptimName::Adamw8bit { 2.0 * EIGHT_BIT } else { 8.0 },
        offload_optimizer: options.offload_optimizer,
        checkpointing: options.checkpointing == Checkpointing::Full,
        reference: options.reference,
    })
}

fn machine(options: &PlanOptions) -> Result<Machine, Fault> {
    match (options.gpu, options.cpu_gflops) {
        (Gpu::Cpu, Some(gflops)) => Ok(cpu(gflops * 1e9)),
        (Gpu::Cpu, None) => Err(Fault::input("--gpu cpu needs --cpu-gflops")
            .hint("run `launcher --profile` once: its table states the rate of one large matrix product")),
        (_, Some(_)) => Err(Fault::input("--cpu-gflops is for --gpu cpu").hint("leave one of them out")),
        (Gpu::H200, None) => Ok(H200),
        (Gpu::H100, None) => Ok(H100),
        (Gpu::A100, None) => Ok(A100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: PlanOptions,
    }

    fn described(line: &str) -> Result<String, Fault> {
        let line = <Line as clap::Parser>::try_parse_from(format!("plan {line}").split(' ')).unwrap();
        describe(&line.options)
    }

    #[test]
    fn what_cannot_be_planned_is_refused_with_a_hint() {
        for (line, message, hint) in [
            ("--gpus 12 --model 8B", "--gpus 12 is no multiple of --gpus-per-node 8", "alike"),
            ("--gpus 1 --model 8B --gpu cpu", "--gpu cpu needs --cpu-gflops", "--profile"),
            ("--gpus 1 --model 8B --cpu-gflops 150", "--cpu-gflops is for --gpu cpu", "leave"),
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
        let large = verdict("--gpus 8 --model 14b --zero 1 --json");
        assert_eq!(large, (8.into(), false.into(), "--zero 3".into()));
        let plain = described("--gpus 8 --model 8b --zero 1 --json").unwrap();
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
        ] {
            let changed = described(&format!("--gpus 8 --model 8b --zero 1 --json {option}")).unwrap();
            assert_ne!(changed, plain, "{option} changes nothing");
        }
    }

    /// Full fine-tuning on H200 nodes of eight over NDR, as the command line has it by default.
    pub(super) fn setup(model: &str, gpus: f64) -> Setup {
        Setup {
            shape: Shape::find(model).unwrap(),
            machine: H200,
            gpus,
            gpus_per_node: gpus.min(8.0),
            network: Network::Ndr,
            pair: Pair { prompt: 150.0, chosen: 330.0, rejected: 330.0 },
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
            reference: Reference::Compute,
        }
    }
}
