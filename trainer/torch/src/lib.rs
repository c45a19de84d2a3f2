//! libtorch features that tch lacks: the C++ bridge (`cpp/`), kernels for CPUs and GPUs, collectives, copies, profiling.
//!
//! - [`ffi`]: declarations of the bridge's functions. [`error`]: its errors.
//! - [`autograd`], [`adamw`], [`storage`]: libtorch functions that tch lacks.
//! - [`backend`], [`ops`]: choice of an implementation, and the operators of a decoder.
//! - [`device`], [`place`], [`gpu`], [`transfer`]: devices, precision, GPU kernels, copies between host and device.
//! - [`comm`]: collectives between ranks.
//! - [`recorder`], [`panics`]: libtorch's profiler; panics as errors.
//!
//! This crate does not depend on models, losses or runs.
// Tests may open files directly; all other code uses `dyad_proto::files`.
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
