//! The trainer's one stream to the coordinator, on its own thread.
//!
//! [`mod@connect`] waits for the coordinator, [`feed`] prepares the work that it sends, [`rendezvous`] connects the ranks, [`drain`]
//! stops all ranks together, `abort` ends the process, and [`signals`] listens for signals.
//!
//! - TRN-S1: heartbeats leave once a second whatever the computing thread does.
//! - TRN-S2: an abort, or the loss of the coordinator, ends the process at once, also in the middle of a collective.
//! - TRN-S3: a coordinator that is silent for too long counts as lost. Silence is counted in this process's ticks
//!   (`dyad_proto::silence`).
//! - TRN-S4: a failure is sent to the coordinator before the process ends.

mod abort;
pub mod connect;
pub mod drain;
pub mod feed;
pub mod rendezvous;
pub mod signals;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dyad_proto::security::client::{Access, root_cause};
use dyad_proto::silence::{self, Silence};
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::coordinator_message::Body as Received;
use dyad_proto::wire::trainer_message::Body as Sent;
use dyad_proto::wire::{
    DrainRequest, Finished, Heartbeat, Held, Hello, Phase, Posting, TrainerMessage, Waiting,
};
use dyad_proto::{ErrorCode, Fault, MAX_MESSAGE_BYTES, MAX_REPORT_BYTES, PROTOCOL_VERSION};
use dyad_telemetry::RpcCall;
use tokio::sync::mpsc as async_mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Streaming};

use crate::observe::gpu_meter;
use crate::observe::progress;
use crate::observe::trace;
use crate::session::connect::patiently;
use crate::session::drain::{DrainBarrier, Recorded, Watermark};
use crate::session::signals::EndSignals;
use dyad_torch::comm::Communicator;
use dyad_torch::comm::board::{Board, LocalBoard};

/// Signals within this time after the first belong to the same request: a scheduler may send several.
const ECHO: Duration = Duration::from_secs(5);
/// How long the coordinator may take to close the stream after the trainer's last message.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long a process that must end at once may take to export its last spans.
const LAST_SPANS: Duration = Duration::from_millis(500);

/// This process, as it introduces itself to the coordinator.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Address of the coordinator, e.g. `http://10.0.0.1:29400`.
    pub coordinator: String,
    /// Folder of certificates, key and join token for TLS; `None` for plain text.
    pub tls_dir: Option<PathBuf>,
    /// File of the join token for plain text.
    pub token_file: Option<PathBuf>,
    /// Unique name within the run.
    pub name: String,
    /// Position that the launcher gave this process.
    pub launch_index: u32,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// How long to wait for the coordinator.
    pub connect_timeout: Duration,
}

/// State that other threads share with the stream's thread.
#[derive(Debug, Default)]
struct Shared {
    phase: AtomicI32,
    step: AtomicU64,
    communicator: Mutex<Option<Arc<dyn Communicator>>>,
    closing: AtomicBool,
    /// This trainer has told the coordinator of its own failure.
    failed: AtomicBool,
    barrier: DrainBarrier,
    /// This process's ticks since the last message of the coordinator.
    silence: Mutex<Silence>,
    /// How many such ticks are allowed; 0 until the coordinator says it.
    silence_limit: AtomicU32,
    recorded: Watermark,
    /// What ranks have posted to each other in order to connect.
    board: LocalBoard,
    /// The stream's call, for traces.
    call: Mutex<Option<RpcCall>>,
}

/// The board of one generation. A posting reaches all ranks through the coordinator.
#[derive(Clone, Debug)]
struct PostedBoard {
    handle: Handle,
    generation: u64,
}

impl Board for PostedBoard {
    fn post(&self, key: &str, value: Vec<u8>) {
        let (generation, key) = (self.generation, key.to_owned());
        self.handle.send(Sent::Posting(Posting { generation, key, value }));
    }

    fn read(&self, key: &str, patience: Duration) -> Option<Vec<u8>> {
        self.handle.shared.board.read(key, patience)
    }
}

/// Sends messages to the coordinator and reports the trainer's phase; cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    outbound: async_mpsc::UnboundedSender<TrainerMessage>,
    shared: Arc<Shared>,
}

impl Handle {
    /// The board on which the ranks of a generation post to each other.
    #[must_use]
    pub fn board(&self, generation: u64) -> Arc<dyn Board> {
        Arc::new(PostedBoard { handle: self.clone(), generation })
    }

    /// Queues a message. A broken stream is not reported here, because it ends the process by TRN-S2.
    pub fn send(&self, body: Sent) {
        let _ = self.outbound.send(TrainerMessage { body: Some(body) });
    }

    /// Sets phase and step for heartbeats, and sends one.
    pub fn enter(&self, phase: Phase, step: u64) {
        self.shared.phase.store(phase as i32, Ordering::Relaxed);
        self.shared.step.store(step, Ordering::Relaxed);
        progress::advance();
        self.heartbeat();
    }

    /// Sets the communicator that an abort must break.
    pub fn set_communicator(&self, communicator: Arc<dyn Communicator>) {
        *self.shared.communicator.lock().unwrap_or_else(PoisonError::into_inner) = Some(communicator);
    }

    /// Called before each piece of work. Returns false if the run ends early and all of its work is done.
    #[must_use]
    pub fn begin_work(&self) -> bool {
        progress::waiting(Waiting::Work, || self.shared.barrier.begin())
    }

    /// Waits until the coordinator has written the step's row, and returns the totals written up to it. If the row can no longer come,
    /// the process ends by TRN-S2.
    #[must_use]
    pub fn wait_recorded(&self, step: u64) -> Recorded {
        progress::waiting(Waiting::Row, || self.shared.recorded.wait(step))
    }

    fn silence(&self) -> MutexGuard<'_, Silence> {
        self.shared.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the call's trace with a gRPC status. A call that is never ended counts as cancelled.
    fn end_call(&self, code: Code) {
        if let Some(call) = self.shared.call.lock().unwrap_or_else(PoisonError::into_inner).take() {
            call.ended(code);
        }
    }

    fn heartbeat(&self) {
        let phase = self.shared.phase.load(Ordering::Relaxed);
        let step = self.shared.step.load(Ordering::Relaxed);
        let (progress, gpu) = (Some(progress::now()), gpu_meter::last());
        self.send(Sent::Heartbeat(Heartbeat { phase, step, progress, gpu }));
    }
}

/// The open stream.
#[derive(Debug)]
pub struct Session {
    handle: Handle,
    thread: JoinHandle<()>,
}

impl Session {
    /// Connects and says hello. The returned channel delivers the coordinator's messages, except those that the session handles itself.
    pub fn open(identity: &Identity) -> Result<(Self, mpsc::Receiver<Received>), Fault> {
        let (outbound, to_send) = async_mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        shared.phase.store(Phase::Loading as i32, Ordering::Relaxed);
        let handle = Handle { outbound, shared };
        handle.send(Sent::Hello(hello(identity)));
        let (deliver, received) = mpsc::channel();
        let (report, connected) = mpsc::channel();
        let (tls_dir, token_file) = (identity.tls_dir.as_deref(), identity.token_file.as_deref());
        let access = Access::new(&identity.coordinator, tls_dir, token_file)?;
        let (patience, worker) = (identity.connect_timeout, handle.clone());
        let thread = std::thread::Builder::new()
            .name("session".into())
            .spawn(move || serve(&access, patience, worker, to_send, &deliver, &report))
            .map_err(|error| Fault::failed(format!("cannot start a thread: {error}")))?;
        connected.recv().unwrap_or_else(|_| Err(Fault::failed("the session thread ended early")))?;
        Ok((Self { handle, thread }, received))
    }

    /// A handle for threads that report or send heartbeats.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Tells the coordinator that all work is done, and waits until it has heard it.
    pub fn finish(self) {
        self.close(Sent::Finished(Finished {}));
    }

    /// Tells the coordinator why this trainer cannot go on, and waits until it has heard it.
    pub fn fail(self, fault: Fault) {
        self.handle.shared.failed.store(fault.code != ErrorCode::Interrupted, Ordering::SeqCst);
        self.close(Sent::Failure(fault.into()));
    }

    fn close(self, last: Sent) {
        self.handle.shared.closing.store(true, Ordering::SeqCst);
        self.handle.send(last);
        // The thread itself gives up after FAREWELL.
        let _ = self.thread.join();
    }
}

fn hello(identity: &Identity) -> Hello {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Hello {
        name: identity.name.clone(),
        incarnation: since.as_nanos() as u64 ^ u64::from(std::process::id()),
        protocol_version: PROTOCOL_VERSION,
        device: identity.device.clone(),
        host: dyad_proto::files::of_kernel("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        pid: std::process::id(),
        launch_index: identity.launch_index,
        build: crate::facts::build(),
    }
}

fn serve(
    access: &Access,
    patience: Duration,
    handle: Handle,
    to_send: async_mpsc::UnboundedReceiver<TrainerMessage>,
    deliver: &mpsc::Sender<Received>,
    report: &mpsc::Sender<Result<(), Fault>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return drop(
                report.send(Err(Fault::failed(format!("cannot start the network runtime: {error}")))),
            );
        }
    };
    runtime.block_on(async {
        let mut signals = EndSignals::listen();
        let connected = tokio::select! {
            connected = connect(access, patience, &handle, to_send) => connected,
            () = signals.next() => Err(Fault::new(ErrorCode::Interrupted, "stopped before the coordinator was there")),
        };
        match connected {
            Ok(stream) => {
                let _ = report.send(Ok(()));
                tokio::select! {
                    () = receive(stream, &handle, deliver) => {}
                    () = beat(&handle, access.address()) => {}
                    () = obey(signals, &handle) => {}
                }
            }
            Err(fault) => drop(report.send(Err(fault))),
        }
    });
}

/// The first signal asks the coordinator to end the run on all ranks; a second one ends this process.
async fn obey(mut signals: EndSignals, handle: &Handle) {
    signals.next().await;
    tracing::info!("told to end: asking for the end of the run");
    handle.send(Sent::DrainRequest(DrainRequest {}));
    let first = std::time::Instant::now();
    while first.elapsed() < ECHO {
        signals.next().await;
    }
    let fault = Fault::new(ErrorCode::Interrupted, "stopped at once by a second signal");
    abort::leave(handle, &fault, Code::Cancelled);
}

async fn connect(
    access: &Access,
    patience: Duration,
    handle: &Handle,
    to_send: async_mpsc::UnboundedReceiver<TrainerMessage>,
) -> Result<Streaming<dyad_proto::wire::CoordinatorMessage>, Fault> {
    let unreachable = |reason: String| {
        Fault::unavailable(format!("cannot reach the coordinator at {}: {reason}", access.address()))
            .hint("check that the coordinator runs, that no firewall stands between, and whether it asks for DYAD_TLS_DIR")
    };
    let endpoint = access.endpoint()?.connect_timeout(patience).tcp_nodelay(true);
    let hopeless = |error: &tonic::transport::Error| access.refusal(error).is_some();
    let channel = patiently(access.address(), patience, || endpoint.connect(), hopeless).await;
    let channel =
        channel.map_err(|error| access.refusal(&error).unwrap_or_else(|| unreachable(root_cause(&error))))?;
    let mut client = CoordinatorClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_REPORT_BYTES);
    let call = RpcCall::client("dyad.v1.Coordinator/Train", access.address(), dyad_telemetry::environment());
    let mut request = access.request(UnboundedReceiverStream::new(to_send))?;
    call.inject(request.metadata_mut());
    *handle.shared.call.lock().unwrap_or_else(PoisonError::into_inner) = Some(call);
    // The kernel accepts connections even for a stopped process, so the answer needs a timeout too.
    let longest = patience.max(silence::TICK * silence::COORDINATOR);
    let reply = tokio::time::timeout(longest, client.train(request)).await.map_err(|_| {
        handle.end_call(Code::DeadlineExceeded);
        unreachable(format!("it does not answer for {} s", longest.as_secs()))
    })?;
    let reply = reply.map_err(|status| {
        handle.end_call(status.code());
        access.refusal(&status).unwrap_or_else(|| unreachable(status.message().to_owned()))
    })?;
    Ok(reply.into_inner())
}

async fn beat(handle: &Handle, coordinator: &str) {
    let mut ticks = tokio::time::interval(silence::TICK);
    // After a pause of this process, send one tick and not all missed ones.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut farewell = None;
    loop {
        ticks.tick().await;
        if handle.shared.closing.load(Ordering::SeqCst) {
            let since = *farewell.get_or_insert_with(tokio::time::Instant::now);
            if since.elapsed() > FAREWELL {
                handle.end_call(Code::DeadlineExceeded);
                return;
            }
            continue;
        }
        handle.heartbeat();
        let limit = match handle.shared.silence_limit.load(Ordering::Relaxed) {
            0 => silence::COORDINATOR,
            told => told,
        };
        if handle.silence().lasts(limit) {
            abort::leave(handle, &silent(coordinator, limit), Code::DeadlineExceeded);
        }
    }
}

/// The coordinator has sent nothing for too long: its process may be stopped, its machine gone, or its disk hung.
fn silent(coordinator: &str, seconds: u32) -> Fault {
    Fault::lost(format!("the coordinator at {coordinator} is silent: no sign of life for {seconds} s"))
        .hint("is its machine reachable, its process not stopped, and the disk under output_dir not hung?")
}

async fn receive(
    mut stream: Streaming<dyad_proto::wire::CoordinatorMessage>,
    handle: &Handle,
    deliver: &mpsc::Sender<Received>,
) {
    let mut welcome = false;
    loop {
        let echo = |reason: String| Fault::new(ErrorCode::Echo, reason);
        let message = stream.message().await;
        handle.silence().broken();
        let closing = handle.shared.closing.load(Ordering::SeqCst);
        let (end, code) = match message.map(|message| message.and_then(|message| message.body)) {
            Ok(Some(Received::Beat(_))) => continue,
            Ok(Some(Received::Abort(abort))) => abort::reason(abort, welcome),
            Ok(Some(Received::Hold(_))) => {
                handle.send(Sent::Held(Held { works: handle.shared.barrier.hold() }));
                continue;
            }
            Ok(Some(Received::KeepTrace(kept))) => {
                trace::keep(kept.step);
                continue;
            }
            Ok(Some(Received::Posting(posting))) => {
                handle.shared.board.post(&posting.key, posting.value);
                continue;
            }
            Ok(Some(Received::Recorded(recorded))) => {
                let dyad_proto::wire::Recorded { step, num_tokens, evaluations } = recorded;
                handle.shared.recorded.reach(Recorded { step, num_tokens, evaluations });
                continue;
            }
            Ok(Some(body)) => {
                welcome = true;
                if let Received::Welcome(welcome) = &body {
                    handle.shared.silence_limit.store(welcome.silence_seconds, Ordering::Relaxed);
                }
                if let Received::Drain(drain) = &body {
                    handle.shared.barrier.drain(drain.works);
                }
                let _ = deliver.send(body);
                continue;
            }
            Ok(None) => {
                let well = closing && !handle.shared.failed.load(Ordering::SeqCst);
                let code = if well { Code::Ok } else { Code::Aborted };
                (echo("the coordinator closed the connection".into()), code)
            }
            Err(status) => (echo(format!("lost the coordinator: {}", status.message())), status.code()),
        };
        if closing {
            handle.end_call(code);
            return;
        }
        abort::leave(handle, &end, code);
    }
}
