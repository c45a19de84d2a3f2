//! What watchers see: what happened so far, then everything that happens, to any number of them.
//!
//! - W-1: what is kept does not grow with the run: everything said once, and the last [`RECENT`] of steps, evaluations, checkpoints,
//!   reference scores and the phases between them. What they said of numbers is in the metrics files.
//! - W-2: a watcher that comes late, or is slow, is told how many events it does not get.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{Beat, RunEvent, Skipped};
use futures::Stream;
use futures::stream;
use tokio::sync::watch;

/// Events that are kept of those that a run may have any number of: less than two MiB.
pub const RECENT: usize = 1000;

/// The events of the run, shared by the engine (which adds) and the watchers (which follow).
#[derive(Clone, Debug)]
pub struct History {
    // A std mutex: nothing awaits while it is held.
    kept: Arc<Mutex<Kept>>,
    /// Wakes watchers; a slow one reads from `kept` what it has missed.
    news: watch::Sender<News>,
}

/// How much there is to be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct News {
    events: u64,
    beats: u64,
}

/// What is kept, by place among all events.
#[derive(Debug, Default)]
struct Kept {
    /// Events so far.
    count: u64,
    lasting: VecDeque<(u64, RunEvent)>,
    recent: VecDeque<(u64, RunEvent)>,
}

impl Kept {
    fn add(&mut self, body: Body) {
        let many = matches!(body, Body::Step(_) | Body::Evaluation(_) | Body::Checkpoint(_) | Body::Reference(_))
                // Every evaluation and every checkpoint is a phase of its own.
                || matches!(body, Body::Phase(_)) && !self.recent.is_empty();
        let events = if many { &mut self.recent } else { &mut self.lasting };
        if many && events.len() == RECENT {
            events.pop_front();
        }
        events.push_back((self.count, RunEvent { body: Some(body) }));
        self.count += 1;
    }

    /// The first event that is kept from a place on, and its place.
    fn next(&self, from: u64) -> Option<(u64, RunEvent)> {
        let first = |events: &VecDeque<(u64, RunEvent)>| {
            events.get(events.partition_point(|(place, _)| *place < from)).map(|(place, _)| *place)
        };
        let (lasting, recent) = (first(&self.lasting), first(&self.recent));
        let events = match (lasting, recent) {
            (Some(lasting), Some(recent)) if lasting < recent => &self.lasting,
            (_, Some(_)) => &self.recent,
            _ => &self.lasting,
        };
        events.get(events.partition_point(|(place, _)| *place < from)).cloned()
    }
}

/// How far a watcher is.
struct Watcher {
    /// None after the last event.
    next: Option<u64>,
    beats: u64,
    history: History,
    news: watch::Receiver<News>,
}

impl Default for History {
    fn default() -> Self {
        Self { kept: Arc::default(), news: watch::Sender::new(News::default()) }
    }
}

impl History {
    /// Adds an event.
    pub fn add(&self, body: Body) {
        let mut kept = self.kept();
        kept.add(body);
        self.news.send_modify(|news| news.events = kept.count);
    }

    /// Shows those who watch now that there is somebody who could add one.
    pub fn beat(&self) {
        self.news.send_modify(|news| news.beats += 1);
    }

    /// What is kept of the events so far, and all that come; ends after [`Body::Ended`].
    pub fn follow(&self) -> impl Stream<Item = RunEvent> + Send + 'static {
        let news = self.news.subscribe();
        let beats = news.borrow().beats;
        let watcher = Watcher { next: Some(0), beats, history: self.clone(), news };
        stream::unfold(watcher, |mut watcher| async move {
            let event = watcher.next().await?;
            Some((event, watcher))
        })
    }

    /// How many events are kept.
    #[must_use]
    pub fn size(&self) -> usize {
        let kept = self.kept();
        kept.lasting.len() + kept.recent.len()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher {
    async fn next(&mut self) -> Option<RunEvent> {
        let (at, beats) = (self.next?, self.beats);
        let news = *self.news.wait_for(|news| news.events > at || news.beats > beats).await.ok()?;
        // Events first: a beat is for those who have nothing to hear.
        self.beats = news.beats;
        if news.events <= at {
            return Some(RunEvent { body: Some(Body::Beat(Beat {})) });
        }
        let (place, event) = self.history.kept().next(at)?;
        if place > at {
            self.next = Some(place);
            return Some(RunEvent { body: Some(Body::Skipped(Skipped { events: place - at })) });
        }
        self.next = (!matches!(event.body, Some(Body::Ended(_)))).then_some(at + 1);
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::wire::{PhaseChanged, RunEnded, StepMetrics};
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

    /// One watcher comes before, one in the middle, one after the end: all see the same.
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
    async fn what_is_kept_does_not_grow_with_the_steps_and_what_is_not_is_counted() {
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

    #[tokio::test]
    async fn beats_reach_those_who_watch_and_are_kept_for_nobody() {
        let history = History::default();
        let mut watcher = Box::pin(history.follow());
        (0..10_000).for_each(|_| history.beat());
        assert_eq!(watcher.next().await.unwrap().body, Some(Body::Beat(Beat {})));
        history.add(Body::Ended(RunEnded { failure: None }));
        assert_eq!(bodies(watcher.collect().await), [Body::Ended(RunEnded { failure: None })]);
        assert_eq!((history.size(), history.follow().count().await), (1, 1));
    }
}
