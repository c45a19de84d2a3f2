//! Serves one run on its port until the run has ended, and turns signals into the run's end.

use std::time::{Duration, Instant};

use dyad_proto::wire::coordinator_server::CoordinatorServer;
use dyad_proto::{ErrorCode, Fault, MAX_MESSAGE_BYTES, MAX_REPORT_BYTES, counted, signals};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tracing::Instrument;

use crate::complete;
use crate::engine::{Input, RunEngine};
use crate::files::output_dir::RunFiles;
use crate::handle::RunHandle;
use crate::health::{Health, Welcome};
use crate::observe::Observer;
use crate::print::Printer;
use crate::run::Run;
use crate::service::{OpenCalls, Service};
use crate::wire::Guard;
use crate::wire::door::Door;
use crate::wire::refusals::Refusals;

/// Open connections in addition to two for every trainer (a reconnecting trainer briefly has two): launchers, probes and
/// unknown peers.
const SPARE_CONNECTIONS: usize = 64;
/// Concurrent calls of one connection; every client makes one.
const CALLS: u32 = 16;

/// How long open streams may take to drain at the end. A watcher that does not read must not keep the process alive.
const DRAIN: Duration = Duration::from_secs(2);

/// A bound port, its access rules, and its answers to probes.
#[derive(Debug)]
pub struct Port {
    /// The bound listener.
    pub listener: TcpListener,
    /// Who may connect and call.
    pub guard: Guard,
    /// The status that probes get.
    pub health: Health,
}

/// A run with its output folder, its metrics and traces, and its handle.
#[derive(Debug)]
pub struct ServedRun {
    /// The run.
    pub run: Run,
    /// Its output folder.
    pub output: RunFiles,
    /// Its metrics and spans.
    pub observer: Observer,
    /// The handle for gRPC, HTTP, signals and the printer.
    pub handle: RunHandle,
    /// The inputs sent through the handle.
    pub inputs: mpsc::Receiver<Input>,
}

/// Serves the run until it has ended; returns its outcome.
pub async fn serve(port: Port, job: ServedRun, signals: Signals, print_events: bool) -> Result<(), Fault> {
    let ServedRun { run, output, observer, handle, inputs } = job;
    tokio::spawn(signals.forward(handle.clone()));
    let printed = print_events.then(|| Printer::start(handle.watch()));
    let history = handle.history();
    let mut serving = Serving::open(port, run.world_size(), handle);
    // The engine runs on the threads that serve, so that a message does not have to wake another thread.
    let engine = RunEngine::new(run, output, history, observer, serving.refusals.clone()).run(inputs);
    let engine = tokio::spawn(engine.in_current_span());
    let outcome = tokio::select! {
        outcome = engine => outcome
            .unwrap_or_else(|error| Err(Fault::failed(format!("the engine ended: {error}")))),
        died = &mut serving.server => {
            serving.refusals.close();
            return Err(Fault::failed(format!("the gRPC server ended: {died:?}")));
        }
    };
    // End all streams, those of watchers too, before waiting for the printer.
    let draining = serving.stop();
    if let Some(printed) = printed {
        printed.finish(DRAIN).await;
    }
    draining.end().await;
    outcome
}

/// Tells each trainer of a complete run that there is nothing to do. Returns when all have been told, or after `patience`.
pub async fn tell_complete(
    port: Port,
    trainers: u32,
    patience: Duration,
    signals: &mut Signals,
) -> Result<(), Fault> {
    let (handle, inputs) = RunHandle::new(None);
    let serving = Serving::open(port, trainers as usize, handle);
    let outcome = tokio::select! {
        () = complete::tell(inputs, trainers) => Ok(()),
        () = tokio::time::sleep(patience) => {
            tracing::warn!("not all of {} asked what there is to do", counted(trainers, "trainer"));
            Ok(())
        }
        fault = signals.next() => Err(fault),
    };
    serving.stop().end().await;
    outcome
}

/// A port that accepts connections.
struct Serving {
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    stop: oneshot::Sender<()>,
    calls: OpenCalls,
    refusals: Refusals,
}

/// A port that accepts no new connections.
struct DrainingPort {
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    calls: OpenCalls,
    refusals: Refusals,
}

impl Serving {
    fn open(port: Port, trainers: usize, run: RunHandle) -> Self {
        let Port { listener, guard, health } = port;
        let (service, calls) = Service::new(run, guard.admission);
        let service = CoordinatorServer::new(service)
            .max_decoding_message_size(MAX_REPORT_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (stop, stopped) = oneshot::channel::<()>();
        let door = Door::new(listener, guard.tls, 2 * trainers + SPARE_CONNECTIONS);
        let (refusals, incoming) = (door.refusals(), door.open());
        let stopping = async {
            // Resolves when the sender is dropped.
            let _ = stopped.await;
        };
        let server = Server::builder().max_concurrent_streams(CALLS).add_service(service);
        let server = server.add_service(health.answers(Welcome::Answered));
        let server = tokio::spawn(server.serve_with_incoming_shutdown(incoming, stopping));
        Self { server, stop, calls, refusals }
    }

    fn stop(self) -> DrainingPort {
        drop(self.stop);
        DrainingPort { server: self.server, calls: self.calls, refusals: self.refusals }
    }
}

impl DrainingPort {
    async fn end(self) {
        let (server, calls) = (self.server, self.calls);
        let drained = tokio::time::timeout(DRAIN, async {
            let _ = server.await;
            calls.end().await;
        });
        if drained.await.is_err() {
            tracing::warn!("streams were still open at the end");
        }
        self.refusals.close();
    }
}

/// A SIGTERM or SIGHUP within this time after the first signal counts as the same request.
const ECHO: Duration = Duration::from_secs(5);
/// The same for SIGINT. It may arrive twice because a scheduler sends it to every process and the launcher passes it on. Nobody types
/// Ctrl-C twice within this time.
const TYPED: Duration = Duration::from_millis(200);

/// The signals that end a run. Created before the data is read, so that no signal kills the process by default.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    quit: Signal,
    /// `None` if SIGHUP is ignored, as under nohup.
    hangup: Option<Signal>,
}

impl Signals {
    /// Starts to watch for signals.
    pub fn watch() -> Result<Self, Fault> {
        let wanted = !signals::is_ignored(SignalKind::hangup().as_raw_value());
        let watch =
            |kind| signal(kind).map_err(|error| Fault::failed(format!("cannot watch for signals: {error}")));
        Ok(Self {
            interrupt: watch(SignalKind::interrupt())?,
            terminate: watch(SignalKind::terminate())?,
            quit: watch(SignalKind::quit())?,
            hangup: wanted.then(|| watch(SignalKind::hangup())).transpose()?,
        })
    }

    async fn heard(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = hangup => "SIGHUP",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.quit.recv() => "SIGQUIT",
        }
    }

    /// Waits for a signal and returns it as an error. For the time before a run has anything to save.
    pub async fn next(&mut self) -> Fault {
        stopped(self.heard().await)
    }

    /// Ends the run. The first signal ends it after the step in progress, with a checkpoint; a second signal or SIGQUIT ends it at once.
    async fn forward(mut self, run: RunHandle) {
        let mut first: Option<Instant> = None;
        loop {
            let name = self.heard().await;
            let at_once = first.is_some() || name == "SIGQUIT";
            // A scheduler signals every process of a job, and the launcher passes the same signal on.
            let echo = match name {
                "SIGTERM" | "SIGHUP" => ECHO,
                "SIGINT" => TYPED,
                _ => Duration::ZERO,
            };
            if first.is_some_and(|first| first.elapsed() < echo) {
                continue;
            }
            first.get_or_insert_with(Instant::now);
            let told = if at_once { run.stop(stopped(name)).await } else { run.drain(name).await };
            // Fails only if the run has ended by itself.
            if told.is_err() || at_once {
                return;
            }
        }
    }
}

/// Resolves on a signal that arrives after the end of the run. Ignores SIGQUIT, which a launcher sends to the coordinator of every failed
/// run, and signals of the first moments, which are echoes of the signal that ended the run.
pub async fn hurried() {
    let Ok(mut signals) = Signals::watch() else { return std::future::pending().await };
    let since = Instant::now();
    while signals.heard().await == "SIGQUIT" || since.elapsed() < TYPED {}
}

fn stopped(signal: &str) -> Fault {
    Fault::new(ErrorCode::Interrupted, format!("stopped by {signal}"))
}
