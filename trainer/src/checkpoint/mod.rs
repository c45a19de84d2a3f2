//! Model folders as they are written: weights and tokenizer that transformers and PEFT load as they are, optimizer state and
//! cursor beside them.
//!
//! - TRN-K1: a folder appears under its final name only when every file in it is complete and on disk.
//! - TRN-K3: a folder names size and checksum of every file in it, taken of what was to be written, not of what lies on the disk.
//! - TRN-K2: restoring a checkpoint brings back weights and moments bit for bit, whatever precision the weights are stored in.

mod files;
pub mod load;
pub mod rotate;
pub mod save;
mod tensors;

pub use files::Home;

use std::path::Path;

use dyad_proto::fingerprint::Fingerprint;
use dyad_proto::{Fault, run_folder};
use serde::{Deserialize, Serialize};

/// Cursor file: its presence makes a folder a checkpoint of a run.
pub const STATE_FILE: &str = run_folder::STATE;
/// Moments and, where the weights are stored in less than float32, the masters.
pub const OPTIMIZER_FILE: &str = run_folder::OPTIMIZER;

/// Where a run stood; what a resume compares before it trusts the folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Seed of the data order.
    pub random_seed: u64,
    /// Pairs per optimizer step.
    pub batch_size: u32,
    /// Trainers that took part.
    pub world_size: u32,
    /// Size of a bucket of gradients.
    #[serde(default)]
    pub bucket_bytes: i64,
    /// Tokens trained on.
    #[serde(default)]
    pub num_tokens: u64,
    /// Rows of evaluations before this step.
    #[serde(default)]
    pub evaluations: u64,
    /// Written for its time or at an early end: it goes once there are newer ones.
    #[serde(default)]
    pub rotates: bool,
    /// What the run computes.
    #[serde(flatten)]
    pub fingerprint: Fingerprint,
}

impl State {
    /// Reads the cursor of a checkpoint.
    pub fn load(checkpoint: &Path) -> Result<Self, Fault> {
        let path = checkpoint.join(STATE_FILE);
        let broken = |error: &dyn std::fmt::Display| {
            Fault::input(format!("cannot read {}: {error}", path.display()))
                .hint("every trainer reads the checkpoint: it must lie under the same path on every host")
        };
        let text = dyad_proto::files::read_to_string(&path).map_err(|error| broken(&error))?;
        serde_json::from_str(&text).map_err(|error| broken(&error))
    }
}

fn cannot_write(path: &Path, error: &dyn std::fmt::Display) -> Fault {
    Fault::failed(format!("cannot write {}: {error}", path.display()))
        .hint("check permissions and free space; the last complete checkpoint is untouched")
}
