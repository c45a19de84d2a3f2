//! What watchers see: everything that happened so far, then everything that happens, to any number of them.

use std::sync::{Arc, Mutex, PoisonError};

use dyad_proto::wire::RunEvent;
use dyad_proto::wire::run_event::Body;
use futures::Stream;
use futures::stream;
use tokio::sync::watch;

/// The events of the run, shared by the engine (which adds) and the watchers (which follow).
#[derive(Clone, Debug)]
pub struct History {
    // A std mutex: nothing awaits while it is held.
    events: Arc<Mutex<Vec<RunEvent>>>,
    /// Says how many events there are, to wake watchers; a slow one misses none, since it reads from `events`.
    count: watch::Sender<usize>,
}

impl Default for History {
    fn default() -> Self {
        Self { events: Arc::default(), count: watch::Sender::new(0) }
    }
}

impl History {
    /// Adds an event.
    pub fn add(&self, body: Body) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(RunEvent { body: Some(body) });
        self.count.send_replace(events.len());
    }

    /// All events from the first on; ends after [`Body::Ended`].
    pub fn follow(&self) -> impl Stream<Item = RunEvent> + Send + 'static {
        let state = (Some(0), self.events.clone(), self.count.subscribe());
        stream::unfold(state, |(next, events, mut count)| async move {
            let at: usize = next?;
            count.wait_for(|count| *count > at).await.ok()?;
            let event = events.lock().unwrap_or_else(PoisonError::into_inner).get(at).cloned()?;
            let next = (!matches!(event.body, Some(Body::Ended(_)))).then_some(at + 1);
            Some((event, (next, events, count)))
        })
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::wire::{PhaseChanged, RunEnded};
    use futures::StreamExt;

    use super::*;

    fn phase(phase: i32) -> Body {
        Body::Phase(PhaseChanged { phase })
    }

    /// One watcher comes before, one in the middle, one after the end: all see the same.
    #[tokio::test]
    async fn early_and_late_watchers_see_everything_once() {
        let history = History::default();
        let early = tokio::spawn(history.follow().collect::<Vec<_>>());
        history.add(phase(1));
        let mut middle = Box::pin(history.follow());
        let first = middle.next().await.unwrap();
        history.add(phase(2));
        history.add(Body::Ended(RunEnded { failure: None }));
        let late: Vec<RunEvent> = history.follow().collect().await;
        assert_eq!(late.len(), 3);
        assert_eq!(early.await.unwrap(), late);
        assert_eq!(first, late[0]);
        assert_eq!(middle.collect::<Vec<_>>().await, late[1..]);
    }
}
