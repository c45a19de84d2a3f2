//! Ctrl-C and a polite kill.

use std::time::{Duration, Instant};

use dyad_proto::Fault;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Takes the place of the default action for as long as the process lives, so somebody must go on waiting.
#[derive(Debug)]
pub struct Interrupt {
    ctrl_c: Signal,
    terminate: Signal,
    /// When the last of the two came.
    last: Option<Instant>,
}

/// A scheduler that ends a job signals every process of it, and the job's script signals the launcher again: SIGTERM so soon after
/// another signal is the same wish. Ctrl-C is a person's, and always counts.
const ECHO: Duration = Duration::from_secs(5);

impl Interrupt {
    /// Starts to listen.
    pub fn new() -> Result<Self, Fault> {
        let listen =
            |kind| signal(kind).map_err(|error| Fault::failed(format!("cannot listen for signals: {error}")));
        Ok(Self {
            ctrl_c: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            last: None,
        })
    }

    /// Resolves at the next of the two.
    pub async fn wait(&mut self) {
        loop {
            let person = tokio::select! {
                _ = self.ctrl_c.recv() => true,
                _ = self.terminate.recv() => false,
            };
            if person || self.last.is_none_or(|last| last.elapsed() > ECHO) {
                self.last = Some(Instant::now());
                return;
            }
        }
    }
}
