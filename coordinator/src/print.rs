//! `--print-events`: the run's events as JSON lines on standard output, where a container's log keeps them.
//!
//! Events of a reader that is slow wait in the history, which keeps the last of them and counts what it leaves out. They leave on a thread of their own,
//! so a reader that stands still stops no run.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dyad_proto::plain;
use dyad_proto::wire::RunEvent;
use dyad_proto::wire::run_event::Body;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Lines between the history and the stream.
const AHEAD: usize = 16;

/// Writes events while it lives.
#[derive(Debug)]
pub struct Printer {
    /// Ends when all events are handed over, or when nobody reads any more.
    feeding: JoinHandle<()>,
    /// Lines that were handed over and that have left.
    handed: Arc<AtomicU64>,
    left: Arc<AtomicU64>,
}

impl Printer {
    /// Writes every event to standard output as a line such as `{"body":{"step":{…}}}`, until the run ends or nobody reads any more.
    pub fn start(events: impl Stream<Item = RunEvent> + Send + 'static) -> Self {
        Self::onto(events, std::io::stdout())
    }

    fn onto(
        events: impl Stream<Item = RunEvent> + Send + 'static,
        mut out: impl Write + Send + 'static,
    ) -> Self {
        let (lines, mut taken) = mpsc::channel::<String>(AHEAD);
        let (handed, left) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let written = Arc::clone(&left);
        // Not one of the runtime's threads, which would be waited for.
        let writer = std::thread::Builder::new().name("events".into()).spawn(move || {
            while let Some(line) = taken.blocking_recv() {
                if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                    return;
                }
                written.fetch_add(1, Ordering::SeqCst);
            }
        });
        if let Err(error) = writer {
            tracing::warn!("events are not printed: {error}");
        }
        let count = Arc::clone(&handed);
        let feeding = tokio::spawn(async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                // A log need not be told every second that there is nothing new.
                if matches!(event.body, Some(Body::Beat(_))) {
                    continue;
                }
                let Ok(line) = serde_json::to_string(&event) else { continue };
                if lines.send(plain::json(&line).into_owned()).await.is_err() {
                    return;
                }
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { feeding, handed, left }
    }

    /// At the run's end: waits until all have left, as long as one does within `patience`. What nobody reads is told in the log.
    pub async fn finish(self, patience: Duration) {
        let mut before = None;
        loop {
            let left = self.left.load(Ordering::SeqCst);
            if self.feeding.is_finished() && left == self.handed.load(Ordering::SeqCst) {
                return;
            }
            if before.is_some_and(|(count, since): (u64, tokio::time::Instant)| {
                count == left && since.elapsed() >= patience
            }) {
                tracing::warn!("nobody reads standard output: the last events are not printed");
                return;
            }
            if before.is_none_or(|(count, _)| count != left) {
                before = Some((left, tokio::time::Instant::now()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use dyad_proto::wire::run_event::Body;
    use dyad_proto::wire::{PhaseChanged, RunEvent, TrainerJoined};

    use super::*;

    fn events(count: usize) -> impl Stream<Item = RunEvent> + Send + 'static {
        let event = RunEvent { body: Some(Body::Phase(PhaseChanged { phase: 1 })) };
        futures::stream::iter(std::iter::repeat_n(event, count))
    }

    /// More events than any pipe holds, for a reader that only begins once the run has ended.
    #[tokio::test]
    async fn a_slow_reader_gets_every_event() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let printer = Printer::onto(events(20_000), writer);
        let reading = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text.lines().count()
        });
        printer.finish(Duration::from_secs(60)).await;
        assert_eq!(reading.await.unwrap(), 20_000);
    }

    /// JSON itself escapes less than terminals obey.
    #[tokio::test]
    async fn names_of_others_reach_no_terminal_with_what_it_obeys() {
        let name = "node\u{9b}31m\u{202e}\u{7f}\u{2028}";
        let joined = TrainerJoined { name: name.to_owned(), ..TrainerJoined::default() };
        let event = RunEvent { body: Some(Body::Joined(joined)) };
        let (mut reader, writer) = std::io::pipe().unwrap();
        Printer::onto(futures::stream::iter([event]), writer).finish(Duration::from_secs(60)).await;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.trim_end().chars().all(|c| c.is_ascii() && !c.is_control()), "{text:?}");
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["body"]["joined"]["name"], name);
    }

    #[tokio::test]
    async fn a_reader_that_stands_still_or_goes_away_stops_nobody() {
        let (reader, writer) = std::io::pipe().unwrap();
        Printer::onto(events(20_000), writer).finish(Duration::from_millis(20)).await;
        drop(reader);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Printer::onto(events(20_000), writer).finish(Duration::from_millis(20)).await;
    }
}
