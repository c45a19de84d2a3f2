//! `coordinator`: parse, check, bind, announce, serve, say how it ended.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use dyad_coordinator::cli::{Cli, LogFormat, Prepared};
use dyad_coordinator::health::Health;
use dyad_coordinator::run::Run;
use dyad_coordinator::server::{self, Port, Signals};
use dyad_coordinator::wire::Guard;
use dyad_proto::Fault;
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.log_format);
    match coordinate(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            // Nothing is left to do when standard error itself is gone.
            let _ = writeln!(std::io::stderr(), "{}", fault.report());
            ExitCode::from(fault.code.exit_status())
        }
    }
}

fn coordinate(cli: &Cli) -> Result<(), Fault> {
    // The coordinator shares the machine with trainers that need every core.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime =
        runtime.map_err(|error| Fault::failed(format!("cannot start the async runtime: {error}")))?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::watch()?;
        let guard = Guard::load(cli.tls_dir.as_deref())?;
        let health = Health::listen(cli.health_listen.as_deref()).await?;
        let prepared = prepare(cli.clone(), &mut signals).await?;
        let listener = server::bind("--listen", &cli.listen).await?;
        guard.allows(address(&listener)?, cli.insecure)?;
        let (spec, output) = cli.start(prepared)?;
        let run = Run::new(spec, Instant::now());
        announce(&listener)?;
        health.serving().await;
        let port = Port { listener, guard, health };
        server::serve(port, run, output, signals, cli.print_events).await
    });
    // A stream that a peer keeps open must not keep the process alive.
    runtime.shutdown_background();
    outcome
}

/// Reads the data, which may take long, and may be interrupted.
async fn prepare(cli: Cli, signals: &mut Signals) -> Result<Prepared, Fault> {
    let prepared = tokio::task::spawn_blocking(move || cli.prepare());
    tokio::select! {
        prepared = prepared => prepared
            .unwrap_or_else(|error| Err(Fault::failed(format!("reading the data ended: {error}")))),
        fault = signals.next() => Err(fault),
    }
}

fn address(listener: &TcpListener) -> Result<SocketAddr, Fault> {
    let address = listener.local_addr();
    address.map_err(|error| Fault::failed(format!("cannot say where the coordinator listens: {error}")))
}

/// The one line on standard output, by which the launcher finds the port.
fn announce(listener: &TcpListener) -> Result<(), Fault> {
    let line = serde_json::json!({ "listening": address(listener)?.to_string() });
    let mut stdout = std::io::stdout().lock();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    written.map_err(|error| Fault::failed(format!("cannot say where the coordinator listens: {error}")))
}

fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let builder = builder.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
