//! Operators of a decoder. [`crate::backend`] chooses the bridge's CPU kernels, its GPU kernels, or libtorch's operators.

pub mod attention_kernel;
pub mod flash_attention;
mod gpu_kernels;
pub mod head_tile;
pub mod layer;
mod made;
pub mod product;
pub mod segment;
