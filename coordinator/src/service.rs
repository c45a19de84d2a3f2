//! The gRPC service: decodes messages, hands them to the engine, encodes the answers. Decides nothing.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use dyad_proto::security::ProcessRole;
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
use crate::wire::admission::Admission;
use crate::wire::io::Peer;

type ServerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The gRPC service of one run.
#[derive(Debug)]
pub struct Service {
    run: RunHandle,
    admission: Admission,
    connections: AtomicU64,
    open: mpsc::Sender<Infallible>,
}

impl Service {
    /// A service for a run, and a value that waits for the end of its calls.
    #[must_use]
    pub fn new(run: RunHandle, admission: Admission) -> (Self, OpenCalls) {
        let (open, calls) = mpsc::channel(1);
        (Self { run, admission, connections: AtomicU64::new(0), open }, OpenCalls(calls))
    }

    fn call<T>(&self, method: &'static str, request: &Request<T>) -> Call {
        let rpc = RpcCall::server(method, request.metadata(), run_context());
        Call { rpc, _open: self.open.clone() }
    }
}

/// The open calls of a service.
#[derive(Debug)]
pub struct OpenCalls(mpsc::Receiver<Infallible>);

impl OpenCalls {
    /// Returns once the service is dropped and the span of its last call has been written. A connection may close before that, because the
    /// task that reads a trainer's stream holds a copy of the call.
    pub async fn end(mut self) {
        self.0.recv().await;
    }
}

/// A call in progress. The order of the fields matters: the span is dropped first, then the mark that the call is open.
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
        self.admission.admit(&request, ProcessRole::Trainer)?;
        let peer = request.extensions().get::<Peer>().cloned();
        let id = TrainerId(self.connections.fetch_add(1, Ordering::Relaxed));
        // Unbounded, so that the engine never waits for a slow trainer; the request windows bound its length.
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
        self.admission.admit(&request, ProcessRole::Launcher)?;
        let call = self.call("dyad.v1.Coordinator/WatchRun", &request);
        let told = call.clone();
        let events = self.run.watch().inspect(move |event| {
            // A watcher may leave after this event, before it has read the stream to its end.
            if matches!(event.body, Some(EventBody::Ended(_))) {
                told.rpc.ended(Code::Ok);
            }
        });
        Ok(Response::new(answers(events, call)))
    }
}

/// The answers to a call. The call ends with status OK once all are sent; a client that leaves earlier has cancelled it.
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

/// Passes a trainer's messages to the engine, and at last the event that its stream has ended, for whatever reason.
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
                // No effect if all answers were sent: the call has ended with OK, and the trainer then resets its side of the stream.
                call.rpc.ended(status.code());
                // Any other error means that the connection broke.
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
    // Fails only if the engine is gone, which no longer needs the event.
    let _ = run.send(Event::Closed(id)).await;
}

/// Whether the peer sent bytes that are not a message, or too large a message. Other errors are ends of the stream.
fn is_unreadable(status: &Status) -> bool {
    match status.code() {
        // The error of a broken stream has a source.
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
    async fn end_waits_for_open_calls_of_closed_connections() {
        let (run, _inputs) = RunHandle::new(None);
        let (service, calls) = Service::new(run, Admission::default());
        let call = service.call("dyad.v1.Coordinator/Train", &Request::new(()));
        drop(service);
        let mut end = Box::pin(calls.end());
        assert!((&mut end).now_or_never().is_none());
        drop(call);
        assert!(end.now_or_never().is_some());
    }
}
