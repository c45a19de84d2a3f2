//! Stream of the run's events from the coordinator.

use dyad_proto::security::client::root_cause;
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{RunEvent, WatchRunRequest};
use dyad_proto::{Fault, MAX_MESSAGE_BYTES};
use dyad_telemetry::RpcCall;
use tonic::{Code, Streaming};

use crate::security::Security;

/// The event stream, and the tracing span of its RPC.
#[derive(Debug)]
pub(crate) struct Events {
    stream: Streaming<RunEvent>,
    call: RpcCall,
}

impl Events {
    /// Connects to the coordinator at `address` and subscribes to its events.
    pub(crate) async fn of(security: &Security, address: &str) -> Result<Self, Fault> {
        let failed = |reason: String| Fault::failed(format!("cannot follow the run at {address}: {reason}"));
        let access = security.access(address)?;
        let channel = access
            .endpoint()?
            .connect()
            .await
            .map_err(|error| access.refusal(&error).unwrap_or_else(|| failed(root_cause(&error))))?;
        let mut client = CoordinatorClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let own = dyad_telemetry::context_of(&tracing::Span::current());
        let call = RpcCall::client("dyad.v1.Coordinator/WatchRun", access.address(), own);
        let mut request = access.request(WatchRunRequest {})?;
        call.inject(request.metadata_mut());
        match client.watch_run(request).await {
            Ok(reply) => Ok(Self { stream: reply.into_inner(), call }),
            Err(status) => {
                call.ended(status.code());
                Err(access.refusal(&status).unwrap_or_else(|| failed(status.message().to_owned())))
            }
        }
    }

    /// The next event; `None` once the stream has ended or broken.
    pub(crate) async fn next(&mut self) -> Option<RunEvent> {
        let event = self.stream.message().await;
        match &event {
            Ok(Some(RunEvent { body: Some(Body::Ended(_)) }) | None) => self.call.ended(Code::Ok),
            Ok(Some(_)) => {}
            Err(status) => self.call.ended(status.code()),
        }
        event.ok().flatten()
    }
}
