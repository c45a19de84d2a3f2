//! `launcher kubernetes wait`: follows the run with the same progress view as on bare metal, and ends with the run's status.
//!
//! It reads the run's events from the coordinator's log. A log outlives its container, can be read again after a broken connection, and
//! needs no permission beyond reading logs.

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

/// Time between two looks at the workload.
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

/// The error for a run that disappeared. Only a user deletes a run, so its code is `Interrupted`.
fn deleted(name: &str) -> Fault {
    Fault::new(ErrorCode::Interrupted, format!("run {name} was deleted while it was followed")).hint(
        "`launcher kubernetes apply` of the same run goes on from its last checkpoint if the output was kept",
    )
}

/// Resolves after `seconds`; never if it is `None`.
async fn limit(seconds: Option<u64>) -> u64 {
    let Some(seconds) = seconds else { return std::future::pending().await };
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    seconds
}

/// Error code of the coordinator's exit status; `None` if it has not ended.
fn exit_code(pods: &[Pod]) -> Option<ErrorCode> {
    let ended = container_state(coordinator(pods)?)?.terminated.as_ref()?;
    ErrorCode::of_exit_status(ended.exit_code)
}

/// Maximum number of unanswered looks in a row. API servers restart now and then, which does not affect the run.
const PATIENCE: u32 = 60;

struct Follower<'a> {
    cluster: &'a Cluster,
    console: Console,
    /// Uid of the coordinator's pod, and the number of log lines read.
    reading: Option<(String, usize)>,
    progress: Progress,
    /// Failure that the coordinator reported at its end.
    failure: Option<Fault>,
    /// Last state shown, so that an unchanged state is not shown again.
    told: String,
    /// The run existed at the last look.
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

    /// Reads new lines of the coordinator's log; returns the outcome if the run has ended.
    async fn take_in(&mut self, workloads: &[DynamicObject], pods: &[Pod]) -> Option<Result<(), Fault>> {
        // Take the phase before reading the log: if the run has ended, the log is complete.
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
                // The log cannot be read yet: show workload and pods instead.
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

    /// Reads new lines of a pod's log until it ends or the connection breaks.
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

    /// The failure that the coordinator reported, else the controller's reason.
    fn failed(&self, reason: &str, pods: &[Pod]) -> Fault {
        let hint = "all lines: `launcher kubernetes logs`";
        match self.failure.clone().filter(|fault| fault.code != ErrorCode::Interrupted) {
            // An error read from a plain log line has no code; the container's exit status has it.
            Some(fault) => Fault { code: exit_code(pods).unwrap_or(fault.code), ..fault },
            None => {
                self.console.line(pod_lines(pods).trim_end());
                Fault::failed(format!("run {} failed: {reason}", self.cluster.name)).hint(hint)
            }
        }
    }
}
