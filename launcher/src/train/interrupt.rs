//! Ctrl-C, a polite kill, and a terminal that closes.

use std::time::{Duration, Instant};

use dyad_proto::{Fault, signals};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How one of them is called.
#[must_use]
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        _ => "SIGHUP",
    }
}

/// Takes the place of the default action for as long as the process lives, so somebody must go on waiting.
#[derive(Debug)]
pub struct Interrupt {
    ctrl_c: Signal,
    terminate: Signal,
    /// None under nohup, which wants the terminal's end ignored.
    hangup: Option<Signal>,
    /// When the last of them came.
    last: Option<Instant>,
}

/// A scheduler that ends a job signals every process of it, and the job's script signals the launcher again; a terminal that closes
/// signals once more than its shell: what comes so soon after another signal is the same wish. Ctrl-C is a person's, and always counts.
const ECHO: Duration = Duration::from_secs(5);

impl Interrupt {
    /// Starts to listen.
    pub fn new() -> Result<Self, Fault> {
        let hangup = SignalKind::hangup();
        let wanted = !signals::is_ignored(hangup.as_raw_value());
        let listen =
            |kind| signal(kind).map_err(|error| Fault::failed(format!("cannot listen for signals: {error}")));
        Ok(Self {
            ctrl_c: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: wanted.then(|| listen(hangup)).transpose()?,
            last: None,
        })
    }

    /// Whether one has come.
    #[must_use]
    pub fn came(&self) -> bool {
        self.last.is_some()
    }

    /// Resolves at the next of them; says which.
    pub async fn wait(&mut self) -> i32 {
        loop {
            let hangup = async {
                match &mut self.hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            let came = tokio::select! {
                _ = self.ctrl_c.recv() => libc::SIGINT,
                _ = self.terminate.recv() => libc::SIGTERM,
                _ = hangup => libc::SIGHUP,
            };
            if came == libc::SIGINT || self.last.is_none_or(|last| last.elapsed() > ECHO) {
                self.last = Some(Instant::now());
                return came;
            }
        }
    }
}
