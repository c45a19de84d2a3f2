//! `--print-events`: the run's events as JSON lines on standard output, where a container's log keeps them.

use std::io::Write;

use futures::{Stream, StreamExt};

use dyad_proto::wire::RunEvent;

/// Writes every event as a line such as `{"body":{"step":{…}}}`, until the run ends or nobody reads any more.
pub async fn events(events: impl Stream<Item = RunEvent>) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        let Ok(line) = serde_json::to_string(&event) else { continue };
        let mut stdout = std::io::stdout().lock();
        if writeln!(stdout, "{line}").and_then(|()| stdout.flush()).is_err() {
            return;
        }
    }
}
