//! Operators of a decoder, each by the implementation that serves: the bridge's kernels for CPUs, those for GPUs, or libtorch's operators.

pub mod attention_kernel;
pub mod flash_attention;
mod gpu_kernels;
pub mod head_tile;
pub mod layer;
mod made;
pub mod product;
pub mod segment;
