//! What the coordinator keeps on disk.

pub mod output_dir;
pub mod reference_store;
pub mod tensorboard;
