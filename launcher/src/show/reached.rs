//! Progress of a run, from its events and its folder.

use std::path::Path;

use dyad_proto::run_folder::{checkpoint_step, newest_checkpoint};
use dyad_proto::wire::run_event::Body;

/// Progress of one attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Last step that is done.
    pub step: u64,
    /// The run has written rows, so `--overwrite` has already removed the earlier run's files.
    pub rows: bool,
    /// Step of the newest checkpoint.
    pub saved: Option<u64>,
}

impl Reached {
    /// Updates the progress from an event.
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

    /// Updates `saved` from the newest checkpoint in the run's folder, which may have no event. Does nothing before the first row: the
    /// folder may still hold an earlier run's checkpoints.
    pub fn look(&mut self, output_dir: &Path) {
        if self.rows {
            let newest = newest_checkpoint(output_dir);
            self.saved = self.saved.max(newest.as_deref().and_then(checkpoint_step));
        }
    }
}
