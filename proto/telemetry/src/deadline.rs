//! Running work with a time limit.

use std::sync::mpsc;
use std::time::Duration;

/// Runs `work` on a thread and returns when it is done, or after `limit` at the latest.
pub(crate) fn within(limit: Duration, work: impl FnOnce() + Send + 'static) {
    let (done, end) = mpsc::channel();
    let thread = std::thread::Builder::new().name("telemetry-end".into()).spawn(move || {
        work();
        let _ = done.send(());
    });
    if thread.is_ok() {
        let _ = end.recv_timeout(limit);
    }
}
