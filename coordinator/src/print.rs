//! `--print-events`: the run's events as JSON lines on standard output, where a container's log keeps them.
//!
//! If the reader is slow, events wait in the history, which keeps the last of them and counts those it drops. A separate thread
//! writes, so a reader that does not read cannot stop the run.

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

/// Lines in the channel to the writing thread.
const AHEAD: usize = 16;

/// Writes the events of a run as lines.
#[derive(Debug)]
pub struct Printer {
    /// Ends when all events are handed over, or when the writer has stopped.
    feeding: JoinHandle<()>,
    /// Lines handed to the writer.
    handed: Arc<AtomicU64>,
    /// Lines written.
    left: Arc<AtomicU64>,
}

impl Printer {
    /// Writes every event to standard output as a line such as `{"body":{"step":{…}}}`, until the run ends or writing fails.
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
        // Not one of the runtime's threads: the runtime would wait for it at shutdown.
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
                // Beats only say every second that nothing is new.
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

    /// Waits at the run's end until all lines are written. Gives up, with a log line, if no line is written within `patience`.
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
                tracing::warn!("standard output is not read: the last events are not printed");
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

    /// More events than any pipe holds, so that the writer has to wait for the reader.
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

    /// JSON does not escape all characters that control a terminal.
    #[tokio::test]
    async fn control_characters_in_names_are_escaped() {
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
    async fn finish_returns_if_the_reader_stalls_or_closes() {
        let (reader, writer) = std::io::pipe().unwrap();
        Printer::onto(events(20_000), writer).finish(Duration::from_millis(20)).await;
        drop(reader);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Printer::onto(events(20_000), writer).finish(Duration::from_millis(20)).await;
    }
}
