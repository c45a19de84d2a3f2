//! Serves a complete run that a scheduler starts again together with its trainers: tells each trainer that there is nothing to do. The
//! trainers then leave as they do after their work.

use std::collections::{HashMap, HashSet};

use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{CoordinatorMessage, Finish};
use tokio::sync::mpsc;

use crate::engine::Input;
use crate::run::Event;

/// Returns once this many trainers have reported that they have finished.
pub async fn tell(mut inputs: mpsc::Receiver<Input>, trainers: u32) {
    let (mut outboxes, mut names) = (HashMap::new(), HashMap::new());
    let mut left = HashSet::new();
    while left.len() < trainers as usize
        && let Some(input) = inputs.recv().await
    {
        let event = match input {
            Input::Event(event) => *event,
            Input::Connected(id, _, outbox) => {
                outboxes.insert(id, outbox);
                continue;
            }
        };
        match event {
            Event::Message(id, Up::Hello(hello)) => {
                names.insert(id, hello.name);
                if let Some(outbox) = outboxes.get(&id) {
                    // Fails only if the trainer is gone. It may connect again, and the caller limits the wait.
                    let _ = outbox.send(CoordinatorMessage { body: Some(Down::Finish(Finish::default())) });
                }
            }
            Event::Message(id, Up::Finished(_)) => {
                left.extend(names.remove(&id));
                outboxes.remove(&id);
            }
            Event::Closed(id) => drop(outboxes.remove(&id)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::wire::{Finished, Hello};

    use super::*;
    use crate::run::membership::TrainerId;

    #[tokio::test]
    async fn tell_sends_finish_to_every_trainer_and_waits_for_reconnects() {
        let (inputs, events) = mpsc::channel(64);
        let telling = tokio::spawn(tell(events, 2));
        let mut outgoing = Vec::new();
        // Three connections of two trainers.
        for (id, name) in ["node0", "node1", "node1"].into_iter().enumerate() {
            let (outbox, told) = mpsc::unbounded_channel();
            outgoing.push(told);
            let hello = Hello { name: name.into(), ..Hello::default() };
            let id = TrainerId(id as u64);
            inputs.send(Input::Connected(id, None, outbox)).await.unwrap();
            inputs.send(Input::Event(Box::new(Event::Message(id, Up::Hello(hello))))).await.unwrap();
            // The second connection breaks before its trainer has reported that it has finished.
            let last =
                if id.0 == 1 { Event::Closed(id) } else { Event::Message(id, Up::Finished(Finished {})) };
            inputs.send(Input::Event(Box::new(last))).await.unwrap();
        }
        telling.await.unwrap();
        for mut told in outgoing {
            let message = told.recv().await.unwrap();
            assert!(matches!(message.body, Some(Down::Finish(_))));
            assert!(told.recv().await.is_none());
        }
    }
}
