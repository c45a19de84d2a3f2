//! Writes and restores model folders: weights and tokenizer that transformers and PEFT can load, with optimizer state and cursor next to
//! them. [`save`] writes, [`load`] restores, and [`rotate`] removes old checkpoints.
//!
//! - TRN-K1: a folder appears under its final name only when every file in it is complete and on disk.
//! - TRN-K3: a folder's manifest lists size and checksum of every file. Those of tensors are computed from the bytes in memory, not read
//!   back from the disk.
//! - TRN-K2: restoring a checkpoint restores weights and moments bit for bit, in every storage precision.

mod files;
pub mod load;
pub mod rotate;
pub mod save;
mod tensors;

pub use files::Home;

use std::io;
use std::path::Path;

use dyad_proto::checkpoint_state::CheckpointState;
use dyad_proto::{Fault, run_folder};

/// Cursor file: its presence makes a folder a checkpoint of a run.
pub const STATE_FILE: &str = run_folder::STATE;
/// Moments, and also the masters if the weights are stored in less than float32.
pub const OPTIMIZER_FILE: &str = run_folder::OPTIMIZER;

/// Reads the cursor of a checkpoint.
pub fn read_state(checkpoint: &Path) -> Result<CheckpointState, Fault> {
    let path = checkpoint.join(STATE_FILE);
    let broken = |error: &dyn std::fmt::Display| {
        Fault::input(format!("cannot read {}: {error}", path.display()))
            .hint("every trainer reads the checkpoint: it must lie under the same path on every host")
    };
    let text = dyad_proto::files::read_to_string(&path).map_err(|error| broken(&error))?;
    serde_json::from_str(&text).map_err(|error| broken(&error))
}

fn cannot_write(path: &Path, error: &io::Error) -> Fault {
    Fault::unwritten(path, error)
        .hint("check permissions and free space; the last complete checkpoint is untouched")
}
