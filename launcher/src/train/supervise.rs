//! Runs a plan: starts coordinator and trainers, follows them, and stops everything when one fails.
//!
//! - LNC-L1: the first genuine failure is the one that is reported; what fails because of it is not.
//! - LNC-L2: when [`run`] returns, no child is left.
//! - LNC-L3: one Ctrl-C ends the run within the grace period and [`LEAVE`], whatever the processes do.

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

/// How long the coordinator may take to name the cause after a process has failed: it holds echoes back for three seconds.
const VERDICT: Duration = Duration::from_secs(6);

/// How long processes may take to leave once the run is complete. What there is to write is written by then.
const WAY_OUT: Duration = Duration::from_secs(10);

/// Starts the job and returns when it is over and nothing of it is left. Once interrupted the run has the grace period to end.
/// What the run came to is noted in `reached`.
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
        // At once, not by way of a checkpoint. The coordinator tells the trainers; one that has ended takes no notice.
        coordinator.send(libc::SIGQUIT);
        show_last_lines(fault, &fleet, console);
    }
    tokio::select! {
        () = fleet.stop(job.last_scrape) => {}
        _ = interrupt.wait() => at_once(&mut fleet, console).await,
    }
    result.map_err(|fault| advised(fault, job))
}

/// By what lies in the folder. On another host that is not seen from here.
fn how_to_go_on(job: &Job<'_>) -> String {
    run_folder::how_to_go_on_in(job.output_dir)
}

/// The coordinator says itself what is left of a run, unless it died of it.
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

/// Why nobody follows the run any more.
enum Over {
    /// It has ended by itself, or as it was asked to.
    Ended(Result<(), Fault>),
    /// It was asked to end by this signal, and has not.
    Overdue(i32),
    /// It is to be ended at once.
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

/// What the process that failed first had to say before.
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
            // The coordinator may know better: this one may have fallen over somebody else's failure.
            tokio::time::timeout(VERDICT, show(&mut events, &mut progress)).await.unwrap_or(Outcome::Silent).or(failed)
        }
        // A connection to a host that is cut off says nothing for a long time.
        fault = fleet.coordinator.lost() => Outcome::Failed(fault.from_origin(fleet.coordinator.label.clone()).of_process(&Process::Coordinator)),
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
        // The stream broke before the run ended: the coordinator is gone, or as good as that.
        Outcome::Silent => {
            let early = Fault::lost("the coordinator fell silent before the run was complete");
            Err(own_words(&mut fleet.coordinator, early).await)
        }
    }
}

/// How a run ended, as far as the stream of events tells.
enum Outcome {
    Complete,
    Failed(Fault),
    Silent,
    /// The stream is there, and nothing comes.
    Standing,
}

/// Who has to be heard of, and for how long they may not be.
struct Awaited {
    /// Of the coordinator, in ticks.
    patience: u32,
    /// Trainers that have not joined, by name, with what is said of one that never does.
    joining: HashMap<String, Fault>,
    /// How long that may take.
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

    /// A tick has passed: the first of those that have not joined, once it is too late for that.
    fn overdue(&mut self) -> Option<Fault> {
        let late = !self.joining.is_empty() && self.waited.lasts(self.most);
        let first = self.joining.keys().min().filter(|_| late)?.clone();
        self.joining.remove(&first)
    }
}

/// Seconds in which a trainer joins: it is loaded, tries to connect, and is answered. Programs take a while from a cold disk, whatever
/// `--stall-timeout` says.
fn joining_limit(connect_timeout: u64, stall_timeout: Option<u64>) -> u32 {
    const LOADED: u32 = 20;
    let connected = u32::try_from(connect_timeout).unwrap_or(u32::MAX);
    let usual = connected.saturating_add(silence::COORDINATOR);
    silence::limit(usual, stall_timeout).max(LOADED)
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

/// Shows what happens. Time is counted in own ticks, so that a launcher that was stopped itself finds nobody silent.
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

/// A process that is stopped, or whose disk hangs, hears no polite signal; its trainers leave when its connections close.
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

/// Resolves when a trainer ends badly; never when all end well.
async fn first_failure(trainers: &mut [Child]) -> Fault {
    let mut outcomes = outcomes(trainers);
    while let Some(outcome) = outcomes.next().await {
        if let Err(fault) = outcome {
            return fault;
        }
    }
    std::future::pending().await
}

/// After a complete run every process leaves in good order. The model is there: one that dies on its way out, or does not find it,
/// changes nothing of that. The coordinator may wait for a last scrape first.
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

/// The coordinator's own account of its end, or what it looks like from here.
async fn own_words(coordinator: &mut Child, from_here: Fault) -> Fault {
    let status = tokio::time::timeout(LEAVE, coordinator.ended()).await.ok().flatten();
    let fault = coordinator.fault(status).unwrap_or_else(|| match from_here.hint.is_empty() {
        true => from_here.hint(coordinator.log_hint()),
        false => from_here,
    });
    fault.of_process(&Process::Coordinator)
}

/// The coordinator sees a connection close; the launcher knows which signal closed it.
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

/// What a coordinator says first.
enum Announced {
    Listening(String),
    /// The run that is resumed has nothing left to do, and its model lies here.
    Complete(String),
}

/// Until then it beats on its standard output: reading the data may take long, but not in silence.
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
    fn a_trainer_has_time_to_come_up_and_is_named_when_it_does_not() {
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
        assert_eq!(awaited.overdue(), None, "nobody else is awaited");
    }
}
