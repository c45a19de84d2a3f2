//! Runs a plan: starts coordinator and trainers, follows them, and stops everything when one fails.
//!
//! - L-1: the first genuine failure is the one that is reported; what fails because of it is not.
//! - L-2: when [`run`] returns, no child is left.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use dyad_proto::security::Material;
use dyad_proto::security::client::root_cause;
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::run_event::Body;
use dyad_proto::wire::{RunEvent, WatchRunRequest};
use dyad_proto::{ErrorCode, Fault, MAX_MESSAGE_BYTES};
use dyad_telemetry::{LogFormat, RpcCall};
use tokio::process::Command;
use tonic::Streaming;

use crate::children::{Child, Output, keep_to, log_file};
use crate::console::{Console, Speaker};
use crate::hosts::Hosts;
use crate::interrupt::Interrupt;
use crate::plan::Trainer;
use crate::progress::Progress;
use crate::security::{Security, TLS_DIR};

/// How long the coordinator may take to name the cause after a process has failed: it holds echoes back for three seconds.
const VERDICT: Duration = Duration::from_secs(6);
/// How long processes may take to leave on their own before they are made to.
const LEAVE: Duration = Duration::from_secs(5);
const COORDINATOR_LOG: &str = "its log is coordinator.log in output_dir/logs";
/// glibc hands every tensor's pages back and faults them in again at the next step unless told otherwise; huge pages make
/// the first touch cheaper. Worth a fifth of a CPU step (docs/benchmarks.md). A setting of the user's own wins.
pub(crate) const MALLOC: &str =
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824";

/// Who divides the model between trainers wants memory more than that fifth: large tensors go back at once, and leave no holes.
pub(crate) const SPARING_MALLOC: &str =
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1048576:glibc.malloc.trim_threshold=16777216";

/// What to run, and where.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checked configuration.
    pub config_file: &'a Path,
    /// Folder of the run.
    pub output_dir: &'a Path,
    /// Memory matters more than speed.
    pub spares_memory: bool,
    /// Trainers to start.
    pub trainers: &'a [Trainer],
    /// Address for the coordinator.
    pub listen: &'a str,
    /// How the processes talk.
    pub security: &'a Security,
    /// Trainers record where their time goes.
    pub profile: bool,
    /// Flags that the coordinator takes as they are.
    pub coordinator_flags: Vec<String>,
    /// Where it all runs; nothing for this machine.
    pub hosts: Option<&'a Hosts>,
    /// Set in every process.
    pub environment: &'a [(String, String)],
    /// Seconds in which trainers must reach the coordinator.
    pub connect_timeout: u64,
    /// How the log lines of all processes look.
    pub log_format: LogFormat,
}

/// Everything that was started.
struct Fleet {
    coordinator: Child,
    trainers: Vec<Child>,
}

/// Starts the job and returns when it is over and nothing of it is left.
pub async fn run(job: &Job<'_>, console: &Console, interrupt: &mut Interrupt) -> Result<(), Fault> {
    let mut fleet = Fleet { coordinator: start_coordinator(job, console).await?, trainers: Vec::new() };
    let coordinator = fleet.coordinator.signals();
    let (mut result, mut hurried) = (Ok(()), false);
    {
        let mut following = std::pin::pin!(follow(job, console, &mut fleet));
        tokio::select! {
            over = &mut following => result = over,
            () = interrupt.wait() => {
                console.line("stopping after the step in progress, with a checkpoint; press Ctrl-C again to stop at once");
                coordinator.send(libc::SIGTERM);
                tokio::select! {
                    over = &mut following => result = over,
                    () = interrupt.wait() => hurried = true,
                }
            }
        }
    }
    console.clear();
    if hurried {
        console.line("stopping at once");
        kill(&mut fleet).await;
        return Err(Fault::new(ErrorCode::Interrupted, "interrupted, without a checkpoint")
            .hint("continue from the last checkpoint with --resume"));
    }
    if let Err(fault) = &result {
        // At once, not by way of a checkpoint. The coordinator tells the trainers; one that has ended takes no notice.
        coordinator.send(libc::SIGQUIT);
        show_last_lines(fault, &fleet, console);
    }
    tokio::select! {
        () = stop(&mut fleet) => {}
        () = interrupt.wait() => {
            console.line("stopping at once");
            kill(&mut fleet).await;
        }
    }
    result
}

/// What the process that failed first had to say before.
fn show_last_lines(fault: &Fault, fleet: &Fleet, console: &Console) {
    if fault.code != ErrorCode::Failed {
        return;
    }
    let text = fault.to_string();
    let culprit = fleet.trainers.iter().chain([&fleet.coordinator]).find(|child| text.contains(&child.label));
    let Some(culprit) = culprit else { return };
    let tail = culprit.tail();
    if !tail.is_empty() {
        console.line(&format!("last lines of {}:", culprit.label));
        tail.iter().for_each(|line| console.line(&format!("  {line}")));
    }
}

async fn follow(job: &Job<'_>, console: &Console, fleet: &mut Fleet) -> Result<(), Fault> {
    let address = address_of(&mut fleet.coordinator).await?;
    for trainer in job.trainers {
        fleet.trainers.push(start_trainer(job, trainer, &address, console).await?);
    }
    let (mut events, _call) = match watch(job.security, &address).await {
        Ok(events) => events,
        Err(fault) => return Err(own_words(&mut fleet.coordinator, fault).await),
    };
    let mut progress = Progress::new(console.clone());
    let failure = tokio::select! {
        outcome = show(&mut events, &mut progress) => outcome,
        failed = first_failure(&mut fleet.trainers) => {
            // The coordinator may know better: this one may have fallen over somebody else's failure.
            tokio::time::timeout(VERDICT, show(&mut events, &mut progress)).await.unwrap_or(Outcome::Silent).or(failed)
        }
        // A connection to a host that is cut off says nothing for a long time.
        fault = fleet.coordinator.lost() => Outcome::Failed(fault.from_origin(fleet.coordinator.label.clone())),
    };
    match failure {
        Outcome::Complete => everyone_left(fleet).await,
        Outcome::Failed(fault) => Err(with_signal(fault, fleet).await),
        // The stream broke before the run ended: the coordinator is gone.
        Outcome::Silent => {
            let early =
                Fault::failed("the coordinator ended before the run was complete").hint(COORDINATOR_LOG);
            Err(own_words(&mut fleet.coordinator, early).await)
        }
    }
}

/// How a run ended, as far as the stream of events tells.
enum Outcome {
    Complete,
    Failed(Fault),
    Silent,
}

impl Outcome {
    /// What the coordinator says counts more than what a trainer said.
    fn or(self, trainer: Fault) -> Self {
        match self {
            Self::Silent if trainer.code != ErrorCode::Echo => Self::Failed(trainer),
            known => known,
        }
    }
}

async fn show(events: &mut Streaming<RunEvent>, progress: &mut Progress) -> Outcome {
    while let Ok(Some(event)) = events.message().await {
        match event.body {
            Some(Body::Ended(ended)) => {
                return ended.failure.map_or(Outcome::Complete, |failure| Outcome::Failed(failure.into()));
            }
            Some(body) => progress.show(&body),
            None => {}
        }
    }
    Outcome::Silent
}

/// Resolves when a trainer ends badly; never when all end well.
async fn first_failure(trainers: &mut [Child]) -> Fault {
    let mut waits: Vec<Pin<Box<dyn Future<Output = Option<Fault>> + '_>>> = Vec::new();
    for child in trainers {
        waits.push(Box::pin(async move {
            let status = child.ended().await;
            child.fault(status).map(|fault| named(fault, child))
        }));
    }
    std::future::poll_fn(|context| {
        let mut index = 0;
        while index < waits.len() {
            match waits[index].as_mut().poll(context) {
                std::task::Poll::Ready(Some(fault)) => return std::task::Poll::Ready(fault),
                std::task::Poll::Ready(None) => drop(waits.swap_remove(index)),
                std::task::Poll::Pending => index += 1,
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// After a complete run every process leaves in good order.
async fn everyone_left(fleet: &mut Fleet) -> Result<(), Fault> {
    for child in fleet.trainers.iter_mut().chain([&mut fleet.coordinator]) {
        let status = child.ended().await;
        if let Some(fault) = child.fault(status) {
            return Err(named(fault, child));
        }
    }
    Ok(())
}

/// Says whose failure it is, unless the message does.
fn named(fault: Fault, child: &Child) -> Fault {
    if fault.message.contains(&child.label) { fault } else { fault.from_origin(child.label.clone()) }
}

/// The coordinator's own account of its end, or what it looks like from here.
async fn own_words(coordinator: &mut Child, from_here: Fault) -> Fault {
    let status = tokio::time::timeout(LEAVE, coordinator.ended()).await.ok().flatten();
    coordinator.fault(status).unwrap_or(from_here)
}

/// The coordinator sees a connection close; the launcher knows which signal closed it.
async fn with_signal(fault: Fault, fleet: &mut Fleet) -> Fault {
    for child in &mut fleet.trainers {
        if !format!("{} {}", fault.origin, fault.message).contains(&child.label)
            || !fault.message.contains("died")
        {
            continue;
        }
        if let Ok(Some(status)) = tokio::time::timeout(LEAVE, child.ended()).await
            && std::os::unix::process::ExitStatusExt::signal(&status).is_some()
        {
            return Fault {
                message: format!("{} ({})", fault.message, crate::children::end(status)),
                ..fault
            };
        }
    }
    fault
}

/// Gives everyone time to leave, then makes them.
async fn stop(fleet: &mut Fleet) {
    if tokio::time::timeout(LEAVE, all_ended(fleet)).await.is_err() {
        for child in fleet.trainers.iter().chain([&fleet.coordinator]) {
            child.signal(libc::SIGTERM);
        }
        if tokio::time::timeout(LEAVE, all_ended(fleet)).await.is_err() {
            kill(fleet).await;
        }
    }
}

async fn kill(fleet: &mut Fleet) {
    for child in fleet.trainers.iter().chain([&fleet.coordinator]) {
        child.signal(libc::SIGKILL);
    }
    all_ended(fleet).await;
}

async fn all_ended(fleet: &mut Fleet) -> Vec<Option<ExitStatus>> {
    let mut statuses = Vec::new();
    for child in fleet.trainers.iter_mut().chain([&mut fleet.coordinator]) {
        statuses.push(child.ended().await);
    }
    statuses
}

async fn start_coordinator(job: &Job<'_>, console: &Console) -> Result<Child, Fault> {
    let mut command = Command::new(program("coordinator")?);
    command.arg("--config").arg(job.config_file).args(["--listen", job.listen]);
    command.args(["--world-size", &job.trainers.len().to_string()]).args(&job.coordinator_flags);
    command.args(job.security.coordinator_flags());
    command.args(["--log-format", job.log_format.name()]).envs(trace_parent());
    command.stdout(Stdio::piped());
    let file = log_file(job.output_dir, "coordinator");
    let speaker = Speaker { node: "coordinator".into(), rank: None };
    let output = Output { file, console: console.clone(), speaker };
    let node = job.hosts.and_then(Hosts::coordinator_node);
    let keys = Keys { of: "coordinator", material: job.security.coordinator()? };
    start(job, node, ("coordinator", keys), (command, &[]), output).await
}

async fn start_trainer(
    job: &Job<'_>,
    trainer: &Trainer,
    address: &str,
    console: &Console,
) -> Result<Child, Fault> {
    let mut command = Command::new(program("trainer")?);
    command.args(["run", "--coordinator", &job.security.url(address), "--name", &trainer.name]);
    command.args(["--launch-index", &trainer.launch_index.to_string(), "--device", &trainer.device]);
    command.args(["--connect-timeout", &job.connect_timeout.to_string()]);
    let threads = trainer.threads.to_string();
    // Every thread pool of the process keeps to its share of the cores.
    command.args(["--threads", &threads]).env("OMP_NUM_THREADS", &threads).env("RAYON_NUM_THREADS", &threads);
    if std::env::var_os("GLIBC_TUNABLES").is_none() {
        command.env("GLIBC_TUNABLES", if job.spares_memory { SPARING_MALLOC } else { MALLOC });
    }
    // torchrun's name. Without hosts all nodes are this machine.
    let beside = |other: &&Trainer| job.hosts.is_none() || other.node == trainer.node;
    command.env("LOCAL_WORLD_SIZE", job.trainers.iter().filter(beside).count().to_string());
    if job.profile {
        command.arg("--profile").arg(job.output_dir.join("profile"));
    }
    command.args(["--log-format", job.log_format.name()]).envs(trace_parent());
    command.stdout(Stdio::null());
    let node = job.hosts.map(|_| trainer.node);
    let host = job
        .hosts
        .map_or_else(|| format!("node{}", trainer.node), |hosts| hosts.agent(trainer.node).host.name.clone());
    let output = Output {
        file: log_file(job.output_dir, &trainer.name),
        console: console.clone(),
        speaker: Speaker { node: host, rank: Some(trainer.launch_index) },
    };
    let label = format!("trainer rank {} ({})", trainer.launch_index, trainer.name);
    let keys = Keys { of: &trainer.name, material: job.security.trainer(&trainer.name)? };
    start(job, node, (&label, keys), (command, &trainer.cores), output).await
}

/// What a process shows to the others; nothing in plain text.
struct Keys<'a> {
    of: &'a str,
    material: Option<Material>,
}

/// Starts a program on a node, or on this machine.
async fn start(
    job: &Job<'_>,
    node: Option<usize>,
    (label, keys): (&str, Keys<'_>),
    (mut command, cores): (Command, &[usize]),
    output: Output,
) -> Result<Child, Fault> {
    command.envs(job.environment.iter().map(|(name, value)| (name, value)));
    match job.hosts.zip(node) {
        Some((hosts, node)) => {
            let agent = hosts.agent(node);
            if let Some(material) = keys.material {
                command.env(TLS_DIR, agent.keep(keys.of, material).await?);
            }
            Child::start_there(label, agent, &command, cores, output)
        }
        None => {
            job.security.equip(&mut command, keys.of, keys.material.as_ref())?;
            keep_to(&mut command, cores);
            Child::start(label, command, output)
        }
    }
}

/// By which a process that is started finds the launcher's span.
fn trace_parent() -> impl Iterator<Item = (String, String)> {
    let own = dyad_telemetry::context_of(&tracing::Span::current());
    let headers = own.map(|own| dyad_telemetry::headers(&own)).unwrap_or_default();
    headers.into_iter().map(|(name, value)| (name.to_uppercase(), value))
}

/// A program of Dyad, beside this one unless `DYAD_BIN_DIR` says otherwise.
pub fn program(name: &str) -> Result<PathBuf, Fault> {
    let dir = match std::env::var_os("DYAD_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = std::env::current_exe()
                .map_err(|error| Fault::failed(format!("cannot find myself: {error}")))?;
            own.parent().unwrap_or(Path::new(".")).to_owned()
        }
    };
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Fault::failed(format!("no program {}", path.display())).hint("run `make build` first"))
}

async fn address_of(coordinator: &mut Child) -> Result<String, Fault> {
    let line = coordinator.first_line().await;
    let json: Option<serde_json::Value> = line.and_then(|line| serde_json::from_str(&line).ok());
    match json.as_ref().and_then(|json| json.get("listening")).and_then(serde_json::Value::as_str) {
        Some(address) => Ok(address.to_owned()),
        None => {
            let mute = Fault::failed("the coordinator did not say where it listens").hint(COORDINATOR_LOG);
            Err(own_words(coordinator, mute).await)
        }
    }
}

/// The run's events, and the call that brings them.
async fn watch(security: &Security, address: &str) -> Result<(Streaming<RunEvent>, RpcCall), Fault> {
    let failed = |reason: String| {
        Fault::failed(format!("cannot follow the run at {address}: {reason}")).hint(COORDINATOR_LOG)
    };
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
    let reply = client.watch_run(request).await;
    reply
        .map(|reply| (reply.into_inner(), call))
        .map_err(|status| access.refusal(&status).unwrap_or_else(|| failed(status.message().to_owned())))
}
