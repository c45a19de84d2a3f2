//! GPU, cores and threads of each trainer. Reads the machine's hardware, has no other side effects.

pub mod gpus;
pub mod numa;
pub mod trainers;
