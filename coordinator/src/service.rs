//! The gRPC surface: decodes, hands over to the engine, encodes. No policy.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};

use dyad_proto::security::Role;
use dyad_proto::wire::coordinator_server::Coordinator;
use dyad_proto::wire::{CoordinatorMessage, RunEvent, TrainerMessage, WatchRunRequest};
use dyad_telemetry::RpcCall;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::engine::Input;
use crate::membership::TrainerId;
use crate::observe::run_context;
use crate::run::Event;
use crate::watch::History;
use crate::wire::gate::Gate;
use crate::wire::io::Peer;

type ServerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Passes streams on to the engine.
#[derive(Debug)]
pub struct Service {
    inputs: mpsc::Sender<Input>,
    history: History,
    gate: Gate,
    connections: AtomicU64,
}

impl Service {
    /// A service in front of the engine that reads `inputs`.
    #[must_use]
    pub fn new(inputs: mpsc::Sender<Input>, history: History, gate: Gate) -> Self {
        Self { inputs, history, gate, connections: AtomicU64::new(0) }
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
        self.gate.admit(&request, Role::Trainer)?;
        let peer = request.extensions().get::<Peer>().cloned();
        let id = TrainerId(self.connections.fetch_add(1, Ordering::Relaxed));
        // Unbounded, so that the engine never waits for a slow trainer; the windows of requests bound what is in it.
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let gone = |_| Status::unavailable("the run has ended");
        let address = peer.as_ref().map(|peer| peer.address);
        self.inputs.send(Input::Connected(id, address, outbox)).await.map_err(gone)?;
        let call = RpcCall::server("dyad.v1.Coordinator/Train", request.metadata(), run_context());
        tokio::spawn(forward((id, peer), request.into_inner(), self.inputs.clone(), call));
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing).map(Ok))))
    }

    async fn watch_run(
        &self,
        request: Request<WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        self.gate.admit(&request, Role::Launcher)?;
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
    (id, peer): (TrainerId, Option<Peer>),
    mut incoming: Streaming<TrainerMessage>,
    inputs: mpsc::Sender<Input>,
    mut call: RpcCall,
) {
    loop {
        let event = match incoming.message().await {
            Ok(Some(TrainerMessage { body: Some(body) })) => Event::Message(id, body),
            Ok(Some(_)) => continue,
            Ok(None) => break,
            Err(status) => {
                call.ended(status.code());
                // Otherwise the stream broke.
                if is_unreadable(&status) {
                    let what = status.message().to_owned();
                    if let Some(peer) = &peer {
                        peer.note("message refused", &what);
                    }
                    let _ = inputs.send(Input::Event(Event::Unreadable(id, what))).await;
                }
                break;
            }
        };
        if inputs.send(Input::Event(event)).await.is_err() {
            return;
        }
    }
    // Fails only when the engine is gone, and then nobody needs to know.
    let _ = inputs.send(Input::Event(Event::Closed(id))).await;
}

/// The peer sent bytes that are no message, or a message beyond all measure; other errors are ends of the stream.
fn is_unreadable(status: &Status) -> bool {
    match status.code() {
        // A stream that breaks carries the error that broke it.
        Code::Internal => std::error::Error::source(status).is_none(),
        Code::OutOfRange | Code::Unimplemented => true,
        _ => false,
    }
}
