//! Measurements of this process: what it does, how long it takes, what it is at.

pub mod gpu_meter;
pub mod profile;
pub mod progress;
pub mod timing;
pub mod trace;
