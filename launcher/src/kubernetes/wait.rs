//! `launcher kubernetes wait`: follows the run with the same progress view as on bare metal, and ends as it does.
//!
//! What is followed is the coordinator's log, where it writes the run's events: a log is there after the pod's end, is read again
//! from any point after a broken connection, and asks for no right beyond reading logs.

use std::time::Duration;

use dyad_proto::wire::run_event::Body;
use dyad_proto::{ErrorCode, Fault, ReportLine};
use dyad_telemetry::LogFormat;
use futures::{AsyncBufReadExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DynamicObject, LogParams};

use super::cli::WaitOptions;
use super::cluster::Cluster;
use super::events::event;
use super::state::{Phase, container_state, coordinator, phase, pod_lines, workload_lines};
use super::status;
use crate::show::console::{Console, Speaker};
use crate::show::progress::Progress;
use crate::train::interrupt::Interrupt;

/// Between two looks at the workload.
const AGAIN: Duration = Duration::from_secs(2);

/// Follows the run to its end.
pub async fn act(options: &WaitOptions) -> Result<(), Fault> {
    let cluster = Cluster::connect(&options.cluster, &options.run).await?;
    let mut interrupt = Interrupt::new()?;
    let console = Console::new(options.verbose, LogFormat::Text);
    let mut follower = Follower::new(&cluster, console.clone());
    let outcome = tokio::select! {
        outcome = follower.follow() => outcome,
        () = console.clone().show_held() => Ok(()),
        seconds = limit(options.timeout) => {
            Err(Fault::unavailable(format!("run {} has not ended within {seconds} s", cluster.name))
                .hint("it goes on; wait again, or look at `launcher kubernetes status`"))
        }
        _ = interrupt.wait() => {
            Err(Fault::new(ErrorCode::Interrupted, "stopped following the run; it goes on")
                .hint("`launcher kubernetes delete` stops and removes it"))
        }
    };
    console.clear();
    outcome
}

/// A run that was there and is gone has been deleted, which somebody wanted.
fn deleted(name: &str) -> Fault {
    Fault::new(ErrorCode::Interrupted, format!("run {name} was deleted while it was followed")).hint(
        "`launcher kubernetes apply` of the same run goes on from its last checkpoint if the output was kept",
    )
}

/// Resolves after so many seconds; never where there is no limit.
async fn limit(seconds: Option<u64>) -> u64 {
    let Some(seconds) = seconds else { return std::future::pending().await };
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    seconds
}

/// The code that the coordinator's container ended with.
fn exit_code(pods: &[Pod]) -> Option<ErrorCode> {
    let ended = container_state(coordinator(pods)?)?.terminated.as_ref()?;
    ErrorCode::of_exit_status(ended.exit_code)
}

/// Looks in a row that an API server may leave unanswered: it is restarted now and then, and the run does not mind.
const PATIENCE: u32 = 60;

struct Follower<'a> {
    cluster: &'a Cluster,
    console: Console,
    /// The coordinator's pod, and how many of its lines were read.
    reading: Option<(String, usize)>,
    progress: Progress,
    /// What the coordinator said at its end.
    failure: Option<Fault>,
    /// Shown last, so that a repeated state is not told again.
    told: String,
    /// The run was there at an earlier look.
    seen: bool,
}

impl<'a> Follower<'a> {
    fn new(cluster: &'a Cluster, console: Console) -> Self {
        let progress = Progress::new(console.clone(), None);
        Self { cluster, console, reading: None, progress, failure: None, told: String::new(), seen: false }
    }

    async fn follow(&mut self) -> Result<(), Fault> {
        let mut unanswered = 0;
        loop {
            let (workloads, pods) = match self.look().await {
                Err(fault) if fault.code == ErrorCode::Unavailable && unanswered < PATIENCE => {
                    unanswered += 1;
                    self.tell(format!("{fault}; asking again"));
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                seen => seen?,
            };
            unanswered = 0;
            if let Some(outcome) = self.take_in(&workloads, &pods).await {
                return outcome;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Reads what is new in the coordinator's log; says how the run ended, once it has.
    async fn take_in(&mut self, workloads: &[DynamicObject], pods: &[Pod]) -> Option<Result<(), Fault>> {
        // Taken before the log is read: what has ended by then has said its last word.
        let here = phase(workloads);
        let read = match coordinator(pods) {
            Some(pod) => self.read(pod).await.is_ok(),
            None => false,
        };
        let seen = std::mem::replace(&mut self.seen, !matches!(here, Phase::Absent));
        match here {
            Phase::Absent if seen => Some(Err(deleted(&self.cluster.name))),
            Phase::Absent => Some(Err(status::absent(self.cluster))),
            Phase::Complete => {
                self.console.clear();
                self.console.line(&format!("run {} is complete", self.cluster.name));
                Some(Ok(()))
            }
            Phase::Failed(reason) => Some(Err(self.failed(&reason, pods))),
            Phase::Active | Phase::Suspended => {
                // A log that cannot be read yet is no news; where the run stands is.
                if !read {
                    self.tell(format!("{}{}", workload_lines(workloads), pod_lines(pods)));
                }
                None
            }
        }
    }

    async fn look(&self) -> Result<(Vec<DynamicObject>, Vec<Pod>), Fault> {
        Ok((self.cluster.workloads().await?, self.cluster.run_pods().await?))
    }

    fn tell(&mut self, text: String) {
        if text != self.told {
            text.lines().for_each(|line| self.console.line(line));
            self.told = text;
        }
    }

    /// Reads on in a pod's log until it ends or breaks off.
    async fn read(&mut self, pod: &Pod) -> Result<(), String> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let name = pod.metadata.name.clone().unwrap_or_default();
        if self.reading.as_ref().is_none_or(|(known, _)| *known != uid) {
            if self.reading.is_some() {
                self.console.clear();
                self.console.line("the run was started again");
            }
            self.reading = Some((uid, 0));
            self.progress = Progress::new(self.console.clone(), None);
            self.failure = None;
        }
        let done = self.reading.as_ref().map_or(0, |(_, lines)| *lines);
        let parameters = LogParams { follow: true, ..Default::default() };
        let stream =
            self.cluster.pods().log_stream(&name, &parameters).await.map_err(|error| error.to_string())?;
        let mut lines = stream.lines();
        let mut at = 0;
        while let Some(line) = lines.try_next().await.map_err(|error| error.to_string())? {
            at += 1;
            if at > done {
                self.line(&line);
                self.reading.iter_mut().for_each(|(_, lines)| *lines = at);
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &str) {
        match event(line) {
            Some(Body::Ended(ended)) => self.failure = ended.failure.map(Fault::from),
            Some(body) => self.progress.show(&body),
            None => match ReportLine::read(line) {
                Some(ReportLine::Error(words)) => self.ended_with(Fault::failed(words)),
                Some(ReportLine::Stopped(words)) => {
                    self.ended_with(Fault::new(ErrorCode::Interrupted, words));
                }
                Some(ReportLine::Hint(hint)) => {
                    self.failure = self.failure.take().map(|fault| fault.hint(hint))
                }
                None => self.console.log(&Speaker { node: "coordinator".into(), rank: None }, line),
            },
        }
    }

    fn ended_with(&mut self, fault: Fault) {
        self.failure = Some(fault.from_origin("coordinator"));
    }

    /// The coordinator's account of the failure, or the controller's.
    fn failed(&self, reason: &str, pods: &[Pod]) -> Fault {
        let hint = "all lines: `launcher kubernetes logs`";
        match self.failure.clone().filter(|fault| fault.code != ErrorCode::Interrupted) {
            // What a log says has lost its code; the container's exit status has kept it.
            Some(fault) => Fault { code: exit_code(pods).unwrap_or(fault.code), ..fault },
            None => {
                self.console.line(pod_lines(pods).trim_end());
                Fault::failed(format!("run {} failed: {reason}", self.cluster.name)).hint(hint)
            }
        }
    }
}
