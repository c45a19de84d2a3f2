//! `launcher node`: the trainers of one node, where a scheduler (Kubernetes) has placed one such process per node.
//!
//! - N-1: the status is that of the first genuine failure; trainers that fell over somebody else's do not count.
//! - N-2: when [`run`] returns, no trainer is left.
//! - N-3: SIGTERM reaches every trainer, which then have the grace period to finish their step and save.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::Args;
use dyad_proto::{ErrorCode, Fault};
use dyad_telemetry::LogFormat;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::Instant;

use crate::children::{Child, Output, keep_to};
use crate::console::{Console, Speaker};
use crate::interrupt::Interrupt;
use crate::numa::{Topology, allowed_cores};
use crate::plan::{Machine, Trainer};
use crate::supervise::{MALLOC, SPARING_MALLOC, program};

/// How long the others may take to hear of a failure from the coordinator: it holds echoes back for three seconds.
const VERDICT: Duration = Duration::from_secs(10);
/// How long they then have to leave.
const LEAVE: Duration = Duration::from_secs(5);
/// Between two looks for the coordinator; doubled from the first to the last.
const PATIENCE: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];

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
    /// Place of this node among all, from 0; a Job with completionMode Indexed sets the variable.
    #[arg(long, env = "JOB_COMPLETION_INDEX", value_name = "N")]
    pub node_index: u32,
    /// GPUs of this node, with one trainer each. 0 starts one CPU trainer.
    #[arg(long, value_name = "G", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus: u32,
    /// Folder for one log file per trainer; without it their lines go to standard error only.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// How long to wait until the coordinator can be reached.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub wait_for_coordinator: u64,
    /// How long trainers may take to finish their step and save once SIGTERM has come.
    #[arg(long, default_value_t = 290, value_name = "SECONDS")]
    pub grace_period: u64,
    /// Give memory back early rather than keep it for the next step (for `zero_stage` above 0).
    #[arg(long)]
    pub spare_memory: bool,
}

/// Runs the node's trainers to their end. Must be called on the main thread, as [`Child::start`].
pub async fn run(options: &NodeOptions) -> Result<(), Fault> {
    let mut interrupt = Interrupt::new()?;
    let trainers = trainers(options, Machine::here())?;
    if let Some(logs) = &options.logs {
        std::fs::create_dir_all(logs).map_err(|error| {
            Fault::input(format!("cannot write --logs {}: {error}", logs.display()))
                .hint("give a folder on a volume that this user may write to")
        })?;
    }
    tokio::select! {
        reached = coordinator_is_there(options) => reached?,
        () = interrupt.wait() => return Err(drained("stopped before the coordinator was reached")),
    }
    let console = Console::new(true, LogFormat::Text);
    let mut children = trainers
        .iter()
        .map(|trainer| start(options, trainer, trainers.len(), &console))
        .collect::<Result<Vec<_>, _>>()?;
    tokio::spawn(console.clone().show_held());
    let ended = tokio::select! {
        ended = follow(&mut children) => Some(ended),
        () = interrupt.wait() => None,
    };
    let result = match ended {
        Some(result) => result,
        None => drain(options, &mut children, &mut interrupt, &console).await,
    };
    console.clear();
    result
}

/// What to start, purely from options and machine.
fn trainers(options: &NodeOptions, machine: Machine) -> Result<Vec<Trainer>, Fault> {
    if options.gpus > machine.gpus {
        return Err(Fault::input(format!("--gpus {}: this node has {}", options.gpus, machine.gpus))
            .hint("check the pod's GPU resource, the device plugin and NVIDIA_VISIBLE_DEVICES"));
    }
    let count = options.gpus.max(1);
    let node = options.node_index;
    let mut trainers: Vec<Trainer> = (0..count)
        .map(|place| Trainer {
            name: if options.gpus == 0 {
                format!("node{node}-cpu")
            } else {
                format!("node{node}-gpu{place}")
            },
            launch_index: (node * count + place) as usize,
            node: node as usize,
            device: if options.gpus == 0 { "cpu".into() } else { format!("cuda:{place}") },
            threads: (machine.cores / count as usize).max(1),
            cores: Vec::new(),
        })
        .collect();
    Topology::read(Path::new("/"), &allowed_cores()).bind(&mut trainers);
    Ok(trainers)
}

/// Waits until something listens there. Its name may not resolve yet, and its pod may not even be placed.
async fn coordinator_is_there(options: &NodeOptions) -> Result<(), Fault> {
    let address = host_and_port(&options.coordinator)?;
    let deadline = Instant::now() + Duration::from_secs(options.wait_for_coordinator);
    let mut pause = PATIENCE[0];
    let console = Console::new(true, LogFormat::Text);
    loop {
        let reason = match tokio::time::timeout(PATIENCE[1], TcpStream::connect(&address)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".into(),
        };
        if Instant::now() + pause > deadline {
            return Err(Fault::unavailable(format!("no coordinator at {address}: {reason}")).hint(format!(
                "waited {} s (--wait-for-coordinator); look at the coordinator's pod and its events",
                options.wait_for_coordinator
            )));
        }
        if pause == PATIENCE[0] {
            console.line(&format!("waiting for the coordinator at {address} ({reason})"));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PATIENCE[1]);
    }
}

fn host_and_port(url: &str) -> Result<String, Fault> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let address = rest.map(|rest| rest.trim_end_matches('/')).filter(|address| {
        address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    });
    address.map(str::to_owned).ok_or_else(|| {
        Fault::input(format!("--coordinator {url}: no address with a port"))
            .hint("for example https://dyad-coordinator:29400")
    })
}

fn start(options: &NodeOptions, trainer: &Trainer, local: usize, console: &Console) -> Result<Child, Fault> {
    let mut command = Command::new(program("trainer")?);
    command.args(["run", "--coordinator", &options.coordinator, "--name", &trainer.name]);
    command.args(["--launch-index", &trainer.launch_index.to_string(), "--device", &trainer.device]);
    let threads = trainer.threads.to_string();
    keep_to(&mut command, &trainer.cores);
    command.args(["--threads", &threads]).env("OMP_NUM_THREADS", &threads).env("RAYON_NUM_THREADS", &threads);
    if std::env::var_os("GLIBC_TUNABLES").is_none() {
        command.env("GLIBC_TUNABLES", if options.spare_memory { SPARING_MALLOC } else { MALLOC });
    }
    command.env("LOCAL_WORLD_SIZE", local.to_string()).stdout(Stdio::null());
    let file = options
        .logs
        .as_ref()
        .map_or_else(|| PathBuf::from("/dev/null"), |logs| logs.join(format!("{}.log", trainer.name)));
    // Whoever reads a pod's log knows the node.
    let speaker = Speaker { node: String::new(), rank: Some(trainer.launch_index) };
    let output = Output { file, console: console.clone(), speaker };
    Child::start(&format!("trainer rank {} ({})", trainer.launch_index, trainer.name), command, output)
}

/// Waits for all; after a failure the others leave on their own or are made to.
async fn follow(children: &mut [Child]) -> Result<(), Fault> {
    let mut faults = Vec::new();
    let mut verdict = None;
    {
        let mut ends = ends(children);
        loop {
            let next = match verdict {
                None => Ok(ends.next().await),
                Some(deadline) => tokio::time::timeout_at(deadline, ends.next()).await,
            };
            match next {
                Ok(Some(Some(fault))) => faults.push(fault),
                Ok(Some(None)) => {}
                Ok(None) => return outcome(faults),
                Err(_) => break,
            }
            if !faults.is_empty() {
                verdict.get_or_insert_with(|| Instant::now() + VERDICT);
            }
        }
    }
    stop(children, LEAVE).await;
    outcome(faults)
}

/// After SIGTERM: the trainers finish their step and save, within the grace period.
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
        () = interrupt.wait() => None,
    };
    match faults {
        Some(faults) => outcome(faults),
        None => {
            console.line("stopping at once");
            stop(children, Duration::ZERO).await;
            Err(drained("stopped at once by a second signal"))
        }
    }
}

/// SIGTERM, time, SIGKILL. Says how they ended; those that had to be killed come last.
async fn stop(children: &mut [Child], time: Duration) -> Vec<Fault> {
    children.iter().for_each(|child| child.signal(libc::SIGTERM));
    let mut faults = Vec::new();
    let all = async {
        let mut ends = ends(children);
        while let Some(end) = ends.next().await {
            faults.extend(end);
        }
    };
    if tokio::time::timeout(time, all).await.is_err() {
        children.iter().for_each(|child| child.signal(libc::SIGKILL));
        let mut ends = ends(children);
        while let Some(end) = ends.next().await {
            faults.extend(end.filter(|fault| !faults.contains(fault)));
        }
    }
    faults
}

/// How each child ends, in the order in which they do; `None` for a good end.
fn ends(children: &mut [Child]) -> FuturesUnordered<impl Future<Output = Option<Fault>>> {
    let end = |child| async move {
        let child: &mut Child = child;
        let status = child.ended().await;
        let fault = by_status(child.fault(status)?, status);
        // Says whose failure it is, unless the message does.
        let named = fault.message.contains(&child.label);
        Some(if named { fault } else { fault.from_origin(child.label.clone()) })
    };
    children.iter_mut().map(end).collect()
}

/// A trainer that falls over somebody else's failure leaves at once and without a word: its exit status alone tells.
fn by_status(fault: Fault, status: Option<ExitStatus>) -> Fault {
    let all = [ErrorCode::InvalidInput, ErrorCode::Unavailable, ErrorCode::Echo, ErrorCode::Interrupted];
    let is =
        |code: &ErrorCode| status.and_then(|status| status.code()) == Some(i32::from(code.exit_status()));
    match all.into_iter().find(is) {
        Some(ErrorCode::Echo) if fault.code != ErrorCode::Echo => {
            Fault::new(ErrorCode::Echo, "stopped because another process failed")
                .hint("the coordinator's log names it")
        }
        Some(code) => Fault { code, ..fault },
        None => fault,
    }
}

/// The node's outcome: a genuine failure counts most, then that it was asked to stop, then somebody else's failure.
fn outcome(mut faults: Vec<Fault>) -> Result<(), Fault> {
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
            spare_memory: false,
        }
    }

    #[test]
    fn ranks_of_a_node_follow_those_of_the_nodes_before_it() {
        let machine = Machine { cores: 16, gpus: 8 };
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
        let code = |faults: Vec<Fault>| outcome(faults).err().map(|fault| fault.code);
        let (echo, stopped) = (fault(ErrorCode::Echo), fault(ErrorCode::Interrupted));
        let bad_input = fault(ErrorCode::InvalidInput);
        assert_eq!(code(vec![echo.clone(), stopped.clone(), bad_input]), Some(ErrorCode::InvalidInput));
        assert_eq!(code(vec![echo.clone(), stopped]), Some(ErrorCode::Interrupted));
        assert_eq!((code(vec![echo]), code(vec![])), (Some(ErrorCode::Echo), None));
    }

    #[test]
    fn a_coordinator_needs_scheme_host_and_port() {
        assert_eq!(host_and_port("https://dyad-coordinator:29400"), Ok("dyad-coordinator:29400".into()));
        assert_eq!(host_and_port("http://[::1]:1/"), Ok("[::1]:1".into()));
        for bad in ["dyad-coordinator:29400", "http://host", "http://:29400", "http://host:99999", ""] {
            assert!(host_and_port(bad).is_err(), "{bad}");
        }
    }
}
