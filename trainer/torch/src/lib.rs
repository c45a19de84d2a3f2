//! libtorch beyond tch: the C++ bridge (`cpp/`), kernels for CPUs and GPUs, collectives, copies, recording.
//!
//! - [`ffi`]: every function of the bridge. [`error`]: what it says.
//! - [`autograd`], [`adamw`], [`storage`]: what tch leaves out of libtorch.
//! - [`backend`], [`ops`]: which implementation computes, and operators of a decoder.
//! - [`device`], [`place`], [`gpu`], [`transfer`]: where tensors are, kernels for GPUs, copies between host and device.
//! - [`comm`]: collectives between ranks.
//! - [`recorder`], [`panics`]: libtorch's profiler; its exceptions as errors.
//!
//! Nothing here knows a model, a loss or a run.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod adamw;
pub mod autograd;
pub mod backend;
pub mod comm;
pub mod device;
pub mod error;
mod ffi;
pub mod gpu;
pub mod ops;
pub mod panics;
pub mod place;
pub mod recorder;
pub mod storage;
pub mod transfer;
