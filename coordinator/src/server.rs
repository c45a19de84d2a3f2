//! Binds the port, serves one run on it until that has ended, and turns signals into the run's end.

use std::io;
use std::time::{Duration, Instant};

use dyad_proto::wire::coordinator_server::CoordinatorServer;
use dyad_proto::{ErrorCode, Fault, MAX_MESSAGE_BYTES};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tracing::Instrument;

use crate::engine::{Engine, Input};
use crate::observe::Observer;
use crate::output_dir::Output;
use crate::print;
use crate::run::{Event, Run};
use crate::service::Service;
use crate::watch::History;

/// Events on their way to the engine; beyond that, streams wait.
const INPUTS: usize = 1024;

/// How long open streams may take to drain at the end: a watcher that reads nothing must not keep the process alive.
const DRAIN: Duration = Duration::from_secs(2);

/// Opens the port that `flag` asks for.
pub async fn bind(address: &str, flag: &str) -> Result<TcpListener, Fault> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            Fault::unavailable(format!("cannot listen on {address}: address already in use")).hint(format!(
                "another process holds that port; give {flag} another one, or port 0 for any that is free"
            ))
        }
        kind => {
            let code = match kind {
                io::ErrorKind::InvalidInput => ErrorCode::InvalidInput,
                _ => ErrorCode::Unavailable,
            };
            Fault::new(code, format!("cannot listen on {address}: {error}"))
                .hint(format!("{flag} takes an address of this machine and a port, such as 127.0.0.1:0"))
        }
    })
}

/// Serves the run until it has ended; says how.
pub async fn serve(
    listener: TcpListener,
    run: Run,
    output: Output,
    signals: Signals,
    (observer, print_events): (Observer, bool),
) -> Result<(), Fault> {
    let (inputs, events) = mpsc::channel(INPUTS);
    tokio::spawn(signals.forward(inputs.clone()));
    let history = History::default();
    let printed = print_events.then(|| tokio::spawn(print::events(history.follow())));
    let service = CoordinatorServer::new(Service::new(inputs, history.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (stop, stopped) = oneshot::channel::<()>();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let stopping = async {
        // Either end of the channel going away means: stop.
        let _ = stopped.await;
    };
    let mut server =
        tokio::spawn(Server::builder().serve_with_incoming_shutdown(service, incoming, stopping));
    // On the threads that serve: a message that wakes the engine need not wake a thread of its own.
    let engine = Engine::new(run, output, history, observer).run(events);
    let engine = tokio::spawn(engine.in_current_span());
    let outcome = tokio::select! {
        outcome = engine => outcome
            .unwrap_or_else(|error| Err(Fault::failed(format!("the engine ended: {error}")))),
        died = &mut server => return Err(Fault::failed(format!("the gRPC server ended: {died:?}"))),
    };
    drop(stop);
    if let Some(printed) = printed {
        let _ = tokio::time::timeout(DRAIN, printed).await;
    }
    if tokio::time::timeout(DRAIN, server).await.is_err() {
        tracing::warn!("streams were still open at the end");
    }
    outcome
}

/// SIGTERM so soon after the first signal is the same wish.
const ECHO: Duration = Duration::from_secs(5);

/// The signals that end a run. Made before the port is announced, so that none can kill the process unheard.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    quit: Signal,
}

impl Signals {
    /// Watches from now on.
    pub fn watch() -> Result<Self, Fault> {
        let watch =
            |kind| signal(kind).map_err(|error| Fault::failed(format!("cannot watch for signals: {error}")));
        Ok(Self {
            interrupt: watch(SignalKind::interrupt())?,
            terminate: watch(SignalKind::terminate())?,
            quit: watch(SignalKind::quit())?,
        })
    }

    /// Ends the run: after the step in progress and with a checkpoint at first, at once at the second signal or at SIGQUIT.
    async fn forward(mut self, inputs: mpsc::Sender<Input>) {
        let mut first: Option<Instant> = None;
        loop {
            let again = first.is_some();
            let (name, at_once) = tokio::select! {
                _ = self.interrupt.recv() => ("SIGINT", again),
                _ = self.terminate.recv() => ("SIGTERM", again),
                _ = self.quit.recv() => ("SIGQUIT", true),
            };
            // A scheduler signals every process of a job, and the launcher its coordinator besides.
            if name == "SIGTERM" && first.is_some_and(|first| first.elapsed() < ECHO) {
                continue;
            }
            first.get_or_insert_with(Instant::now);
            let event = match at_once {
                true => Event::Fault(Fault::new(ErrorCode::Interrupted, format!("stopped by {name}"))),
                false => Event::Drain(name.to_owned()),
            };
            // Fails only when the run has ended by itself.
            if inputs.send(Input::Event(event)).await.is_err() || at_once {
                return;
            }
        }
    }
}
