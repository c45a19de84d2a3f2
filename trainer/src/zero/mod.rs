//! Weights, gradients and optimizer states in flat buffers, whole or sharded over the ranks (ZeRO).
//!
//! [`parameters`] holds the trainable parameters in buckets, [`unit_weights`] the weights of a unit, and [`ranges`] computes layouts and
//! parts.

pub mod parameters;
pub mod ranges;
pub mod unit_weights;
