//! `grpc.health.v1`: on the coordinator's own port, and on a plain-text port for probes that have no certificate.

use std::net::SocketAddr;

use dyad_proto::Fault;
use dyad_proto::wire::coordinator_server::CoordinatorServer;
use futures::FutureExt;
use tonic::codegen::InterceptedService;
use tonic::server::NamedService;
use tonic::service::Interceptor;
use tonic::transport::Server;
use tonic::{Request, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::service::Service;
use crate::wire::door::Door;
use crate::wire::io::Peer;
use crate::wire::listen;

/// Concurrent connections on the port for probes.
const PROBES: usize = 32;

/// How a health check counts for its connection. Any client may ask, because the answer says nothing about the run.
#[derive(Clone, Copy, Debug)]
pub enum Welcome {
    /// On the run's own port: a health check alone does not admit the connection.
    Answered,
    /// On the port for probes: a health check admits the connection.
    AtHome,
}

impl Interceptor for Welcome {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match (self, request.extensions().get::<Peer>()) {
            (Self::AtHome, Some(peer)) if !peer.admit() => {
                return Err(Status::resource_exhausted("too many connections are open"));
            }
            (Self::Answered, Some(peer)) => peer.asked(),
            _ => {}
        }
        Ok(request)
    }
}

/// The gRPC service that answers probes.
pub type Answers = InterceptedService<HealthServer<HealthService>, Welcome>;

/// The status that probes get.
#[derive(Clone, Debug)]
pub struct Health(HealthReporter);

impl Health {
    /// Opens the plain-text port if `address` is given. The status is `NotServing` until [`Health::serving`].
    pub async fn listen(address: Option<&str>) -> Result<Self, Fault> {
        let health = Self(HealthReporter::new());
        health.set(ServingStatus::NotServing).await;
        let Some(address) = address else { return Ok(health) };
        let listener = listen::bind(address, "--health-listen").await?;
        let bound: Option<SocketAddr> = listener.local_addr().ok();
        tracing::info!(address = bound.map(|address| address.to_string()), "health checks");
        let incoming = Door::new(listener, None, PROBES).open();
        let serving =
            Server::builder().add_service(health.answers(Welcome::AtHome)).serve_with_incoming(incoming);
        tokio::spawn(serving.map(|ended| {
            if let Err(error) = ended {
                tracing::warn!(%error, "health checks are no longer answered");
            }
        }));
        Ok(health)
    }

    /// Sets the status to `Serving`.
    pub async fn serving(&self) {
        self.set(ServingStatus::Serving).await;
    }

    /// The service, for one port.
    #[must_use]
    pub fn answers(&self, welcome: Welcome) -> Answers {
        let service = HealthServer::new(HealthService::from_health_reporter(self.0.clone()));
        InterceptedService::new(service, welcome)
    }

    /// Sets the status of the whole process (the empty name) and of its one service.
    async fn set(&self, status: ServingStatus) {
        for name in ["", CoordinatorServer::<Service>::NAME] {
            self.0.set_service_status(name, status).await;
        }
    }
}
