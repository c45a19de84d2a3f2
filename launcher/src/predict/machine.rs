//! Constants of the prediction, each with its source.
//!
//! *Published*: a vendor's or benchmark's number. *Measured*: by this project, on CPUs, one H100 or one H200 (docs/lab/benchmarks.md).
//! *Derived*: computed from such numbers. *Assumed*: a guess, because nothing better is known.

/// GiB in bytes.
pub const GIB: f64 = (1u64 << 30) as f64;

/// Capabilities of one GPU, or of one CPU trainer.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpec {
    /// Name on the command line.
    pub name: &'static str,
    /// Whether it is a GPU. GPUs compute in bfloat16, CPUs in float32.
    pub gpu: bool,
    /// FLOP/s that count as full utilisation.
    pub peak: f64,
    /// FLOP/s of large matrix products.
    pub gemm: f64,
    /// FLOP/s of attention, forward.
    pub attention_forward: f64,
    /// FLOP/s of attention, backward.
    pub attention_backward: f64,
    /// Bytes per second that streaming kernels reach.
    pub memory_bandwidth: f64,
    /// Bytes that a process can allocate, if known.
    pub memory: Option<f64>,
    /// All-reduce bus bandwidth inside a node, bytes per second.
    pub node_bandwidth: f64,
    /// Memory traffic of elementwise work, as a multiple of the minimum number of passes.
    pub elementwise: f64,
    /// Share of the modelled compute rate that whole training steps reach.
    pub achieved: f64,
    /// Minimum seconds between two kernels.
    pub launch: f64,
}

/// NVIDIA H200 SXM.
pub const H200: DeviceSpec = DeviceSpec {
    name: "h200",
    gpu: true,
    // Published: dense bfloat16 of the data sheet.
    peak: 989e12,
    // Measured: 820 to 843 TFLOP/s in single products of square matrices of 8,192, on an H100 as well.
    gemm: 830e12,
    // Measured: sequences of 1,024 and 256 queries, 32 query heads of width 128 over 8 key heads. Longer sequences are faster.
    attention_forward: 220e12,
    attention_backward: 176e12,
    // Measured: 3.84 to 4.09 TB/s in large copies.
    memory_bandwidth: 4.1e12,
    // Derived: GPUs of 141 GB report about 140 GiB, of which 139 GiB can be allocated.
    memory: Some(139.0 * GIB),
    // Published: nccl-tests issue 272, eight GPUs with NVLink SHARP.
    node_bandwidth: 475e9,
    elementwise: GPU_ELEMENTWISE,
    achieved: GPU_ACHIEVED,
    launch: GPU_LAUNCH,
};

/// NVIDIA H100 SXM, 80 GB: the chip of the H200 with less and slower memory.
pub const H100: DeviceSpec = DeviceSpec {
    name: "h100",
    // Measured: 2.79 to 2.82 TB/s in large copies.
    memory_bandwidth: 2.8e12,
    // Published: nvidia-smi shows 79.6 GiB.
    memory: Some(79.0 * GIB),
    // Published: nccl-tests issue 290.
    node_bandwidth: 476e9,
    ..H200
};

/// NVIDIA A100 SXM, 80 GB.
pub const A100: DeviceSpec = DeviceSpec {
    name: "a100",
    // Published: dense bfloat16 of the data sheet.
    peak: 312e12,
    // Derived: 80 % of the peak, as for the H200.
    gemm: 250e12,
    // Assumed: half of the GEMM rate, because FlashAttention-2 is tuned for the A100; on the H200 it reaches a quarter.
    attention_forward: 125e12,
    attention_backward: 100e12,
    // Derived: 90 % of the published 2.04 TB/s.
    memory_bandwidth: 1.8e12,
    // Published: as the H100.
    memory: Some(79.0 * GIB),
    // Published: nccl-tests issues 149 and 178 show 200 to 208 GB/s.
    node_bandwidth: 200e9,
    ..H200
};

/// A CPU trainer whose large float32 matrix products run at `gemm` FLOP/s.
#[must_use]
pub fn cpu(gemm: f64) -> DeviceSpec {
    DeviceSpec {
        name: "cpu",
        gpu: false,
        peak: gemm,
        gemm,
        // Measured: 0.55 to 0.65 of the GEMM rate, forward and backward together, on two Zen 4 cores.
        attention_forward: 0.6 * gemm,
        attention_backward: 0.6 * gemm,
        // Measured: two Zen 4 cores.
        memory_bandwidth: 32e9,
        memory: None,
        // Assumed: Gloo over the loopback interface.
        node_bandwidth: 2e9,
        elementwise: FUSED,
        achieved: CPU_ACHIEVED,
        // Measured: a call of a libtorch operator from Rust, with autograd.
        launch: 1.34e-6,
    }
}

/// Derived: fused kernels need 4.2 us per token for an 8B model at 4.3 TB/s, 1.25 times the minimum passes counted in `time.rs`.
pub const FUSED: f64 = 1.25;
/// Measured: elementwise work of an 8B LoRA step on an H200 takes 0.135 s; the minimum passes would take 0.103 s.
pub const GPU_ELEMENTWISE: f64 = 1.3;

/// Measured: an 8B LoRA step on an H200 takes 1.69 s; the parts modelled here add up to 1.35 s. Products of a step run at 0.8 of the
/// rate of a single large product.
pub const GPU_ACHIEVED: f64 = 0.8;
/// Measured: a float32 step runs at 80 % of the roofline of matrix products (docs/lab/performance.md); with only the parts modelled
/// here it would run at 92 %.
pub const CPU_ACHIEVED: f64 = 0.87;
/// Published: 3 to 5 us between small kernels.
pub const GPU_LAUNCH: f64 = 5e-6;
/// Measured: kernels per layer of a forward pass if all weights are trained: 69 in three passes, where the backward pass counts as
/// two.
pub const LAUNCHES_PER_LAYER: f64 = 17.0;
/// Measured: the same with adapters (123 kernels in three passes).
pub const LAUNCHES_PER_ADAPTED_LAYER: f64 = 31.0;
/// Derived: kernels of a backward pass over those of a forward pass.
pub const BACKWARD_LAUNCHES: f64 = 2.0;

/// Published: FlashAttention's backward pass recomputes the scores: 5 products instead of 2.
pub const ATTENTION_BACKWARD: f64 = 2.5;

/// Derived: the backward pass's share of attention's seconds at the rates above.
pub const ATTENTION_BACKWARD_SHARE: f64 = 0.75;
/// Derived: the backward pass's share of the elementwise passes that `time.rs` counts.
pub const ELEMENTWISE_BACKWARD_SHARE: f64 = 0.6;

/// Derived: bytes per parameter with which AdamW reads and writes the master weight and two float32 moments.
pub const ADAMW_STATE_TRAFFIC: f64 = 24.0;
/// Derived: passes over the gradient: AdamW and the norm read it, clipping reads and writes it.
pub const GRADIENT_PASSES: f64 = 4.0;
/// Derived: bytes per parameter to read the master weight and write the bfloat16 weight.
pub const PUBLISH_TRAFFIC: f64 = 6.0;

/// Assumed: gradients are merged into buckets of at least this many bytes. The trainer measures its link and uses 1 to 64 MiB.
pub const BUCKET_BYTES: f64 = (8u64 << 20) as f64;
/// Derived: passes over the logits to score them: one write, one read.
pub const SCORE_PASSES: f64 = 2.0;
/// Derived: the same with the gradient for a frozen head: one more read and write, in place.
pub const FROZEN_PASSES: f64 = 4.0;
/// Derived: the same for a trained head: two products read the gradient as well.
pub const TRAIN_PASSES: f64 = 6.0;

/// Assumed: latency in seconds of a collective inside a node; each doubling of the nodes adds as much.
pub const COLLECTIVE_LATENCY: f64 = 30e-6;
/// Assumed: bytes of NCCL's channels and their buffers.
pub const NCCL_BYTES: f64 = GIB;
/// Assumed: bytes of CUDA context, the libraries' kernels and workspaces.
pub const CUDA_BYTES: f64 = GIB;
/// Measured: resident bytes of libtorch and its libraries in a CPU trainer.
pub const CPU_BYTES: f64 = 0.3 * GIB;
/// Assumed: usable share of the memory; the allocator loses the rest to fragmentation.
pub const USABLE: f64 = 0.95;

/// Network between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Interconnect {
    /// NDR InfiniBand, 400 Gbit/s, one adapter per GPU.
    Ndr,
    /// 100 Gbit/s Ethernet, one port per node.
    #[value(name = "100gbe")]
    HundredGbe,
    /// 25 Gbit/s Ethernet, one port per node.
    #[value(name = "25gbe")]
    TwentyFiveGbe,
    /// 10 Gbit/s Ethernet, one port per node.
    #[value(name = "10gbe")]
    TenGbe,
}

impl Interconnect {
    /// Bytes per second in and out of a node with `gpus_per_node` GPUs.
    #[must_use]
    pub fn bandwidth(self, gpus_per_node: f64) -> f64 {
        match self {
            // Published: nccl-tests threads show 46 to 48 GB/s per adapter.
            Self::Ndr => 46e9 * gpus_per_node,
            // Derived: 88 % of the line rate, for TCP.
            Self::HundredGbe => 11e9,
            Self::TwentyFiveGbe => 2.75e9,
            Self::TenGbe => 1.1e9,
        }
    }
}
