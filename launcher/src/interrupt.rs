//! Ctrl-C and a polite kill.

use dyad_proto::Fault;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Takes the place of the default action for as long as the process lives, so somebody must go on waiting.
#[derive(Debug)]
pub struct Interrupt {
    ctrl_c: Signal,
    terminate: Signal,
}

impl Interrupt {
    /// Starts to listen.
    pub fn new() -> Result<Self, Fault> {
        let listen =
            |kind| signal(kind).map_err(|error| Fault::failed(format!("cannot listen for signals: {error}")));
        Ok(Self { ctrl_c: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// Resolves at the next of the two.
    pub async fn wait(&mut self) {
        tokio::select! {
            _ = self.ctrl_c.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
