//! Every constant of the prediction, with where it comes from.
//!
//! *Published*: a vendor's or benchmark's number. *Measured*: by this project, on CPUs, one H100 or one H200 (docs/lab/benchmarks.md).
//! *Derived*: computed from such numbers. *Assumed*: nothing better is known.

/// GiB in bytes.
pub const GIB: f64 = (1u64 << 30) as f64;

/// What one GPU, or one CPU trainer, can do.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpec {
    /// As on the command line.
    pub name: &'static str,
    /// It is a GPU: bfloat16 passes; otherwise float32.
    pub gpu: bool,
    /// FLOP/s that utilisation is counted against.
    pub peak: f64,
    /// FLOP/s of large matrix products.
    pub gemm: f64,
    /// FLOP/s of attention, forward.
    pub attention_forward: f64,
    /// FLOP/s of attention, backward.
    pub attention_backward: f64,
    /// Bytes per second that streaming kernels reach.
    pub memory_bandwidth: f64,
    /// Bytes that a process can allocate, where it is known.
    pub memory: Option<f64>,
    /// All-reduce bus bandwidth inside a node, bytes per second.
    pub node_bandwidth: f64,
    /// Memory traffic of elementwise work over that of the least number of passes.
    pub elementwise: f64,
    /// Share of the modelled compute rate that whole training steps reach.
    pub achieved: f64,
    /// Seconds between two kernels at best.
    pub launch: f64,
}

/// NVIDIA H200 SXM.
pub const H200: DeviceSpec = DeviceSpec {
    name: "h200",
    gpu: true,
    // Published: dense bfloat16 of the data sheet.
    peak: 989e12,
    // Measured: 820 to 843 in single products of edge 8,192, on an H100 as well.
    gemm: 830e12,
    // Measured: runs of 1,024 and 256 queries, 32 heads of width 128 over 8. Longer ones do better.
    attention_forward: 220e12,
    attention_backward: 176e12,
    // Measured: 3.84 to 4.09 in large copies.
    memory_bandwidth: 4.1e12,
    // Derived: 141 GB parts report about 140 GiB, of which 139 GiB can be allocated.
    memory: Some(139.0 * GIB),
    // Published: nccl-tests issue 272, eight GPUs with NVLink SHARP.
    node_bandwidth: 475e9,
    elementwise: GPU_ELEMENTWISE,
    achieved: GPU_ACHIEVED,
    launch: GPU_LAUNCH,
};

/// NVIDIA H100 SXM, 80 GB: the die of the H200 with slower memory.
pub const H100: DeviceSpec = DeviceSpec {
    name: "h100",
    // Measured: 2.79 to 2.82 in large copies.
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
    // Assumed: half of the GEMM rate, because FlashAttention-2 was made for this part; of the H200's it takes a quarter.
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

/// A CPU trainer whose large float32 matrix products run at so many FLOP/s.
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
        // Measured: an operator of libtorch with a recorded graph, called from Rust.
        launch: 1.34e-6,
    }
}

/// Derived: fused kernels need 4.2 us per token for an 8B model at 4.3 TB/s, 1.25 times the least passes counted here.
pub const FUSED: f64 = 1.25;
/// Measured: 0.135 s between the products of an 8B LoRA step on an H200, where the least passes would take 0.103.
pub const GPU_ELEMENTWISE: f64 = 1.3;

/// Measured: an 8B LoRA step on an H200 takes 1.69 s, of which the parts modelled here make 1.35: products of a step run at 0.8
/// of the rate of a single large one.
pub const GPU_ACHIEVED: f64 = 0.8;
/// Measured: a float32 step runs at 80 % of the roofline of matrix products (docs/lab/performance.md), where the parts modelled
/// here alone would make it 92 %.
pub const CPU_ACHIEVED: f64 = 0.87;
/// Published: 3 to 5 us between small kernels.
pub const GPU_LAUNCH: f64 = 5e-6;
/// Measured: kernels per layer of a forward pass when all its weights are trained (69 in three passes, of which the backward pass
/// is worth two), and with adapters (123).
pub const LAUNCHES_PER_LAYER: f64 = 17.0;
/// As above.
pub const LAUNCHES_PER_ADAPTED_LAYER: f64 = 31.0;
/// Derived: kernels of a backward pass over those of a forward pass.
pub const BACKWARD_LAUNCHES: f64 = 2.0;

/// Published: FlashAttention's backward pass recomputes the scores: 5 products instead of 2.
pub const ATTENTION_BACKWARD: f64 = 2.5;

/// Derived: the backward pass's share of attention's seconds at the rates above.
pub const ATTENTION_BACKWARD_SHARE: f64 = 0.75;
/// Derived: the backward pass's share of the elementwise passes that `time.rs` counts.
pub const ELEMENTWISE_BACKWARD_SHARE: f64 = 0.6;

/// Derived: AdamW reads and writes master weight and two float32 moments.
pub const ADAMW_STATE_TRAFFIC: f64 = 24.0;
/// Derived: reads of the gradient by AdamW and norm, read and write by clipping.
pub const GRADIENT_PASSES: f64 = 4.0;
/// Derived: the master is read and the bfloat16 weight written once more.
pub const PUBLISH_TRAFFIC: f64 = 6.0;

/// Assumed: units are merged into buckets until they hold so many bytes. The trainer measures its link and takes 1 to 64 MiB.
pub const BUCKET_BYTES: f64 = (8u64 << 20) as f64;
/// Derived: passes over logits to score them: written, read.
pub const SCORE_PASSES: f64 = 2.0;
/// Derived: the same to differentiate them for a frozen head as well: read and written in place.
pub const FROZEN_PASSES: f64 = 4.0;
/// Derived: the same for a trained head: read by two products as well.
pub const TRAIN_PASSES: f64 = 6.0;

/// Assumed: seconds before the first byte of a collective inside a node; once more per doubling of the nodes.
pub const COLLECTIVE_LATENCY: f64 = 30e-6;
/// Assumed: NCCL's channels and their buffers.
pub const NCCL_BYTES: f64 = GIB;
/// Assumed: CUDA context, libraries' kernels and workspaces.
pub const CUDA_BYTES: f64 = GIB;
/// Measured: libtorch and its libraries, resident in a trainer on the CPU.
pub const CPU_BYTES: f64 = 0.3 * GIB;
/// Assumed: share of the memory that can be used before the allocator's fragments get in the way.
pub const USABLE: f64 = 0.95;

/// What joins the nodes.
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
    /// Bytes per second in and out of a node with so many GPUs.
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
