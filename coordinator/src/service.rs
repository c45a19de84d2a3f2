//! The gRPC surface: decodes, hands over to the engine, encodes. No policy.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use dyad_proto::security::Role;
use dyad_proto::wire::coordinator_server::Coordinator;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{CoordinatorMessage, RunEvent, TrainerMessage, WatchRunRequest};
use dyad_telemetry::RpcCall;
use futures::{Stream, StreamExt, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::handle::{HasEnded, RunHandle};
use crate::observe::run_context;
use crate::run::Event;
use crate::run::membership::TrainerId;
use crate::wire::gate::Gate;
use crate::wire::io::Peer;

type ServerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Passes streams on to the engine.
#[derive(Debug)]
pub struct Service {
    run: RunHandle,
    gate: Gate,
    connections: AtomicU64,
    open: mpsc::Sender<Infallible>,
}

impl Service {
    /// A service in front of a run, and what waits for the end of its calls.
    #[must_use]
    pub fn new(run: RunHandle, gate: Gate) -> (Self, OpenCalls) {
        let (open, calls) = mpsc::channel(1);
        (Self { run, gate, connections: AtomicU64::new(0), open }, OpenCalls(calls))
    }

    fn call<T>(&self, method: &'static str, request: &Request<T>) -> Call {
        let rpc = RpcCall::server(method, request.metadata(), run_context());
        Call { rpc, _open: self.open.clone() }
    }
}

/// The calls of a service that are not over yet.
#[derive(Debug)]
pub struct OpenCalls(mpsc::Receiver<Infallible>);

impl OpenCalls {
    /// Returns once the service is gone and the span of its last call has been written. A connection may close before that: the task that
    /// reads a trainer's stream has a copy of the call.
    pub async fn end(mut self) {
        self.0.recv().await;
    }
}

/// A call that is being answered. The span goes first, then the mark that the call is open.
#[derive(Clone)]
struct Call {
    rpc: RpcCall,
    _open: mpsc::Sender<Infallible>,
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
        let address = peer.as_ref().map(|peer| peer.address);
        let has_ended = |HasEnded| Status::unavailable("the run has ended");
        self.run.connect(id, address, outbox).await.map_err(has_ended)?;
        let call = self.call("dyad.v1.Coordinator/Train", &request);
        tokio::spawn(forward(id, peer, request.into_inner(), self.run.clone(), call.clone()));
        Ok(Response::new(answers(UnboundedReceiverStream::new(outgoing), call)))
    }

    async fn watch_run(
        &self,
        request: Request<WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        self.gate.admit(&request, Role::Launcher)?;
        let call = self.call("dyad.v1.Coordinator/WatchRun", &request);
        let told = call.clone();
        let events = self.run.watch().inspect(move |event| {
            // Whoever has heard this may leave before the stream is read to its end.
            if matches!(event.body, Some(EventBody::Ended(_))) {
                told.rpc.ended(Code::Ok);
            }
        });
        Ok(Response::new(answers(events, call)))
    }
}

/// The answers to a call, which ends well when they are all given. Whoever leaves before has given it up.
fn answers<T: Send + 'static>(
    answers: impl Stream<Item = T> + Send + 'static,
    call: Call,
) -> ServerStream<T> {
    let last = stream::poll_fn(move |_| {
        call.rpc.ended(Code::Ok);
        Poll::Ready(None)
    });
    Box::pin(answers.map(Ok).chain(last))
}

/// Carries a trainer's messages to the engine, and at last the news that its stream has ended, however it did.
async fn forward(
    id: TrainerId,
    peer: Option<Peer>,
    mut incoming: Streaming<TrainerMessage>,
    run: RunHandle,
    call: Call,
) {
    loop {
        let event = match incoming.message().await {
            Ok(Some(TrainerMessage { body: Some(body) })) => Event::Message(id, body),
            Ok(Some(_)) => continue,
            Ok(None) => break,
            Err(status) => {
                // A trainer that was answered to the end breaks its side of the stream off, and the call has ended well by then.
                call.rpc.ended(status.code());
                // Otherwise the stream broke.
                if is_unreadable(&status) {
                    let what = status.message().to_owned();
                    if let Some(peer) = &peer {
                        peer.note("message refused", &what);
                    }
                    let _ = run.send(Event::Unreadable(id, what)).await;
                }
                break;
            }
        };
        if run.send(event).await.is_err() {
            return;
        }
    }
    // Fails only when the engine is gone, and then nobody needs to know.
    let _ = run.send(Event::Closed(id)).await;
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

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn the_end_waits_for_calls_whose_connection_is_closed_already() {
        let (run, _inputs) = RunHandle::new(None);
        let (service, calls) = Service::new(run, Gate::default());
        let call = service.call("dyad.v1.Coordinator/Train", &Request::new(()));
        drop(service);
        let mut end = Box::pin(calls.end());
        assert!((&mut end).now_or_never().is_none());
        drop(call);
        assert!(end.now_or_never().is_some());
    }
}
