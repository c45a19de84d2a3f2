//! Measurements of this process.
//!
//! - [`progress`]: what its threads do, for heartbeats.
//! - [`timing`]: seconds of a step by phase, and peak memory.
//! - [`trace`]: spans of a step's parts.
//! - [`profile`]: `--profile`, where a step's time goes.
//! - [`gpu_meter`]: memory, utilisation and power of the GPU.

pub mod gpu_meter;
pub mod profile;
pub mod progress;
pub mod timing;
pub mod trace;
