//! The processes of a run: how they are started, on this machine or on others, and how they are made to leave.

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

/// How long processes may take to leave on their own before they are made to.
pub const LEAVE: Duration = Duration::from_secs(5);

/// What to run, and where.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checked configuration.
    pub config_file: &'a Path,
    /// Folder of the run.
    pub output_dir: &'a Path,
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
    /// `--stall-timeout`.
    pub stall_timeout: Option<u64>,
    /// How the log lines of all processes look.
    pub log_format: LogFormat,
    /// Of the output folder, where the coordinator runs on this machine.
    pub owner: Option<&'a Ownership>,
    /// Of the run's numbers.
    pub plot: &'a LivePlot,
    /// How long the coordinator may wait after the run for a last scrape of its metrics.
    pub last_scrape: Duration,
}

/// Everything that was started.
#[derive(Debug)]
pub struct Fleet {
    /// First.
    pub coordinator: Child,
    /// In the order of their ranks.
    pub trainers: Vec<Child>,
}

impl Fleet {
    /// The coordinator alone: trainers must be told where it listens.
    pub async fn start(job: &Job<'_>, console: &Console) -> Result<Self, Fault> {
        Ok(Self { coordinator: start_coordinator(job, console).await?, trainers: Vec::new() })
    }

    /// Trainers first, the coordinator last.
    pub fn all(&mut self) -> impl Iterator<Item = &mut Child> {
        self.trainers.iter_mut().chain([&mut self.coordinator])
    }

    /// Gives everyone time to leave, and the coordinator time for a last scrape; then makes them.
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

    /// Ends everyone at once.
    pub async fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.ended().await;
    }

    fn signal(&mut self, signal: i32) {
        self.all().for_each(|child| child.signal(signal));
    }

    /// Returns when nobody is left.
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
    let keys = Keys { of: "coordinator", proof: job.security.coordinator()? };
    let who = (Process::Coordinator, "coordinator");
    start(job, node, who, keys, command, &[], output(job, "coordinator", speaker, console)).await
}

/// Starts a trainer that finds the coordinator at an address.
pub async fn start_trainer(
    job: &Job<'_>,
    trainer: &Trainer,
    address: &str,
    console: &Console,
) -> Result<Child, Fault> {
    // Without hosts all nodes are this machine.
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
    let keys = Keys { of: &trainer.name, proof: job.security.trainer(&trainer.name)? };
    let output = output(job, &trainer.name, speaker, console);
    let label = trainer.label();
    let who = (Process::Trainer(trainer.name.clone()), label.as_str());
    start(job, node, who, keys, command, &trainer.cores, output).await
}

/// What a process shows to the others, and the process's name.
struct Keys<'a> {
    of: &'a str,
    proof: Proof,
}

/// Where the lines of a process go; `name` is that of its log.
fn output(job: &Job<'_>, name: &str, speaker: Speaker, console: &Console) -> ChildOutput {
    ChildOutput { file: Some(log_file(job.output_dir, name)), console: console.clone(), speaker }
}

/// Starts a program on a node, or on this machine.
async fn start(
    job: &Job<'_>,
    node: Option<usize>,
    (process, label): (Process, &str),
    keys: Keys<'_>,
    mut command: Command,
    cores: &[usize],
    output: ChildOutput,
) -> Result<Child, Fault> {
    command.args(["--log-format", job.log_format.name()]);
    command.envs(job.environment.iter().map(|(name, value)| (name, value)));
    // After the environment, which may hold the launcher's own parent.
    command.envs(trace_parent());
    match job.hosts.zip(node) {
        Some((hosts, node)) => {
            let agent = hosts.agent(node);
            let folder = agent.keep(keys.of, keys.proof.clone()).await?;
            let (variable, value) = keys.proof.variable(Path::new(&folder));
            command.env(variable, value);
            Child::start_there(process, label, agent, &command, cores, output)
        }
        None => {
            job.security.equip(&mut command, keys.of, &keys.proof)?;
            keep_to(&mut command, cores);
            Child::start(process, label, command, output)
        }
    }
}

/// By which a process that is started finds the launcher's span.
fn trace_parent() -> impl Iterator<Item = (String, String)> {
    let own = dyad_telemetry::context_of(&tracing::Span::current());
    let headers = own.map(|own| dyad_telemetry::headers(&own)).unwrap_or_default();
    headers.into_iter().map(|(name, value)| (name.to_uppercase(), value))
}
