//! Weights, gradients and optimizer states in flat buffers, whole or divided between the ranks (ZeRO).

pub mod parameters;
pub mod ranges;
pub mod unit_weights;
