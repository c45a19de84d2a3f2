//! The interface to a run for gRPC, HTTP, signals and the printer. They know this handle only, neither each other nor the state machine.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use dyad_proto::Fault;
use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{ErrorCode, Phase, RunEvent};
use futures::Stream;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::engine::{Input, Outbox};
use crate::run::Event;
use crate::run::membership::TrainerId;
use crate::watch::History;

/// Capacity of the channel to the engine; if it is full, streams wait.
const INPUTS: usize = 1024;

/// Error: the run has ended and takes no more inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HasEnded;

/// Watches a run, sends events to it, and ends it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RunHandle {
    inputs: mpsc::Sender<Input>,
    history: History,
}

impl RunHandle {
    /// A handle, and the receiver for the engine. `dir` is the folder of the metrics files, if there is one.
    #[must_use]
    pub fn new(dir: Option<PathBuf>) -> (Self, mpsc::Receiver<Input>) {
        let (inputs, events) = mpsc::channel(INPUTS);
        (Self { inputs, history: dir.map_or_else(History::default, History::of) }, events)
    }

    /// Registers a trainer's connection; the engine puts messages to the trainer into `outbox`.
    pub async fn connect(
        &self,
        id: TrainerId,
        peer: Option<SocketAddr>,
        outbox: Outbox,
    ) -> Result<(), HasEnded> {
        self.inputs.send(Input::Connected(id, peer, outbox)).await.map_err(|_| HasEnded)
    }

    /// Sends an event to the run.
    pub async fn send(&self, event: Event) -> Result<(), HasEnded> {
        self.inputs.send(Input::Event(Box::new(event))).await.map_err(|_| HasEnded)
    }

    /// Ends the run after the step in progress, with a checkpoint. `why` appears in the run's final message.
    pub async fn drain(&self, why: &str) -> Result<(), HasEnded> {
        self.send(Event::Drain(why.to_owned())).await
    }

    /// Ends the run at once.
    pub async fn stop(&self, fault: Fault) -> Result<(), HasEnded> {
        self.send(Event::Fault(fault)).await
    }

    /// The events so far, then all later ones until the end.
    pub fn watch(&self) -> impl Stream<Item = RunEvent> + Send + 'static {
        self.history.follow()
    }

    /// The current status of the run.
    #[must_use]
    pub fn status(&self) -> RunStatus {
        let mut status = RunStatus::default();
        self.history.for_each(|body| status.add(body));
        status
    }

    /// The history to which the engine adds events.
    pub(crate) fn history(&self) -> History {
        self.history.clone()
    }
}

/// The status of a run. Values that are not known yet are absent. It holds no paths and no error texts, because it is served without
/// authentication.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RunStatus {
    /// Name of the run.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub run_id: String,
    /// Number of trainers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub world_size: Option<u32>,
    /// `loading`, `measuring`, `rendezvous`, `training`, `evaluating`, `saving`; at the end `succeeded` or `failed`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub phase: String,
    /// Optimizer steps done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Optimizer steps of the whole run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_steps: Option<u64>,
    /// The newest row of `metrics.jsonl`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// The newest row of `eval_metrics.jsonl`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub eval_metrics: BTreeMap<String, f64>,
    /// Optimizer steps that the newest checkpoint holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_step: Option<u64>,
    /// With early stopping: optimizer steps before the best evaluation so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_step: Option<u64>,
    /// Whether evaluations no longer improved, so that the run ended before its last step. Absent without early stopping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopped: Option<bool>,
    /// Code of the error that ended the run: `ERROR_CODE_…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<&'static str>,
}

impl RunStatus {
    fn add(&mut self, body: &Body) {
        match body {
            Body::Started(started) => {
                self.run_id.clone_from(&started.run_id);
                self.world_size = Some(started.world_size);
            }
            Body::Data(data) => {
                self.total_steps = Some(data.total_steps);
                self.step = Some(data.start_step);
            }
            Body::Phase(phase) => {
                let name = phase.phase().as_str_name();
                let name = name.strip_prefix("PHASE_").unwrap_or(name);
                self.phase =
                    if phase.phase() == Phase::Unspecified { String::new() } else { name.to_lowercase() };
            }
            Body::Step(row) => {
                self.step = Some(row.step);
                self.metrics = row.values.clone().into_iter().collect();
            }
            Body::Evaluation(row) => self.eval_metrics = row.values.clone().into_iter().collect(),
            Body::Checkpoint(checkpoint) => self.checkpoint_step = Some(checkpoint.step),
            Body::EarlyStopping(stopping) => {
                self.best_step = Some(stopping.best_step);
                self.early_stopped = Some(stopping.stops);
            }
            Body::Ended(ended) => {
                self.phase = if ended.failure.is_some() { "failed" } else { "succeeded" }.into();
                self.error_code = ended
                    .failure
                    .as_ref()
                    .map(|failure| ErrorCode::try_from(failure.code).unwrap_or_default().as_str_name());
            }
            Body::Joined(_)
            | Body::Model(_)
            | Body::Reference(_)
            | Body::Arrived(_)
            | Body::Beat(_)
            | Body::Skipped(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::wire::{
        CheckpointReport, DataReport, Failure, PhaseChanged, RunEnded, RunStarted, StepMetrics,
    };
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn status_follows_the_events_and_send_fails_after_the_end() {
        let (run, inputs) = RunHandle::new(None);
        assert_eq!(serde_json::to_string(&run.status()).unwrap(), "{}");
        let history = run.history();
        history.add(Body::Started(RunStarted { run_id: "r".into(), world_size: 2, ..RunStarted::default() }));
        history.add(Body::Data(DataReport { total_steps: 9, start_step: 4, ..DataReport::default() }));
        history.add(Body::Phase(PhaseChanged { phase: Phase::Training.into() }));
        assert_eq!((run.status().step, run.status().phase.as_str()), (Some(4), "training"));
        // More steps than the history keeps: the status shows the newest.
        for step in 5..3000 {
            let values = [("loss".to_owned(), step as f64)].into_iter().collect();
            history.add(Body::Step(StepMetrics { step, values }));
        }
        let checkpoint =
            CheckpointReport { step: 2999, path: "/secret".into(), ..CheckpointReport::default() };
        history.add(Body::Checkpoint(checkpoint));
        let status = run.status();
        assert_eq!(
            (status.step, status.metrics["loss"], status.checkpoint_step),
            (Some(2999), 2999.0, Some(2999))
        );
        let failure =
            Failure { code: ErrorCode::InvalidInput.into(), message: "/secret".into(), ..Failure::default() };
        history.add(Body::Ended(RunEnded { failure: Some(failure) }));
        let told = serde_json::to_string(&run.status()).unwrap();
        assert!(told.contains(r#""phase":"failed","#) && told.contains("ERROR_CODE_INVALID_INPUT"), "{told}");
        assert!(told.contains(r#""run_id":"r","world_size":2"#) && !told.contains("secret"), "{told}");
        assert!(run.watch().count().await > 1000);
        drop(inputs);
        assert_eq!(run.drain("a test").await, Err(HasEnded));
    }
}
