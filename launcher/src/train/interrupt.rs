//! Signals that end a run: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal closes).

use std::time::{Duration, Instant};

use dyad_proto::{Fault, signals};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Name of one of these signals.
#[must_use]
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        _ => "SIGHUP",
    }
}

/// Receives the signals. They lose their default action until the process ends, so the caller must keep waiting for them.
#[derive(Debug)]
pub struct Interrupt {
    ctrl_c: Signal,
    terminate: Signal,
    /// `None` under nohup, where SIGHUP stays ignored.
    hangup: Option<Signal>,
    /// When the last signal came.
    last: Option<Instant>,
}

/// SIGTERM or SIGHUP within this time after another signal counts as a duplicate: schedulers signal all processes of a job, and then the
/// job's script signals the launcher again; a closing terminal signals twice as well. SIGINT (Ctrl-C) always counts.
const ECHO: Duration = Duration::from_secs(5);

impl Interrupt {
    /// Installs the signal handlers.
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

    /// Whether a signal has come.
    #[must_use]
    pub fn came(&self) -> bool {
        self.last.is_some()
    }

    /// Waits for the next signal; returns its number.
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
