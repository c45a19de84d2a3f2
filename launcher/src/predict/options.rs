//! The command line of `launcher plan`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dyad_proto::{Fault, RunConfig};

use super::machine::Interconnect;
use dyad_families::shape::PairTokens;

/// Type of GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GpuModel {
    /// NVIDIA H200 SXM, 141 GB.
    H200,
    /// NVIDIA H100 SXM, 80 GB.
    H100,
    /// NVIDIA A100 SXM, 80 GB.
    A100,
    /// No GPU: trainers on CPUs, in float32.
    Cpu,
}

/// Options of `launcher plan`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  launcher plan --config run.toml --gpus 8
  launcher plan --config run.toml --gpus 1 --gpu a100 --gpu-memory 40 --set lora=true
  launcher plan --gpus 64 --model 8B --zero-stage 1 --batch-size 256 --pairs 60000 --n-epochs 2 --price-per-gpu-hour 3.50
  launcher plan --gpus 1 --model Qwen/Qwen2.5-7B-Instruct --lora --json
  launcher plan --gpu cpu --cpu-gflops 150 --model 135M

Exit status:
  0  the run fits
  1  it does not fit; the error says what would make it fit
  2  invalid input, or a model that cannot be trained")]
pub struct PlanOptions {
    /// Configuration of the planned run. Options below that name keys of the configuration override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override one key of the configuration, or of its defaults; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Model folder, hub id (its config.json is fetched), or a size such as 8B: 135M, 0.5B, 1B, 3B, 8B, 14B and 70B are published
    /// models, others are scaled from those [default: the configuration's]
    #[arg(long, value_name = "MODEL|SIZE", required_unless_present = "config")]
    pub model: Option<String>,
    /// Total number of GPUs; of trainers with --gpu cpu [default: the GPUs of this machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub gpus: Option<u32>,
    /// GPUs of a node; at most --gpus
    #[arg(long, default_value_t = 8, value_name = "G", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub gpus_per_node: u32,
    /// Type of GPU
    #[arg(long, value_enum, default_value_t = GpuModel::H200)]
    pub gpu: GpuModel,
    /// Memory of each GPU in GiB [default: that of this machine's GPUs, else the data sheet's]
    #[arg(long, value_name = "GIB", value_parser = positive)]
    pub gpu_memory: Option<f64>,
    /// With --gpu cpu: GFLOP/s of large float32 matrix products per trainer; `launcher --profile` measures them
    #[arg(long, value_name = "X", value_parser = positive)]
    pub cpu_gflops: Option<f64>,
    /// Network between nodes
    #[arg(long, value_enum, default_value_t = Interconnect::Ndr)]
    pub network: Interconnect,
    /// Mean tokens of a prompt [default: of the first pairs of training_file, else 150]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    pub prompt_tokens: Option<u32>,
    /// Mean tokens of one answer [default: of the first pairs of training_file, else 330]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub output_tokens: Option<u32>,
    /// Pairs of the data set, for hours and cost of the whole run [default: those of training_file]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub pairs: Option<u32>,
    /// Price of a GPU per hour, in any currency
    #[arg(long, value_name = "X", value_parser = positive)]
    pub price_per_gpu_hour: Option<f64>,
    /// Print JSON: bytes, seconds, shares
    #[arg(long)]
    pub json: bool,
    /// Keys of the configuration.
    #[command(flatten)]
    pub keys: KeyOptions,
}

/// Configuration keys that plans often vary.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Keys of the configuration (docs/config.md)")]
pub struct KeyOptions {
    /// dpo or sft
    #[arg(long, value_name = "METHOD")]
    pub training_method: Option<String>,
    /// Train adapters instead of all weights
    #[arg(long)]
    pub lora: bool,
    /// `lora` is --lora, `full` all weights
    #[arg(long, value_name = "full|lora", value_parser = ["full", "lora"], conflicts_with = "lora")]
    pub method: Option<String>,
    /// Rank of the adapters
    #[arg(long, value_name = "R")]
    pub lora_r: Option<String>,
    /// 1 shards the optimizer's states, 2 gradients as well, 3 weights as well
    #[arg(long, value_name = "STAGE", alias = "zero")]
    pub zero_stage: Option<String>,
    /// adamw or `adamw_8bit`
    #[arg(long, value_name = "OPTIM")]
    pub optim: Option<String>,
    /// Keep master weights and moments in host memory; the time of the transfers is not predicted
    #[arg(long)]
    pub offload_optimizer: bool,
    /// Precision in which gradients are sent: float32 or bfloat16
    #[arg(long, value_name = "DTYPE")]
    pub reduce_dtype: Option<String>,
    /// Compute the prompt once per output instead of once per pair
    #[arg(long)]
    pub no_prefix_sharing: bool,
    /// Pairs per optimizer step, over all GPUs
    #[arg(long, value_name = "PAIRS")]
    pub batch_size: Option<String>,
    /// Maximum number of tokens computed at once per GPU
    #[arg(long, value_name = "N")]
    pub micro_batch_tokens: Option<String>,
    /// Layers that are recomputed in the backward pass: none, full or auto
    #[arg(long, value_name = "LAYERS", alias = "checkpointing")]
    pub activation_checkpointing: Option<String>,
    /// How DPO obtains the reference model's log-probabilities: compute, cache or precompute
    #[arg(long, value_name = "WHEN", alias = "reference")]
    pub reference_logps: Option<String>,
    /// Passes over the data set
    #[arg(long, value_name = "E", alias = "epochs")]
    pub n_epochs: Option<String>,
}

/// Placeholders for mandatory keys, for a plan without `--config`. No file of these names is read.
const UNSAID: [&str; 3] = ["model=planned", "training_file=planned", "output_dir=planned"];

impl PlanOptions {
    /// The run's configuration, read and checked as by a run.
    pub fn run(&self) -> Result<RunConfig, Fault> {
        let mut overrides = self.keys.overrides();
        overrides.extend(self.model.iter().map(|model| format!("model={model}")));
        // Of several values of a key the last one counts, so --set comes last.
        overrides.extend(self.overrides.iter().cloned());
        match &self.config {
            Some(path) => RunConfig::load(path, &overrides),
            None => {
                overrides.splice(0..0, UNSAID.map(str::to_owned));
                RunConfig::from_toml("", "launcher plan", &overrides)
            }
        }
    }

    /// Lengths of a pair in tokens: the given ones, else `known`.
    #[must_use]
    pub fn pair(&self, known: PairTokens) -> PairTokens {
        let output = |known: f64| self.output_tokens.map_or(known, f64::from);
        PairTokens {
            prompt: self.prompt_tokens.map_or(known.prompt, f64::from),
            chosen: output(known.chosen),
            rejected: output(known.rejected),
        }
    }
}

impl KeyOptions {
    fn overrides(&self) -> Vec<String> {
        let lora = match self.method.as_deref() {
            Some("lora") => Some("true"),
            Some(_) => Some("false"),
            None => self.lora.then_some("true"),
        };
        let keys = [
            ("training_method", self.training_method.as_deref()),
            ("lora", lora),
            ("lora_r", self.lora_r.as_deref()),
            ("zero_stage", self.zero_stage.as_deref()),
            ("optim", self.optim.as_deref()),
            ("offload_optimizer", self.offload_optimizer.then_some("true")),
            ("reduce_dtype", self.reduce_dtype.as_deref()),
            ("prefix_sharing", self.no_prefix_sharing.then_some("false")),
            ("batch_size", self.batch_size.as_deref()),
            ("micro_batch_tokens", self.micro_batch_tokens.as_deref()),
            ("activation_checkpointing", self.activation_checkpointing.as_deref()),
            ("reference_logps", self.reference_logps.as_deref()),
            ("n_epochs", self.n_epochs.as_deref()),
        ];
        keys.iter().filter_map(|(key, value)| value.map(|value| format!("{key}={value}"))).collect()
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("expected a number above 0".into()),
    }
}
