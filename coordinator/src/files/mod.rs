//! The coordinator's files.

pub mod output_dir;
pub mod reference_store;
pub mod tensorboard;
