//! Binds the port, serves one run on it until that has ended, and turns signals into the run's end.

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
use crate::engine::{Engine, Input};
use crate::files::output_dir::Output;
use crate::handle::RunHandle;
use crate::health::{Health, Welcome};
use crate::observe::Observer;
use crate::print::Printer;
use crate::run::Run;
use crate::service::{OpenCalls, Service};
use crate::wire::Guard;
use crate::wire::door::Door;
use crate::wire::refusals::Refusals;

/// Open connections beside two for every trainer (one that is going and one that comes again): launchers, probes, and
/// whoever has no business here.
const SPARE_CONNECTIONS: usize = 64;
/// Calls of one connection at a time; everybody makes one.
const CALLS: u32 = 16;

/// How long open streams may take to drain at the end: a watcher that reads nothing must not keep the process alive.
const DRAIN: Duration = Duration::from_secs(2);

/// An open port, who may use it, and what it tells probes.
#[derive(Debug)]
pub struct Port {
    /// Bound.
    pub listener: TcpListener,
    /// Who may connect and call.
    pub guard: Guard,
    /// What probes are told.
    pub health: Health,
}

/// A run, where it writes, who looks on, and how others reach it.
#[derive(Debug)]
pub struct Job {
    /// The run.
    pub run: Run,
    /// Its folder.
    pub output: Output,
    /// Its numbers and spans.
    pub observer: Observer,
    /// For those who serve it.
    pub handle: RunHandle,
    /// What they send.
    pub inputs: mpsc::Receiver<Input>,
}

/// Serves the run until it has ended; says how.
pub async fn serve(port: Port, job: Job, signals: Signals, print_events: bool) -> Result<(), Fault> {
    let Job { run, output, observer, handle, inputs } = job;
    tokio::spawn(signals.forward(handle.clone()));
    let printed = print_events.then(|| Printer::start(handle.watch()));
    let history = handle.history();
    let mut serving = Serving::open(port, run.world_size(), handle);
    // On the threads that serve: a message that wakes the engine need not wake a thread of its own.
    let engine = Engine::new(run, output, history, observer, serving.refusals.clone()).run(inputs);
    let engine = tokio::spawn(engine.in_current_span());
    let outcome = tokio::select! {
        outcome = engine => outcome
            .unwrap_or_else(|error| Err(Fault::failed(format!("the engine ended: {error}")))),
        died = &mut serving.server => {
            serving.refusals.close();
            return Err(Fault::failed(format!("the gRPC server ended: {died:?}")));
        }
    };
    // Streams end, those of watchers too, before the last words are waited for.
    let draining = serving.stop();
    if let Some(printed) = printed {
        printed.finish(DRAIN).await;
    }
    draining.end().await;
    outcome
}

/// Tells the trainers of a run that is complete that there is nothing to do, each as it comes, until all have been told.
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

/// The port while it is served.
struct Serving {
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    stop: oneshot::Sender<()>,
    calls: OpenCalls,
    refusals: Refusals,
}

/// The port once nobody is let in any more.
struct DrainingPort {
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    calls: OpenCalls,
    refusals: Refusals,
}

impl Serving {
    fn open(port: Port, trainers: usize, run: RunHandle) -> Self {
        let Port { listener, guard, health } = port;
        let (service, calls) = Service::new(run, guard.gate);
        let service = CoordinatorServer::new(service)
            .max_decoding_message_size(MAX_REPORT_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (stop, stopped) = oneshot::channel::<()>();
        let door = Door::new(listener, guard.tls, 2 * trainers + SPARE_CONNECTIONS);
        let (refusals, incoming) = (door.refusals(), door.open());
        let stopping = async {
            // Either end of the channel going away means: stop.
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

/// SIGTERM or SIGHUP so soon after the first signal is the same wish.
const ECHO: Duration = Duration::from_secs(5);
/// So is Ctrl-C's signal, which nobody can type twice so fast: a scheduler sends it to every process, and the launcher passes it on.
const TYPED: Duration = Duration::from_millis(200);

/// The signals that end a run. Made before anything is read, so that none can kill the process unheard.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    quit: Signal,
    /// None under nohup, which wants it ignored.
    hangup: Option<Signal>,
}

impl Signals {
    /// Watches from now on.
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

    /// Waits for a signal while there is nothing yet that could be saved.
    pub async fn next(&mut self) -> Fault {
        stopped(self.heard().await)
    }

    /// Ends the run: after the step in progress and with a checkpoint at first, at once at the second signal or at SIGQUIT.
    async fn forward(mut self, run: RunHandle) {
        let mut first: Option<Instant> = None;
        loop {
            let name = self.heard().await;
            let at_once = first.is_some() || name == "SIGQUIT";
            // A scheduler signals every process of a job, and the launcher its coordinator besides.
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
            // Fails only when the run has ended by itself.
            if told.is_err() || at_once {
                return;
            }
        }
    }
}

/// Resolves when whoever has started this process wants it gone, once its run has ended. SIGQUIT does not say so: a launcher sends it to
/// the coordinator of every run that has failed, to be sure of its end. Nor does what comes at once, the echo of the signal that ended
/// the run.
pub async fn hurried() {
    let Ok(mut signals) = Signals::watch() else { return std::future::pending().await };
    let since = Instant::now();
    while signals.heard().await == "SIGQUIT" || since.elapsed() < TYPED {}
}

fn stopped(signal: &str) -> Fault {
    Fault::new(ErrorCode::Interrupted, format!("stopped by {signal}"))
}
