//! How far a run has come, as its events and its folder tell.

use std::path::Path;

use dyad_proto::run_folder::{checkpoint_step, newest_checkpoint};
use dyad_proto::wire::run_event::Body;

/// How far an attempt came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The last step that was done.
    pub step: u64,
    /// The run has rows of its own: what `--overwrite` was to remove is gone.
    pub rows: bool,
    /// Step of the newest checkpoint.
    pub saved: Option<u64>,
}

impl Reached {
    /// Takes note of an event of the run.
    pub fn note(&mut self, event: &Body) {
        match event {
            Body::Data(data) if data.start_step > 0 => {
                self.step = data.start_step;
                self.saved = self.saved.max(Some(data.start_step));
            }
            Body::Step(step) => (self.step, self.rows) = (step.step, true),
            Body::Evaluation(_) => self.rows = true,
            Body::Checkpoint(saved) => self.saved = self.saved.max(Some(saved.step)),
            _ => {}
        }
    }

    /// Takes note of a checkpoint that lies in the run's folder, told of or not. Before the first row those of an earlier run lie there.
    pub fn look(&mut self, output_dir: &Path) {
        if self.rows {
            let newest = newest_checkpoint(output_dir);
            self.saved = self.saved.max(newest.as_deref().and_then(checkpoint_step));
        }
    }
}
