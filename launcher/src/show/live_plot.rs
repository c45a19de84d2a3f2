//! Draws `metrics.svg` during the run and at its end, also after a failure. A separate thread draws it, so a hanging disk does not delay
//! the run, and delays its end by at most `PATIENCE`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::Fault;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::show::{console, plot};

/// Minimum time between two drawings during a run.
const PAUSE: Duration = Duration::from_secs(30);
/// The pause is also at least this multiple of the last drawing time, which grows with the run.
const SHARE: u32 = 100;
/// Longest that the end of a run waits for its last picture.
const PATIENCE: Duration = Duration::from_secs(10);

/// The plot of one run; cheap to clone.
#[derive(Clone, Debug)]
pub struct LivePlot(Arc<SharedPlot>);

#[derive(Debug)]
struct SharedPlot {
    output_dir: PathBuf,
    state: Mutex<PlotState>,
    /// The drawing thread holds its only permit.
    pen: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct PlotState {
    /// The folder has rows of this run. Until then, rows in it are an earlier run's.
    rows: bool,
    /// Earliest time of the next drawing.
    next: Option<Instant>,
    /// A failed drawing was reported already.
    told: bool,
}

impl LivePlot {
    /// Plot of the run that writes to `output_dir`.
    #[must_use]
    pub fn new(output_dir: &Path) -> Self {
        let pen = Arc::new(Semaphore::new(1));
        Self(Arc::new(SharedPlot { output_dir: output_dir.to_owned(), state: Mutex::default(), pen }))
    }

    /// Tells that the run has a new row. Draws at once the first time, then after each pause.
    pub fn has_changed(&self) {
        let mut state = self.0.state();
        state.rows = true;
        if state.next.is_some_and(|next| Instant::now() < next) {
            return;
        }
        drop(state);
        if let Ok(pen) = Arc::clone(&self.0.pen).try_acquire_owned() {
            drop(self.draw(pen));
        }
    }

    /// Draws the final plot; returns its path, or `None` if it was not drawn in time. Without a reported row, only a complete run draws:
    /// the rows in the folder may be an earlier run's.
    pub async fn finish(&self, complete: bool) -> Option<PathBuf> {
        if !complete && !self.0.state().rows {
            return None;
        }
        let drawing = async {
            // A drawing in progress may have read the rows before the last one was written: wait for it, then draw again.
            let pen = Arc::clone(&self.0.pen).acquire_owned().await.ok()?;
            self.draw(pen).await.ok()?
        };
        tokio::time::timeout(PATIENCE, drawing).await.ok().flatten()
    }

    /// Draws on a new thread; the receiver gets the path.
    fn draw(&self, pen: OwnedSemaphorePermit) -> oneshot::Receiver<Option<PathBuf>> {
        let (tell, told) = oneshot::channel();
        let shared = Arc::clone(&self.0);
        let draw = move || {
            let began = Instant::now();
            let drawn = plot::draw(&shared.output_dir);
            let path = shared.drawn(drawn, began.elapsed());
            drop(pen);
            // Fails if the receiver was dropped.
            let _ = tell.send(path);
        };
        // If no thread can be started, the permit is released and the next row tries again.
        let _ = std::thread::Builder::new().name("plot".into()).spawn(draw);
        told
    }
}

impl SharedPlot {
    fn state(&self) -> MutexGuard<'_, PlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drawn(&self, drawn: Result<Option<PathBuf>, Fault>, took: Duration) -> Option<PathBuf> {
        let mut state = self.state();
        state.next = Instant::now().checked_add(pause(took));
        match drawn {
            Ok(path) => path,
            Err(fault) => {
                if !std::mem::replace(&mut state.told, true) {
                    console::warn(&fault.to_string());
                }
                None
            }
        }
    }
}

/// Pause after a drawing that took `took`.
fn pause(took: Duration) -> Duration {
    PAUSE.max(took.saturating_mul(SHARE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawing_takes_at_most_a_hundredth_of_the_time() {
        assert_eq!(pause(Duration::from_millis(20)), PAUSE);
        assert_eq!(pause(Duration::from_secs(2)), Duration::from_secs(200));
        assert_eq!(pause(Duration::MAX), Duration::MAX);
    }

    #[tokio::test]
    async fn a_run_without_rows_keeps_an_earlier_runs_plot() {
        let dir = tempfile::tempdir().unwrap();
        let (rows, svg) = (dir.path().join("metrics.jsonl"), dir.path().join("metrics.svg"));
        std::fs::write(&rows, "{\"step\":1,\"loss\":0.5}\n").unwrap();
        std::fs::write(&svg, "an earlier run's").unwrap();
        let plot = LivePlot::new(dir.path());
        assert_eq!(plot.finish(false).await, None);
        assert_eq!(std::fs::read_to_string(&svg).unwrap(), "an earlier run's");
        plot.has_changed();
        assert_eq!(plot.finish(false).await, Some(svg.clone()));
        assert!(std::fs::read_to_string(&svg).unwrap().contains("<svg"));
    }

    #[tokio::test]
    async fn the_final_plot_has_the_last_row() {
        let dir = tempfile::tempdir().unwrap();
        let rows = dir.path().join("metrics.jsonl");
        std::fs::write(&rows, "{\"step\":1,\"loss\":0.5}\n").unwrap();
        let plot = LivePlot::new(dir.path());
        plot.has_changed();
        std::fs::write(&rows, "{\"step\":1,\"loss\":0.5}\n{\"step\":40,\"loss\":0.5}\n").unwrap();
        plot.has_changed();
        let svg = std::fs::read_to_string(plot.finish(false).await.unwrap()).unwrap();
        assert!(svg.contains("\n40\n"), "{svg}");
    }

    #[tokio::test]
    async fn a_plot_that_cannot_be_written_only_warns() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), "{\"step\":1,\"loss\":0.5}\n").unwrap();
        std::fs::create_dir(dir.path().join("metrics.svg")).unwrap();
        let plot = LivePlot::new(dir.path());
        plot.has_changed();
        assert_eq!(plot.finish(false).await, None);
        assert!(plot.0.state().told);
    }
}
