//! Which trainer computes where: GPUs, cores, threads. Pure but for looks at the machine.

pub mod gpus;
pub mod numa;
pub mod trainers;
