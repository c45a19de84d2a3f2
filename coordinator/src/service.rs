//! The gRPC surface: decodes, hands over to the engine, encodes. No policy.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};

use dyad_proto::wire::coordinator_server::Coordinator;
use dyad_proto::wire::{CoordinatorMessage, RunEvent, TrainerMessage, WatchRunRequest};
use dyad_telemetry::RpcCall;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::engine::Input;
use crate::membership::TrainerId;
use crate::observe::run_context;
use crate::run::Event;
use crate::watch::History;

type ServerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Passes streams on to the engine.
#[derive(Debug)]
pub struct Service {
    inputs: mpsc::Sender<Input>,
    history: History,
    connections: AtomicU64,
}

impl Service {
    /// A service in front of the engine that reads `inputs`.
    #[must_use]
    pub fn new(inputs: mpsc::Sender<Input>, history: History) -> Self {
        Self { inputs, history, connections: AtomicU64::new(0) }
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type TrainStream = ServerStream<CoordinatorMessage>;
    type WatchRunStream = ServerStream<RunEvent>;

    async fn train(
        &self,
        request: Request<Streaming<TrainerMessage>>,
    ) -> Result<Response<Self::TrainStream>, Status> {
        let id = TrainerId(self.connections.fetch_add(1, Ordering::Relaxed));
        // Unbounded, so that the engine never waits for a slow trainer; the windows of requests bound what is in it.
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let gone = |_| Status::unavailable("the run has ended");
        self.inputs.send(Input::Connected(id, outbox)).await.map_err(gone)?;
        let call = RpcCall::server("dyad.v1.Coordinator/Train", request.metadata(), run_context());
        tokio::spawn(forward(id, request.into_inner(), self.inputs.clone(), call));
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing).map(Ok))))
    }

    async fn watch_run(
        &self,
        request: Request<WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let call = RpcCall::server("dyad.v1.Coordinator/WatchRun", request.metadata(), run_context());
        let events = self.history.follow().map(move |event| {
            // The call lasts as long as the stream.
            let _ = &call;
            Ok(event)
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// Carries a trainer's messages to the engine, and at last the news that its stream has ended, however it did.
async fn forward(
    id: TrainerId,
    mut incoming: Streaming<TrainerMessage>,
    inputs: mpsc::Sender<Input>,
    mut call: RpcCall,
) {
    loop {
        let message = match incoming.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(status) => {
                call.ended(status.code());
                break;
            }
        };
        if let Some(body) = message.body
            && inputs.send(Input::Event(Event::Message(id, body))).await.is_err()
        {
            return;
        }
    }
    // Fails only when the engine is gone, and then nobody needs to know.
    let _ = inputs.send(Input::Event(Event::Closed(id))).await;
}
