//! The signals that end a trainer.

use tokio::signal::unix::{SignalKind, signal};

/// The signals with which users and schedulers end a process.
#[derive(Debug)]
pub struct EndSignals(Vec<tokio::signal::unix::Signal>);

impl EndSignals {
    /// Starts to listen.
    #[must_use]
    pub fn listen() -> Self {
        // If the kernel refuses, the signal keeps its default action.
        let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        // Under nohup, a closing terminal does not end the process.
        let wanted = kinds.into_iter().filter(|kind| {
            *kind != SignalKind::hangup() || !dyad_proto::signals::is_ignored(kind.as_raw_value())
        });
        Self(wanted.filter_map(|kind| signal(kind).ok()).collect())
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) {
        std::future::poll_fn(|context| {
            let heard = self.0.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if heard { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
}
