//! Starts and stops the processes of a run, on this machine or on other hosts.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use dyad_proto::Fault;
use dyad_proto::fault::Process;
use dyad_proto::ownership::Ownership;
use dyad_proto::security::Proof;
use dyad_telemetry::LogFormat;
use tokio::process::Command;

use crate::hosts::Hosts;
use crate::hosts::child::{Child, ChildOutput, log_file};
use crate::placement::trainers::{self, Trainer};
use crate::process::os::{hand_over, keep_to};
use crate::process::programs::program;
use crate::security::Security;
use crate::show::console::{Console, Speaker};
use crate::show::live_plot::LivePlot;

/// How long processes may take to end on their own before they get a signal, and again between SIGTERM and SIGKILL.
pub const LEAVE: Duration = Duration::from_secs(5);

/// Everything that is needed to start a run's processes.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checked configuration.
    pub config_file: &'a Path,
    /// Folder of the run.
    pub output_dir: &'a Path,
    /// Trainers to start.
    pub trainers: &'a [Trainer],
    /// Address that the coordinator listens on.
    pub listen: &'a str,
    /// Certificates and join token.
    pub security: &'a Security,
    /// Whether trainers record a profile.
    pub profile: bool,
    /// Additional arguments of the coordinator.
    pub coordinator_flags: Vec<String>,
    /// Hosts of the run; `None` for this machine only.
    pub hosts: Option<&'a Hosts>,
    /// Environment variables for every process.
    pub environment: &'a [(String, String)],
    /// Seconds in which trainers must reach the coordinator.
    pub connect_timeout: u64,
    /// `--stall-timeout`.
    pub stall_timeout: Option<u64>,
    /// Format of the log lines of all processes.
    pub log_format: LogFormat,
    /// Lock of the output folder, if the coordinator runs on this machine.
    pub owner: Option<&'a Ownership>,
    /// Plot of the run's metrics.
    pub plot: &'a LivePlot,
    /// How long the coordinator may wait after the run for a last scrape of its metrics.
    pub last_scrape: Duration,
}

/// The started processes.
#[derive(Debug)]
pub struct Fleet {
    /// The coordinator, started first.
    pub coordinator: Child,
    /// Trainers, in the order of their ranks.
    pub trainers: Vec<Child>,
}

impl Fleet {
    /// Starts only the coordinator: the trainers need its address.
    pub async fn start(job: &Job<'_>, console: &Console) -> Result<Self, Fault> {
        Ok(Self { coordinator: start_coordinator(job, console).await?, trainers: Vec::new() })
    }

    /// All processes: trainers first, the coordinator last.
    pub fn all(&mut self) -> impl Iterator<Item = &mut Child> {
        self.trainers.iter_mut().chain([&mut self.coordinator])
    }

    /// Gives all processes time to end, and the coordinator time for a last scrape. Then sends SIGTERM, then SIGKILL.
    pub async fn stop(&mut self, last_scrape: Duration) {
        let leaving = async {
            tokio::time::timeout(LEAVE, all_ended(&mut self.trainers)).await?;
            tokio::time::timeout(LEAVE + last_scrape, self.coordinator.ended()).await
        };
        if leaving.await.is_err() {
            self.signal(libc::SIGTERM);
            if tokio::time::timeout(LEAVE, self.ended()).await.is_err() {
                self.kill().await;
            }
        }
    }

    /// Kills all processes at once and waits for their ends.
    pub async fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.ended().await;
    }

    fn signal(&mut self, signal: i32) {
        self.all().for_each(|child| child.signal(signal));
    }

    /// Returns when all processes have ended.
    pub async fn ended(&mut self) {
        all_ended(self.all()).await;
    }
}

async fn all_ended(children: impl IntoIterator<Item = &mut Child>) {
    for child in children {
        child.ended().await;
    }
}

async fn start_coordinator(job: &Job<'_>, console: &Console) -> Result<Child, Fault> {
    let mut command = Command::new(program("coordinator")?);
    command.arg("--config").arg(job.config_file).args(["--listen", job.listen]);
    command.args(["--world-size", &job.trainers.len().to_string()]).args(&job.coordinator_flags);
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    command.arg("--recorded-command").arg(serde_json::to_string(&words).unwrap_or_default());
    command.arg("--announce-preparing").args(job.security.coordinator_flags()).stdout(Stdio::piped());
    job.owner.into_iter().for_each(|owner| hand_over(&mut command, owner));
    let speaker = Speaker { node: "coordinator".into(), rank: None };
    let node = job.hosts.and_then(Hosts::coordinator_node);
    let (process, name, proof) = (Process::Coordinator, "coordinator", job.security.coordinator()?);
    let identity = Identity { process, label: name, name, proof };
    start(job, node, identity, command, &[], output(job, "coordinator", speaker, console)).await
}

/// Starts a trainer with the coordinator's `address`.
pub async fn start_trainer(
    job: &Job<'_>,
    trainer: &Trainer,
    address: &str,
    console: &Console,
) -> Result<Child, Fault> {
    // Without hosts all nodes are on this machine.
    let beside = |other: &&Trainer| job.hosts.is_none() || other.node == trainer.node;
    let beside = job.trainers.iter().filter(beside).count();
    let url = job.security.url(address);
    let mut command = trainers::command(trainer, &url, job.connect_timeout, beside)?;
    if job.profile {
        command.arg("--profile").arg(job.output_dir.join("profile"));
    }
    let node = job.hosts.map(|_| trainer.node);
    let host = job
        .hosts
        .map_or_else(|| format!("node{}", trainer.node), |hosts| hosts.agent(trainer.node).host.name.clone());
    let speaker = Speaker { node: host, rank: Some(trainer.launch_index) };
    let (label, name) = (trainer.label(), &trainer.name);
    let process = Process::Trainer(name.clone());
    let identity = Identity { process, label: &label, name, proof: job.security.trainer(name)? };
    let output = output(job, &trainer.name, speaker, console);
    start(job, node, identity, command, &trainer.cores, output).await
}

/// Names and credentials of a process.
struct Identity<'a> {
    process: Process,
    /// Its name in messages.
    label: &'a str,
    /// Its name in files and certificates.
    name: &'a str,
    proof: Proof,
}

/// Destination of a process's lines; `name` is the name of its log.
fn output(job: &Job<'_>, name: &str, speaker: Speaker, console: &Console) -> ChildOutput {
    ChildOutput { file: Some(log_file(job.output_dir, name)), console: console.clone(), speaker }
}

/// Starts a program on a node, or on this machine.
async fn start(
    job: &Job<'_>,
    node: Option<usize>,
    identity: Identity<'_>,
    mut command: Command,
    cores: &[usize],
    output: ChildOutput,
) -> Result<Child, Fault> {
    command.args(["--log-format", job.log_format.name()]);
    command.envs(job.environment.iter().map(|(name, value)| (name, value)));
    // After the environment, whose TRACEPARENT is the launcher's own parent span.
    command.envs(trace_parent());
    match job.hosts.zip(node) {
        Some((hosts, node)) => {
            let agent = hosts.agent(node);
            let folder = agent.keep(identity.name, identity.proof.clone()).await?;
            let (variable, value) = identity.proof.variable(Path::new(&folder));
            command.env(variable, value);
            Child::start_there(identity.process, identity.label, agent, &command, cores, output)
        }
        None => {
            job.security.equip(&mut command, identity.name, &identity.proof)?;
            keep_to(&mut command, cores);
            Child::start(identity.process, identity.label, command, output)
        }
    }
}

/// Trace context variables that make the launcher's span the parent of a process's spans.
fn trace_parent() -> impl Iterator<Item = (String, String)> {
    let own = dyad_telemetry::context_of(&tracing::Span::current());
    let headers = own.map(|own| dyad_telemetry::headers(&own)).unwrap_or_default();
    headers.into_iter().map(|(name, value)| (name.to_uppercase(), value))
}
