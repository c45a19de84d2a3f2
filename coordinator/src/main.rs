//! `coordinator`: parses flags, checks the input, binds the port, announces it, serves the run, reports its outcome.
// Tests read files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dyad_coordinator::cli::{CoordinatorCli, Prepared, Task};
use dyad_coordinator::handle::RunHandle;
use dyad_coordinator::health::Health;
use dyad_coordinator::observe::Observer;
use dyad_coordinator::observe::endpoint::Endpoint;
use dyad_coordinator::run::Run;
use dyad_coordinator::server::{self, Port, ServedRun, Signals};
use dyad_coordinator::wire::{Guard, listen};
use dyad_proto::finished::ended_early;
use dyad_proto::security::by_hand::Published;
use dyad_proto::silence::{self, Silence};
use dyad_proto::{Fault, files, reading};
use dyad_telemetry::{Logs, TARGET, Telemetry};
use tokio::net::TcpListener;
use tokio::time::MissedTickBehavior;
use tracing::Instrument;

fn main() -> ExitCode {
    let cli: CoordinatorCli = dyad_telemetry::command_line();
    dyad_proto::signals::ignore_size_limit();
    // Held until the exit status is known, so that the last log lines and spans are sent too.
    let _telemetry = Telemetry::start(
        "coordinator",
        Logs { format: cli.log_format, variable: "DYAD_LOG", default: "info" },
    );
    match coordinate(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            dyad_telemetry::last_words(&fault);
            ExitCode::from(fault.code.exit_status())
        }
    }
}

fn coordinate(cli: &CoordinatorCli) -> Result<(), Fault> {
    files::enough_may_be_open()?;
    // The coordinator shares the machine with trainers that need every core.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| {
        Fault::failed(format!("cannot start the async runtime: {error}"))
            .hint("raise the limits of open files (ulimit -n) and of processes (ulimit -u)")
    })?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::watch()?;
        let guard = Guard::load(cli.tls_dir.as_deref(), cli.token_file.as_deref())?;
        let health = Health::listen(cli.health_listen.as_deref()).await?;
        let prepared = match prepare(cli.clone(), &mut signals).await? {
            Task::Run(prepared) => *prepared,
            Task::Complete(model) => return complete(cli, &model, &mut signals, guard, health).await,
        };
        let (span, mut endpoint) = (run_span(), None);
        let served = serve(cli, prepared, signals, guard, health, &mut endpoint);
        let served = served.instrument(span.clone()).await;
        dyad_telemetry::conclude(&span, &served);
        // The run is over; `serve` has released its folder.
        drop(span);
        if let Some(endpoint) = endpoint {
            endpoint
                .last_scrape(Duration::from_secs(cli.observation.metrics_linger), server::hurried())
                .await;
        }
        served
    });
    // A stream that a peer keeps open must not keep the process alive.
    runtime.shutdown_background();
    outcome
}

/// Reads and checks the data, which may take minutes. Fails on a signal, or if reading makes no progress.
async fn prepare(cli: CoordinatorCli, signals: &mut Signals) -> Result<Task, Fault> {
    let (beats, limit) = (cli.announce_preparing, reading_limit(cli.observation.stall_timeout));
    let mut prepared = tokio::task::spawn_blocking(move || cli.prepare());
    let mut ticks = tokio::time::interval(silence::TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seconds = 0_u64;
    let (mut still, mut parts) = (Silence::default(), reading::parts());
    loop {
        tokio::select! {
            biased;
            prepared = &mut prepared => return prepared
                .unwrap_or_else(|error| Err(Fault::failed(format!("reading the data ended: {error}")))),
            fault = signals.next() => return Err(fault),
            _ = ticks.tick() => {
                if parts != reading::parts() {
                    parts = reading::parts();
                    still.broken();
                } else if limit.is_some_and(|limit| still.lasts(limit)) {
                    return Err(hangs(limit.unwrap_or_default()));
                }
                if beats {
                    say(&serde_json::json!({ "preparing": seconds }))?;
                    seconds += 1;
                }
            }
        }
    }
}

/// Longest time without a byte read, in seconds; `None` for `--stall-timeout 0`. The default of 20 minutes allows for a cold network
/// file system, which may pause for minutes.
fn reading_limit(stall_timeout: Option<u64>) -> Option<u32> {
    let seconds = stall_timeout.unwrap_or(20 * 60);
    (seconds > 0).then(|| u32::try_from(seconds).unwrap_or(u32::MAX))
}

fn hangs(seconds: u32) -> Fault {
    let last = reading::last_opened().map_or_else(String::new, |path| format!(" of {}", path.display()));
    Fault::failed(format!("reading{last} stands still: nothing was read for {seconds} s"))
        .hint("check the disk that holds the file; --stall-timeout SECONDS allows longer pauses, 0 any")
}

/// The root span of the run; a child of the launcher's span if the environment names one.
fn run_span() -> tracing::Span {
    let span = tracing::info_span!(
        target: TARGET, "run",
        train.run.id = tracing::field::Empty, train.world_size = tracing::field::Empty
    );
    if let Some(parent) = dyad_telemetry::environment() {
        dyad_telemetry::adopt(&span, &parent);
    }
    span
}

/// Binds the port; the published token must be held while the port is open.
async fn open(cli: &CoordinatorCli, guard: &mut Guard) -> Result<(TcpListener, Option<Published>), Fault> {
    let listener = listen::bind(&cli.listen, "--listen").await?;
    guard.allows(address(&listener)?, cli.insecure)?;
    let published = guard.complete(address(&listener)?)?;
    Ok((listener, published))
}

async fn serve(
    cli: &CoordinatorCli,
    prepared: Prepared,
    signals: Signals,
    mut guard: Guard,
    health: Health,
    endpoint: &mut Option<Endpoint>,
) -> Result<(), Fault> {
    let (listener, _published) = open(cli, &mut guard).await?;
    let metrics = match &cli.observation.metrics_listen {
        Some(address) => Some(listen::bind(address, "--metrics-listen").await?),
        None => None,
    };
    // Held until no task writes to the folder any more.
    let owner = prepared.owner.clone();
    let (spec, output) = cli.start(prepared)?;
    owner.name_run(&spec.run_id);
    let observer = Observer::new(&spec, cli.sampling(), metrics.is_some());
    let span = tracing::Span::current();
    span.record("train.run.id", spec.run_id.as_str());
    span.record("train.world_size", spec.world_size);
    let run = Run::new(spec, Instant::now());
    let (handle, inputs) = RunHandle::new(Some(output.dir().to_owned()));
    announce(address(&listener)?, metrics.as_ref().map(address).transpose()?)?;
    *endpoint = metrics
        .zip(observer.metrics())
        .map(|(listener, metrics)| Endpoint::open(listener, metrics, handle.clone()));
    health.serving().await;
    let port = Port { listener, guard, health };
    let job = ServedRun { run, output, observer, handle, inputs };
    server::serve(port, job, signals, cli.print_events).await
}

fn address(listener: &TcpListener) -> Result<SocketAddr, Fault> {
    listener.local_addr().map_err(unsaid)
}

/// Prints the line on standard output by which the launcher finds the port.
fn announce(listening: SocketAddr, metrics: Option<SocketAddr>) -> Result<(), Fault> {
    let mut line = serde_json::json!({ "listening": listening.to_string() });
    if let Some(metrics) = metrics {
        tracing::info!("metrics at http://{metrics}/metrics, status at http://{metrics}/status");
        line["metrics"] = metrics.to_string().into();
    }
    say(&line)
}

/// Handles a resumed run that is complete already: tells the launcher on standard output and people in the log. With
/// `--tell-trainers` it also serves until every trainer has been told.
async fn complete(
    cli: &CoordinatorCli,
    model: &Path,
    signals: &mut Signals,
    mut guard: Guard,
    health: Health,
) -> Result<(), Fault> {
    tracing::info!("this run is complete: {}{}", model.display(), ended_early(model));
    if let Err(fault) = say(&serde_json::json!({ "complete": model })) {
        // The run is complete all the same.
        tracing::warn!("{fault}");
    }
    if !cli.tell_trainers {
        return Ok(());
    }
    let (listener, _published) = open(cli, &mut guard).await?;
    health.serving().await;
    let patience = Duration::from_secs(cli.join_timeout_seconds);
    server::tell_complete(Port { listener, guard, health }, cli.world_size, patience, signals).await
}

/// Writes one line to standard output.
fn say(line: &serde_json::Value) -> Result<(), Fault> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).map_err(unsaid)
}

fn unsaid(error: std::io::Error) -> Fault {
    Fault::failed(format!("cannot say where the coordinator listens: {error}"))
}
