//! `launcher node`: starts and watches the trainers of one node. A scheduler (Kubernetes) starts one such process per node.
//!
//! - LNC-N1: the exit status is that of the first genuine failure, not of a trainer that failed because another one failed.
//! - LNC-N2: when [`run`] returns, no trainer is left.
//! - LNC-N3: SIGTERM reaches every trainer; they have the grace period to finish their step and save.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dyad_proto::fault::Process;
use dyad_proto::{ErrorCode, Fault};
use dyad_telemetry::LogFormat;
use futures::StreamExt;
use tokio::time::Instant;

use crate::hosts::child::{Child, ChildOutput, SignalSender, outcomes};
use crate::placement::gpus::Gpus;
use crate::placement::numa::Topology;
use crate::placement::trainers::{self, Machine, Node, Trainer};
use crate::process::os::keep_to;
use crate::show::console::{Console, Speaker, warn};
use crate::train::interrupt::Interrupt;

/// How long the other trainers may take to end after a failure. The coordinator tells them of it, for an echo only after three seconds.
const VERDICT: Duration = Duration::from_secs(10);
/// Time between SIGTERM and SIGKILL for trainers that are still there then.
const LEAVE: Duration = Duration::from_secs(5);
/// Largest `--wait-for-coordinator`: a day, in seconds.
pub const MOST_PATIENCE: u64 = 86_400;

/// Start and watch the trainers of this node.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Exit status: as `launcher --help` has it; 4 when the node stopped because another one failed, \
130 when its trainers finished their step on SIGTERM."
)]
pub struct NodeOptions {
    /// Address of the coordinator, e.g. https://dyad-coordinator:29400.
    #[arg(long, value_name = "URL")]
    pub coordinator: String,
    /// Index of this node, from 0; a Kubernetes Job with completionMode Indexed sets the variable.
    #[arg(long, env = "JOB_COMPLETION_INDEX", value_name = "N")]
    pub node_index: u32,
    /// GPUs to use on this node, with one trainer each. 0 starts one CPU trainer.
    #[arg(long, value_name = "G", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus: u32,
    /// Folder for one log file per trainer; without it their lines go to standard error only.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// How long each trainer tries to reach the coordinator.
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=MOST_PATIENCE))]
    pub wait_for_coordinator: u64,
    /// How long trainers may take to finish their step and save after SIGTERM.
    #[arg(long, default_value_t = 290, value_name = "SECONDS")]
    pub grace_period: u64,
}

/// Runs the node's trainers to their end. Must be called on the main thread, like [`Child::start`].
pub async fn run(options: &NodeOptions) -> Result<(), Fault> {
    let mut interrupt = Interrupt::new()?;
    let machine = Machine::here();
    let trainers = trainers(options, &machine)?;
    if let Some(logs) = &options.logs {
        std::fs::create_dir_all(logs).map_err(|error| {
            Fault::input(format!("cannot write --logs {}: {error}", logs.display()))
                .hint("give a folder on a volume that this user may write to")
        })?;
    }
    let console = Console::new(true, LogFormat::Text);
    let (devices, idle) =
        trainers::devices(&trainers, Gpus::Count(options.gpus), &[(String::new(), machine.gpus)]);
    console.line(&format!("devices  {devices}"));
    idle.iter().for_each(|idle| warn(idle));
    let mut children = trainers
        .iter()
        .map(|trainer| start(options, trainer, trainers.len(), &console))
        .collect::<Result<Vec<_>, _>>()?;
    tokio::spawn(console.clone().show_held());
    let ended = tokio::select! {
        ended = follow(&mut children) => Some(ended),
        _ = interrupt.wait() => None,
    };
    let result = match ended {
        Some(result) => result,
        None => drain(options, &mut children, &mut interrupt, &console).await,
    };
    console.clear();
    result
}

/// The trainers to start, from options and machine.
fn trainers(options: &NodeOptions, machine: &Machine) -> Result<Vec<Trainer>, Fault> {
    machine.sure_of_gpus(Gpus::Count(options.gpus))?;
    if options.gpus > machine.gpus {
        return Err(Fault::input(format!("--gpus {}: this node has {}", options.gpus, machine.gpus))
            .hint("check the pod's GPU resource, the device plugin and NVIDIA_VISIBLE_DEVICES"));
    }
    let (count, index) = (options.gpus.max(1) as usize, options.node_index as usize);
    let node = Node { name: &format!("node{index}"), index, threads: machine.cores / count };
    let mut trainers = node.trainers(index * count, 0..options.gpus, 1);
    Topology::here().bind(&mut trainers);
    Ok(trainers)
}

fn start(options: &NodeOptions, trainer: &Trainer, local: usize, console: &Console) -> Result<Child, Fault> {
    let (url, patience) = (&options.coordinator, options.wait_for_coordinator);
    let mut command = trainers::command(trainer, url, patience, local)?;
    keep_to(&mut command, &trainer.cores);
    let file = options.logs.as_ref().map(|logs| logs.join(format!("{}.log", trainer.name)));
    // A pod's log holds one node, so its lines do not name it.
    let speaker = Speaker { node: String::new(), rank: Some(trainer.launch_index) };
    let process = Process::Trainer(trainer.name.clone());
    Child::start(process, &trainer.label(), command, ChildOutput { file, console: console.clone(), speaker })
}

/// Waits for all trainers. After a failure the others have [`VERDICT`] to end on their own, then they are stopped.
async fn follow(children: &mut [Child]) -> Result<(), Fault> {
    let mut faults = Vec::new();
    let mut verdict = None;
    {
        let mut outcomes = outcomes(children);
        loop {
            let next = match verdict {
                None => Ok(outcomes.next().await),
                Some(deadline) => tokio::time::timeout_at(deadline, outcomes.next()).await,
            };
            match next {
                Ok(Some(outcome)) => faults.extend(outcome.err()),
                Ok(None) => return worst(faults),
                Err(_) => break,
            }
            if !faults.is_empty() {
                verdict.get_or_insert_with(|| Instant::now() + VERDICT);
            }
        }
    }
    stop(children, LEAVE).await;
    worst(faults)
}

/// After SIGTERM: gives the trainers the grace period to finish their step and save.
async fn drain(
    options: &NodeOptions,
    children: &mut [Child],
    interrupt: &mut Interrupt,
    console: &Console,
) -> Result<(), Fault> {
    console
        .line(&format!("stopping: trainers have {} s to finish their step and save", options.grace_period));
    let faults = tokio::select! {
        faults = stop(children, Duration::from_secs(options.grace_period)) => Some(faults),
        _ = interrupt.wait() => None,
    };
    match faults {
        Some(faults) => worst(faults),
        None => {
            console.line("stopping at once");
            stop(children, Duration::ZERO).await;
            Err(drained("stopped at once by a second signal"))
        }
    }
}

/// Sends SIGTERM, waits for `time`, then sends SIGKILL. Returns the faults in the order of the ends: killed trainers come last.
async fn stop(children: &mut [Child], time: Duration) -> Vec<Fault> {
    let signals: Vec<SignalSender> = children.iter().map(Child::signals).collect();
    let tell = |signal| signals.iter().for_each(|child| child.send(signal));
    tell(libc::SIGTERM);
    let mut outcomes = outcomes(children);
    let mut faults = Vec::new();
    let deadline = Instant::now() + time;
    while let Ok(next) = tokio::time::timeout_at(deadline, outcomes.next()).await {
        let Some(outcome) = next else { return faults };
        faults.extend(outcome.err());
    }
    tell(libc::SIGKILL);
    while let Some(outcome) = outcomes.next().await {
        faults.extend(outcome.err());
    }
    faults
}

/// The node's outcome: the first genuine failure, else an interruption, else an echo of a failure elsewhere.
fn worst(mut faults: Vec<Fault>) -> Result<(), Fault> {
    let genuine = |fault: &Fault| !matches!(fault.code, ErrorCode::Echo | ErrorCode::Interrupted);
    if let Some(at) = faults.iter().position(genuine) {
        return Err(faults.swap_remove(at));
    }
    let stopped = faults.iter().position(|fault| fault.code == ErrorCode::Interrupted);
    match stopped.or((!faults.is_empty()).then_some(0)) {
        Some(at) => Err(faults.swap_remove(at)),
        None => Ok(()),
    }
}

fn drained(message: &str) -> Fault {
    Fault::new(ErrorCode::Interrupted, message).hint("the run continues from its last checkpoint")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(gpus: u32, node_index: u32) -> NodeOptions {
        NodeOptions {
            coordinator: "http://c:29400".into(),
            node_index,
            gpus,
            logs: None,
            wait_for_coordinator: 1,
            grace_period: 1,
        }
    }

    #[test]
    fn ranks_are_numbered_across_nodes() {
        let machine = &Machine { cores: 16, gpus: 8, gpu_trouble: None };
        let second = trainers(&options(8, 1), machine).unwrap();
        let last = &second[7];
        assert_eq!(
            (last.name.as_str(), last.launch_index, last.device.as_str()),
            ("node1-gpu7", 15, "cuda:7")
        );
        assert_eq!(last.threads, 2);
        let on_cpu = trainers(&options(0, 3), machine).unwrap();
        assert_eq!((on_cpu.len(), on_cpu[0].name.as_str(), on_cpu[0].launch_index), (1, "node3-cpu", 3));
        let missing = trainers(&options(9, 0), machine).unwrap_err();
        assert!(
            missing.message.contains("this node has 8") && missing.hint.contains("device plugin"),
            "{missing}"
        );
    }

    #[test]
    fn a_genuine_failure_counts_more_than_its_echoes() {
        let fault = |code| Fault::new(code, format!("{code:?}"));
        let code = |faults: Vec<Fault>| worst(faults).err().map(|fault| fault.code);
        let (echo, stopped) = (fault(ErrorCode::Echo), fault(ErrorCode::Interrupted));
        let bad_input = fault(ErrorCode::InvalidInput);
        assert_eq!(code(vec![echo.clone(), stopped.clone(), bad_input]), Some(ErrorCode::InvalidInput));
        assert_eq!(code(vec![echo.clone(), stopped]), Some(ErrorCode::Interrupted));
        assert_eq!((code(vec![echo]), code(vec![])), (Some(ErrorCode::Echo), None));
    }
}
