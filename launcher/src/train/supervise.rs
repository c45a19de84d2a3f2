//! Supervises one attempt at a run: starts coordinator and trainers, follows them, and stops all when one fails.
//!
//! - LNC-L1: the first genuine failure is reported, not the failures that it causes.
//! - LNC-L2: when [`run`] returns, no child is left.
//! - LNC-L3: one Ctrl-C ends the run within the grace period and [`LEAVE`], even if the processes ignore it.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;

use dyad_proto::fault::Process;
use dyad_proto::run_folder::{self, METRICS};
use dyad_proto::silence::{self, Silence};
use dyad_proto::wire::run_event::Body;
use dyad_proto::{ErrorCode, Fault};
use futures::StreamExt;

use crate::hosts::child::{Child, SignalSender, outcomes};
use crate::process::os::end;
use crate::show::console::{Console, warn};
use crate::show::progress::Progress;
use crate::show::reached::Reached;
use crate::train::events::Events;
pub use crate::train::fleet::Job;
use crate::train::fleet::{Fleet, LEAVE, start_trainer};
use crate::train::interrupt::{self, Interrupt};

/// How long the coordinator may take to name the cause after a trainer has failed; it holds echoes back for three seconds.
const VERDICT: Duration = Duration::from_secs(6);

/// How long processes may take to end once the run is complete. All files are written by then.
const WAY_OUT: Duration = Duration::from_secs(10);

/// Starts the job and returns when it is over and all its processes have ended. After a signal the run has the grace period to end.
/// Stores the progress in `reached`.
pub async fn run(
    job: &Job<'_>,
    console: &Console,
    interrupt: &mut Interrupt,
    grace: Duration,
    reached: &mut Reached,
) -> Result<(), Fault> {
    let mut fleet = Fleet::start(job, console).await?;
    let coordinator = fleet.coordinator.signals();
    let over = {
        let following = std::pin::pin!(follow(job, console, &mut fleet, reached));
        until_over(following, &coordinator, console, interrupt, grace).await
    };
    console.clear();
    let result = match over {
        Over::Ended(result) => result,
        Over::Overdue(signal) => {
            let signal = interrupt::name(signal);
            let late = format!(
                "stopped by {signal}: the run had not ended {} s later, and was killed",
                grace.as_secs()
            );
            let hint = format!("{}; --grace-period gives it more time", how_to_go_on(job));
            Err(Fault::new(ErrorCode::Interrupted, late).hint(hint))
        }
        Over::Hurried => {
            at_once(&mut fleet, console).await;
            let cut = "stopped at once, without another checkpoint";
            return Err(Fault::new(ErrorCode::Interrupted, cut).hint(how_to_go_on(job)));
        }
    };
    if let Err(fault) = &result {
        // SIGQUIT ends the run without a checkpoint. The coordinator passes it on to the trainers.
        coordinator.send(libc::SIGQUIT);
        show_last_lines(fault, &fleet, console);
    }
    tokio::select! {
        () = fleet.stop(job.last_scrape) => {}
        _ = interrupt.wait() => at_once(&mut fleet, console).await,
    }
    result.map_err(|fault| advised(fault, job))
}

/// Advice by the files in the output folder. A folder on another host cannot be read from here.
fn how_to_go_on(job: &Job<'_>) -> String {
    run_folder::how_to_go_on_in(job.output_dir)
}

/// Adds advice on how to go on, if training had begun and the hint has none. The coordinator adds its own, unless it died.
fn advised(fault: Fault, job: &Job<'_>) -> Fault {
    let known = ["--resume", "--overwrite"].iter().any(|flag| fault.hint.contains(flag));
    let trained = std::fs::metadata(job.output_dir.join(METRICS)).is_ok_and(|rows| rows.len() > 0);
    if fault.code != ErrorCode::Failed || known || !trained {
        return fault;
    }
    let advice = how_to_go_on(job);
    let hint = if fault.hint.is_empty() { advice } else { format!("{}; {advice}", fault.hint) };
    Fault { hint, ..fault }
}

async fn at_once(fleet: &mut Fleet, console: &Console) {
    console.line("stopping at once");
    fleet.kill().await;
}

/// How following the run ended.
enum Over {
    /// The run ended, by itself or after a signal.
    Ended(Result<(), Fault>),
    /// The grace period after this signal has passed.
    Overdue(i32),
    /// A second signal came: end the run at once.
    Hurried,
}

async fn until_over(
    mut following: Pin<&mut impl Future<Output = Result<(), Fault>>>,
    coordinator: &SignalSender,
    console: &Console,
    interrupt: &mut Interrupt,
    grace: Duration,
) -> Over {
    let signal = tokio::select! {
        result = &mut following => return Over::Ended(result),
        signal = interrupt.wait() => signal,
    };
    coordinator.send(signal);
    console.line(&format!(
        "stopping after the step in progress, with a checkpoint: waiting up to {} s for the coordinator and its trainers; \
         press Ctrl-C again to stop at once",
        grace.as_secs()
    ));
    tokio::select! {
        result = following => Over::Ended(result),
        _ = interrupt.wait() => Over::Hurried,
        () = tokio::time::sleep(grace) => Over::Overdue(signal),
    }
}

/// Shows the last log lines of the process that failed first.
fn show_last_lines(fault: &Fault, fleet: &Fleet, console: &Console) {
    if fault.code != ErrorCode::Failed {
        return;
    }
    let mut children = fleet.trainers.iter().chain([&fleet.coordinator]);
    let culprit = children.find(|child| Some(&child.process) == fault.process.as_ref());
    let Some(culprit) = culprit else { return };
    let tail = culprit.tail();
    if !tail.is_empty() {
        console.line(&format!("last lines of {}:", culprit.label));
        tail.iter().for_each(|line| console.line(&format!("  {line}")));
    }
}

async fn follow(
    job: &Job<'_>,
    console: &Console,
    fleet: &mut Fleet,
    reached: &mut Reached,
) -> Result<(), Fault> {
    let patience = silence::limit(silence::COORDINATOR, job.stall_timeout);
    let address = match announced(job, &mut fleet.coordinator, patience).await? {
        Announced::Listening(address) => address,
        Announced::Complete(model) => {
            console.line(&format!("this run is complete: {model}"));
            everyone_left(fleet, Duration::ZERO).await;
            return Ok(());
        }
    };
    for trainer in job.trainers {
        fleet.trainers.push(start_trainer(job, trainer, &address, console).await?);
    }
    let watching = tokio::time::timeout(silence::TICK * patience, Events::of(job.security, &address));
    let mut events = match watching.await {
        Ok(Ok(events)) => events,
        Ok(Err(fault)) => return Err(own_words(&mut fleet.coordinator, fault).await),
        Err(_) => return Err(stopped(&fleet.coordinator, job, patience)),
    };
    let mut progress = (
        Progress::new(console.clone(), Some(job.plot.clone())),
        Awaited::new(job, &fleet.trainers, patience),
    );
    let failure = tokio::select! {
        outcome = show(&mut events, &mut progress) => outcome,
        failed = first_failure(&mut fleet.trainers) => {
            // Ask the coordinator for the cause: this failure may be an echo of another one.
            tokio::time::timeout(VERDICT, show(&mut events, &mut progress)).await.unwrap_or(Outcome::Silent).or(failed)
        }
        // If the host is cut off, the event stream stays silent for a long time.
        fault = fleet.coordinator.lost() => {
            let fault = fault.from_origin(fleet.coordinator.label.clone());
            Outcome::Failed(fault.of_process(&Process::Coordinator))
        }
    };
    *reached = progress.0.reached;
    match failure {
        Outcome::Complete => {
            if !job.last_scrape.is_zero() {
                console.line(&format!(
                    "complete; if Prometheus has been reading the metrics, it has up to {} s to read how the run ended; Ctrl-C ends the wait",
                    job.last_scrape.as_secs()
                ));
            }
            everyone_left(fleet, job.last_scrape).await;
            Ok(())
        }
        Outcome::Failed(fault) => Err(with_signal(fault, fleet).await),
        Outcome::Standing => Err(stopped(&fleet.coordinator, job, patience)),
        // The stream broke before the run ended, so the coordinator is dead or unreachable.
        Outcome::Silent => {
            let early = Fault::lost("the coordinator fell silent before the run was complete");
            Err(own_words(&mut fleet.coordinator, early).await)
        }
    }
}

/// How the event stream ended.
enum Outcome {
    Complete,
    Failed(Fault),
    /// The stream broke.
    Silent,
    /// The stream is open, but nothing came for too long.
    Standing,
}

/// Time limits of coordinator and joining trainers.
struct Awaited {
    /// Longest silence of the coordinator, in ticks.
    patience: u32,
    /// Trainers that have not joined, by name, with the error if they never do.
    joining: HashMap<String, Fault>,
    /// Time limit for joining, in ticks.
    most: u32,
    waited: Silence,
}

impl Awaited {
    fn new(job: &Job<'_>, children: &[Child], patience: u32) -> Self {
        let most = joining_limit(job.connect_timeout, job.stall_timeout);
        let joining = job.trainers.iter().zip(children).map(|(trainer, child)| {
            let host = job.hosts.map(|hosts| hosts.agent(trainer.node).host.name.clone());
            let host = host.unwrap_or_else(|| "this machine".into());
            let fault = Fault::lost(format!(
                "{} on {host} is silent: it has not joined the run for {most} s, though its process is there",
                child.label
            ));
            let hint = "was it stopped (SIGSTOP), or does the disk that Dyad and libtorch lie on hang?";
            let fault = fault.of_process(&child.process);
            (trainer.name.clone(), fault.hint(format!("{hint} {}", child.log_hint())))
        });
        Self { patience, joining: joining.collect(), most, waited: Silence::default() }
    }

    fn arrived(&mut self, name: &str) {
        self.joining.remove(name);
    }

    /// Counts a tick. After the time limit returns the error of a trainer that has not joined, first by name.
    fn overdue(&mut self) -> Option<Fault> {
        let late = !self.joining.is_empty() && self.waited.lasts(self.most);
        let first = self.joining.keys().min().filter(|_| late)?.clone();
        self.joining.remove(&first)
    }
}

/// Seconds that a trainer has to load, connect and get an answer. At least 20, because loading from a cold disk is slow, even with a
/// small `--stall-timeout`.
fn joining_limit(connect_timeout: u64, stall_timeout: Option<u64>) -> u32 {
    const LOADED: u32 = 20;
    let connected = u32::try_from(connect_timeout).unwrap_or(u32::MAX);
    let usual = connected.saturating_add(silence::COORDINATOR);
    silence::limit(usual, stall_timeout).max(LOADED)
}

impl Outcome {
    /// The coordinator's outcome; if it gave none, a trainer's genuine failure.
    fn or(self, trainer: Fault) -> Self {
        match self {
            Self::Silent if trainer.code != ErrorCode::Echo => Self::Failed(trainer),
            known => known,
        }
    }
}

/// Shows events until the run ends. Silence is counted in ticks of this process, so that stopping the launcher (Ctrl-Z) does not make
/// the others look silent.
async fn show(events: &mut Events, (progress, awaited): &mut (Progress, Awaited)) -> Outcome {
    let mut ticks = tokio::time::interval(silence::TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut silence = Silence::default();
    loop {
        let event = tokio::select! {
            biased;
            event = events.next() => event,
            _ = ticks.tick() => {
                if silence.lasts(awaited.patience) {
                    return Outcome::Standing;
                }
                match awaited.overdue() {
                    Some(fault) => return Outcome::Failed(fault),
                    None => continue,
                }
            }
        };
        silence.broken();
        let Some(event) = event else { return Outcome::Silent };
        match event.body {
            Some(Body::Ended(ended)) => {
                return ended.failure.map_or(Outcome::Complete, |failure| Outcome::Failed(failure.into()));
            }
            Some(body) => {
                if let Body::Arrived(arrived) = &body {
                    awaited.arrived(&arrived.name);
                }
                progress.show(&body);
            }
            None => {}
        }
    }
}

/// Kills a silent coordinator and returns the error. SIGKILL, because a stopped process handles no other signal; the trainers end when
/// its connections close.
fn stopped(coordinator: &Child, job: &Job<'_>, seconds: u32) -> Fault {
    coordinator.signal(libc::SIGKILL);
    let node = job.hosts.and_then(|hosts| Some(&hosts.agent(hosts.coordinator_node()?).host.name));
    let host = node.map_or_else(|| "this machine".to_owned(), Clone::clone);
    Fault::lost(format!(
        "the {} on {host} is silent: no sign of life for {seconds} s, though its process is there",
        coordinator.label
    ))
    .of_process(&Process::Coordinator)
    .hint(format!(
        "was it stopped (SIGSTOP), or does the disk under output_dir hang? {}",
        coordinator.log_hint()
    ))
}

/// Resolves when a trainer fails; never resolves if all succeed.
async fn first_failure(trainers: &mut [Child]) -> Fault {
    let mut outcomes = outcomes(trainers);
    while let Some(outcome) = outcomes.next().await {
        if let Err(fault) = outcome {
            return fault;
        }
    }
    std::future::pending().await
}

/// Waits for all processes to end after a complete run; kills those that do not. The model is complete, so failures are only warnings.
/// The coordinator may first wait for a last scrape.
async fn everyone_left(fleet: &mut Fleet, last_scrape: Duration) {
    let way_out = WAY_OUT + last_scrape;
    if tokio::time::timeout(way_out, fleet.ended()).await.is_err() {
        for child in fleet.all().filter(|child| !child.has_ended()) {
            let late = way_out.as_secs();
            warn(&format!(
                "{} is still there {late} s after the run was complete, and is ended",
                child.label
            ));
        }
        fleet.kill().await;
        return;
    }
    for child in fleet.all() {
        match child.outcome().await {
            Err(fault) if fault.code != ErrorCode::Echo => {
                warn(&format!("once the run was complete: {fault}"))
            }
            _ => {}
        }
    }
}

/// The fault that the coordinator's end reports, or `from_here` if it has none.
async fn own_words(coordinator: &mut Child, from_here: Fault) -> Fault {
    let status = tokio::time::timeout(LEAVE, coordinator.ended()).await.ok().flatten();
    let fault = coordinator.fault(status).unwrap_or_else(|| match from_here.hint.is_empty() {
        true => from_here.hint(coordinator.log_hint()),
        false => from_here,
    });
    fault.of_process(&Process::Coordinator)
}

/// Adds the signal that killed the process. The coordinator only sees that the connection closed.
async fn with_signal(fault: Fault, fleet: &mut Fleet) -> Fault {
    for child in &mut fleet.trainers {
        if !fault.connection_closed || Some(&child.process) != fault.process.as_ref() {
            continue;
        }
        if let Ok(Some(status)) = tokio::time::timeout(LEAVE, child.ended()).await
            && std::os::unix::process::ExitStatusExt::signal(&status).is_some()
        {
            return Fault { message: format!("{} ({})", fault.message, end(status)), ..fault };
        }
    }
    fault
}

/// The coordinator's announcement on standard output.
enum Announced {
    /// Address that it listens on.
    Listening(String),
    /// Model folder of a resumed run that is already complete.
    Complete(String),
}

/// Waits for the announcement. While the coordinator reads the data, which may take long, it prints heartbeats; silence is an error.
async fn announced(job: &Job<'_>, coordinator: &mut Child, patience: u32) -> Result<Announced, Fault> {
    let mut ticks = tokio::time::interval(silence::TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut silence = Silence::default();
    loop {
        let line = tokio::select! {
            biased;
            line = coordinator.next_line() => line,
            _ = ticks.tick() => match silence.lasts(patience) {
                true => return Err(stopped(coordinator, job, patience)),
                false => continue,
            },
        };
        silence.broken();
        let json: Option<serde_json::Value> = line.and_then(|line| serde_json::from_str(&line).ok());
        let says = |key: &str| json.as_ref()?.get(key)?.as_str().map(str::to_owned);
        let listening = says("listening").map(Announced::Listening);
        if let Some(announced) = listening.or_else(|| says("complete").map(Announced::Complete)) {
            coordinator.close_output();
            return Ok(announced);
        }
        if json.is_none_or(|json| json.get("preparing").is_none()) {
            let mute = Fault::failed("the coordinator did not say where it listens");
            return Err(own_words(coordinator, mute).await);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trainer_that_joins_too_late_is_named() {
        assert_eq!(joining_limit(30, None), 90);
        assert_eq!(joining_limit(30, Some(5)), 20);
        assert_eq!(joining_limit(30, Some(40)), 40);
        assert_eq!(joining_limit(u64::MAX, Some(0)), u32::MAX);
        let joining = ["b", "a"].map(|name| (name.to_owned(), Fault::lost(name)));
        let mut awaited =
            Awaited { patience: 1, joining: joining.into(), most: 2, waited: Silence::default() };
        awaited.arrived("a");
        assert_eq!((awaited.overdue(), awaited.overdue()), (None, None));
        assert_eq!(awaited.overdue(), Some(Fault::lost("b")));
        assert_eq!(awaited.overdue(), None, "no other trainer is awaited");
    }
}
