//! What a pass costs: floating-point operations, memory, and the share of the device's peak that is reached.

pub mod activation_memory;
pub mod flops;
pub mod utilisation;
