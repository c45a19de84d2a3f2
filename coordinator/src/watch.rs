//! The events of a run for any number of watchers: first the events so far, then every new one.
//!
//! - CRD-W1: memory does not grow with the run. It holds all events that occur once, and the last [`RECENT`] of steps, evaluations,
//!   checkpoints, reference scores and the phases between them. Earlier steps and evaluations come from the metrics files.
//! - CRD-W2: a late or slow watcher is told how many events it does not get.

mod rows;

use std::collections::VecDeque;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{Beat, RunEvent, Skipped};
use futures::Stream;
use futures::stream;
use tokio::sync::watch;

use rows::{MetricsReader, Position};

/// Most events kept of the kinds that occur without limit; they take less than two MiB.
pub const RECENT: usize = 1000;
/// Most rows read from the metrics files at a time.
const ROWS: usize = 256;

/// The events of the run, shared by the engine (which adds) and the watchers (which follow).
#[derive(Clone, Debug)]
pub struct History {
    // A std mutex: nothing awaits while it is held.
    kept: Arc<Mutex<KeptEvents>>,
    /// The run's output folder, if it has one.
    dir: Option<PathBuf>,
    /// Wakes watchers; they read the events from `kept`.
    news: watch::Sender<News>,
}

/// Number of events and beats so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct News {
    events: u64,
    beats: u64,
}

/// The kept events, each with its number among all events.
#[derive(Debug, Default)]
struct KeptEvents {
    /// Number of events so far.
    count: u64,
    /// Events that occur once; never dropped.
    lasting: VecDeque<KeptEvent>,
    /// The last [`RECENT`] of the other events.
    recent: VecDeque<KeptEvent>,
    /// Position of the last step or evaluation so far.
    position: Option<Position>,
    /// Positions of the first and last step or evaluation that are no longer in memory.
    dropped: Option<(Position, Position)>,
}

/// A kept event.
#[derive(Clone, Debug)]
struct KeptEvent {
    place: u64,
    /// Position of the last step or evaluation up to this event.
    position: Option<Position>,
    event: RunEvent,
}

impl KeptEvents {
    fn add(&mut self, body: Body) {
        let many = matches!(body, Body::Step(_) | Body::Evaluation(_) | Body::Checkpoint(_) | Body::Reference(_) | Body::EarlyStopping(_))
                // Every evaluation and every checkpoint begins a phase.
                || matches!(body, Body::Phase(_)) && !self.recent.is_empty();
        if many && self.recent.len() == RECENT {
            let oldest = self.recent.pop_front().and_then(|told| Position::of(&told.event.body?));
            if let Some(last) = oldest {
                self.dropped = Some((self.dropped.map_or(last, |(first, _)| first), last));
            }
        }
        self.position = Position::of(&body).or(self.position);
        let told =
            KeptEvent { place: self.count, position: self.position, event: RunEvent { body: Some(body) } };
        if many { &mut self.recent } else { &mut self.lasting }.push_back(told);
        self.count += 1;
    }

    /// The first kept event whose number is at least `from`.
    fn next(&self, from: u64) -> Option<&KeptEvent> {
        let first = |events: &VecDeque<KeptEvent>| events.partition_point(|told| told.place < from);
        let lasting = self.lasting.get(first(&self.lasting));
        let recent = self.recent.get(first(&self.recent));
        [lasting, recent].into_iter().flatten().min_by_key(|told| told.place)
    }

    /// The range of steps and evaluations before an event that are no longer in memory.
    fn dropped_before(&self, told: &KeptEvent) -> Option<RangeInclusive<Position>> {
        let (first, last) = self.dropped?;
        let last = told.position?.min(last);
        (first <= last).then_some(first..=last)
    }
}

/// State of a watcher.
struct Watcher {
    /// Number of the next event; `None` after the last one.
    next: Option<u64>,
    beats: u64,
    /// Position of the last step or evaluation shown to it.
    seen: Option<Position>,
    /// The metrics files, open while dropped events are read from them.
    rows: Option<MetricsReader>,
    /// Events read from rows and not shown yet.
    read: VecDeque<RunEvent>,
    /// Number of events from `next` on that were shown from rows.
    restored: u64,
    history: History,
    news: watch::Receiver<News>,
}

impl Default for History {
    fn default() -> Self {
        Self { kept: Arc::default(), dir: None, news: watch::Sender::new(News::default()) }
    }
}

impl History {
    /// The history of a run that writes its metrics files to a folder.
    #[must_use]
    pub fn of(dir: PathBuf) -> Self {
        Self { dir: Some(dir), ..Self::default() }
    }

    /// Adds an event.
    pub fn add(&self, body: Body) {
        let mut kept = self.kept();
        kept.add(body);
        self.news.send_modify(|news| news.events = kept.count);
    }

    /// Sends a beat to the current watchers: the coordinator is alive.
    pub fn beat(&self) {
        self.news.send_modify(|news| news.beats += 1);
    }

    /// Calls `show` with every kept event, in order.
    pub fn for_each(&self, mut show: impl FnMut(&Body)) {
        let kept = self.kept();
        let mut next = 0;
        while let Some(told) = kept.next(next) {
            next = told.place + 1;
            told.event.body.iter().for_each(&mut show);
        }
    }

    /// The events so far, then all later ones; ends after [`Body::Ended`].
    pub fn follow(&self) -> impl Stream<Item = RunEvent> + Send + 'static {
        let news = self.news.subscribe();
        let beats = news.borrow().beats;
        let watcher = Watcher {
            next: Some(0),
            beats,
            seen: None,
            rows: None,
            read: VecDeque::new(),
            restored: 0,
            history: self.clone(),
            news,
        };
        stream::unfold(watcher, |mut watcher| async move {
            let event = watcher.next().await?;
            Some((event, watcher))
        })
    }

    /// Number of kept events.
    #[must_use]
    pub fn size(&self) -> usize {
        let kept = self.kept();
        kept.lasting.len() + kept.recent.len()
    }

    fn kept(&self) -> MutexGuard<'_, KeptEvents> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher {
    async fn next(&mut self) -> Option<RunEvent> {
        loop {
            let (at, beats) = (self.next?, self.beats);
            if let Some(event) = self.read.pop_front() {
                self.restored += 1;
                return Some(self.shown(event));
            }
            let news = *self.news.wait_for(|news| news.events > at || news.beats > beats).await.ok()?;
            // A beat is sent only if there is no event.
            self.beats = news.beats;
            if news.events <= at {
                return Some(RunEvent { body: Some(Body::Beat(Beat {})) });
            }
            let (told, dropped) = {
                let kept = self.history.kept();
                let told = kept.next(at)?.clone();
                let dropped = (told.place > at).then(|| kept.dropped_before(&told)).flatten();
                (told, dropped)
            };
            if told.place == at {
                self.next = (!matches!(told.event.body, Some(Body::Ended(_)))).then_some(at + 1);
                return Some(self.shown(told.event));
            }
            if let Some(dropped) = dropped {
                self.read_rows(dropped).await;
            }
            if self.read.is_empty() {
                let skipped = (told.place - at).saturating_sub(self.restored);
                (self.next, self.restored, self.rows) = (Some(told.place), 0, None);
                if skipped > 0 {
                    return Some(RunEvent { body: Some(Body::Skipped(Skipped { events: skipped })) });
                }
            }
        }
    }

    fn shown(&mut self, event: RunEvent) -> RunEvent {
        self.seen = event.body.as_ref().and_then(Position::of).or(self.seen);
        event
    }

    /// Reads the next rows of the range that this watcher was not shown. If reading fails, the events count as skipped.
    async fn read_rows(&mut self, range: RangeInclusive<Position>) {
        let Some(dir) = self.history.dir.clone() else { return };
        let (rows, seen) = (self.rows.take(), self.seen);
        // Reading may block for long.
        let reading = tokio::task::spawn_blocking(move || -> io::Result<_> {
            let mut rows = rows.map_or_else(|| MetricsReader::open(&dir), Ok)?;
            let read = rows.take(&range, seen, ROWS)?;
            Ok((rows, read))
        });
        match reading.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok((rows, read)) => (self.rows, self.read) = (Some(rows), read.into()),
            Err(error) => tracing::warn!("earlier steps cannot be read again for a watcher: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use dyad_proto::wire::{EvaluationMetrics, PhaseChanged, RunEnded, StepMetrics, TrainerJoined};
    use futures::StreamExt;

    use super::*;

    fn phase(phase: i32) -> Body {
        Body::Phase(PhaseChanged { phase })
    }

    fn step(step: u64) -> Body {
        Body::Step(StepMetrics { step, ..StepMetrics::default() })
    }

    fn bodies(events: Vec<RunEvent>) -> Vec<Body> {
        events.into_iter().filter_map(|event| event.body).collect()
    }

    /// Watchers that come before, during and after the events see the same.
    #[tokio::test]
    async fn early_and_late_watchers_see_everything_once() {
        let history = History::default();
        let early = tokio::spawn(history.follow().collect::<Vec<_>>());
        history.add(phase(1));
        let mut middle = Box::pin(history.follow());
        let first = middle.next().await.unwrap();
        history.add(step(1));
        history.add(phase(2));
        history.add(Body::Ended(RunEnded { failure: None }));
        let late: Vec<RunEvent> = history.follow().collect().await;
        assert_eq!(late.len(), 4);
        assert_eq!(early.await.unwrap(), late);
        assert_eq!(first, late[0]);
        assert_eq!(middle.collect::<Vec<_>>().await, late[1..]);
    }

    #[tokio::test]
    async fn kept_events_are_bounded_and_dropped_events_are_counted() {
        let history = History::default();
        let mut slow = Box::pin(history.follow());
        history.add(phase(1));
        let steps = 10 * RECENT as u64;
        (1..=steps).for_each(|at| history.add(step(at)));
        (0..RECENT / 2).for_each(|_| history.add(phase(6)));
        history.add(Body::Ended(RunEnded { failure: None }));
        assert_eq!(history.size(), RECENT + 2);
        let late = bodies(history.follow().collect().await);
        let left_out = steps - RECENT as u64 / 2;
        assert_eq!(late[..2], [phase(1), Body::Skipped(Skipped { events: left_out })]);
        assert_eq!(late[2..2 + RECENT / 2], (left_out + 1..=steps).map(step).collect::<Vec<_>>());
        assert!(late[2 + RECENT / 2..2 + RECENT].iter().all(|body| *body == phase(6)));
        assert_eq!(late[2 + RECENT..], [Body::Ended(RunEnded { failure: None })]);
        let first = slow.next().await.unwrap();
        assert_eq!((first.body.unwrap(), bodies(slow.collect().await)), (phase(1), late[1..].to_vec()));
    }

    fn row(step: u64) -> Body {
        let values = HashMap::from([("step".into(), step as f64), ("loss".into(), 0.1 * step as f64)]);
        Body::Step(StepMetrics { step, values })
    }

    fn evaluation(step: u64) -> Body {
        let values = HashMap::from([("eval_loss".into(), 0.3 * step as f64)]);
        Body::Evaluation(EvaluationMetrics { step, values })
    }

    /// A history and its folder, with one row for each step of `rows` and an evaluation after every tenth step.
    fn with_rows(rows: RangeInclusive<u64>) -> (tempfile::TempDir, History) {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        let number = |factor: f64, at: u64| factor * at as f64;
        let steps = rows.clone().map(|at| format!("{{\"step\":{at},\"loss\":{}}}\n", number(0.1, at)));
        write("metrics.jsonl", steps.collect());
        let evaluations = rows.filter(|at| at % 10 == 0);
        let evaluations =
            evaluations.map(|at| format!("{{\"step\":{at},\"eval_loss\":{}}}\n", number(0.3, at)));
        write("eval_metrics.jsonl", evaluations.collect());
        let history = History::of(dir.path().to_owned());
        (dir, history)
    }

    /// Adds the events of these steps to the history, and returns them.
    fn tell(history: &History, steps: RangeInclusive<u64>) -> Vec<Body> {
        let mut told = Vec::new();
        for at in steps {
            told.push(row(at));
            if at % 10 == 0 {
                told.push(evaluation(at));
            }
        }
        told.iter().for_each(|body| history.add(body.clone()));
        told
    }

    /// One watcher comes after 5,000 steps, one stops reading after its first event, one reads 700 events and then pauses. The run was
    /// resumed after step 40, so the rows of earlier steps must not be shown.
    #[tokio::test]
    async fn late_and_slow_watchers_get_every_step_and_evaluation_from_the_files() {
        let (_dir, history) = with_rows(1..=5000);
        history.add(phase(1));
        let mut slow = Box::pin(history.follow());
        assert_eq!(slow.next().await.unwrap().body.unwrap(), phase(1));
        let mut told = tell(&history, 41..=700);
        let mut reader = Box::pin(history.follow());
        let mut read = Vec::new();
        for _ in 0..700 {
            read.push(reader.next().await.unwrap().body.unwrap());
        }
        told.extend(tell(&history, 701..=5000));
        let ended = Body::Ended(RunEnded { failure: None });
        history.add(ended.clone());
        told.push(ended);
        assert_eq!(bodies(slow.collect().await), told);
        let whole = [vec![phase(1)], told].concat();
        assert_eq!(bodies(history.follow().collect().await), whole);
        read.extend(bodies(reader.collect().await));
        assert_eq!(read, whole);
        assert_eq!(history.size(), RECENT + 2);
    }

    #[tokio::test]
    async fn rows_missing_in_the_files_are_counted_and_other_events_keep_their_order() {
        // The rows of steps 1 to 300 are missing.
        let (_dir, history) = with_rows(301..=5000);
        let told = tell(&history, 1..=400);
        let joined = Body::Joined(TrainerJoined::default());
        history.add(joined.clone());
        tell(&history, 401..=5000);
        history.add(Body::Ended(RunEnded { failure: None }));
        let late = bodies(history.follow().collect().await);
        assert_eq!(late[..110], told[330..]);
        assert_eq!(late[110..112], [Body::Skipped(Skipped { events: 330 }), joined]);
        assert_eq!(late[112], row(401));
        assert_eq!(late.len(), 110 + 2 + 5060 + 1);
    }

    #[tokio::test]
    async fn null_in_a_row_is_read_as_nan() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("metrics.jsonl"), "{\"step\":1,\"loss\":null}\n").unwrap();
        let history = History::of(dir.path().to_owned());
        (1..=1 + RECENT as u64).for_each(|at| history.add(step(at)));
        let Some(Body::Step(first)) = Box::pin(history.follow()).next().await.unwrap().body else { panic!() };
        assert_eq!((first.step, first.values["loss"].is_nan()), (1, true));
    }

    #[tokio::test]
    async fn beats_reach_current_watchers_and_are_not_kept() {
        let history = History::default();
        let mut watcher = Box::pin(history.follow());
        (0..10_000).for_each(|_| history.beat());
        assert_eq!(watcher.next().await.unwrap().body, Some(Body::Beat(Beat {})));
        history.add(Body::Ended(RunEnded { failure: None }));
        assert_eq!(bodies(watcher.collect().await), [Body::Ended(RunEnded { failure: None })]);
        assert_eq!((history.size(), history.follow().count().await), (1, 1));
    }
}
