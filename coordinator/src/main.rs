//! `coordinator`: parse, check, bind, announce, serve, say how it ended.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use dyad_coordinator::cli::{Cli, LogFormat};
use dyad_coordinator::run::Run;
use dyad_coordinator::server::{self, Signals};
use dyad_proto::Fault;
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
    let prepared = cli.prepare()?;
    // The coordinator shares the machine with trainers that need every core.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime =
        runtime.map_err(|error| Fault::failed(format!("cannot start the async runtime: {error}")))?;
    let outcome = runtime.block_on(async {
        let listener = server::bind(&cli.listen).await?;
        let (spec, output) = cli.start(prepared)?;
        let run = Run::new(spec, Instant::now());
        let signals = Signals::watch()?;
        announce(&listener)?;
        server::serve(listener, run, output, signals, cli.print_events).await
    });
    // A stream that a peer keeps open must not keep the process alive.
    runtime.shutdown_background();
    outcome
}

/// The one line on standard output, by which the launcher finds the port.
fn announce(listener: &tokio::net::TcpListener) -> Result<(), Fault> {
    let address = listener.local_addr();
    let line = address.map(|address| serde_json::json!({ "listening": address.to_string() }));
    line.and_then(|line| {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{line}")?;
        stdout.flush()
    })
    .map_err(|error| Fault::failed(format!("cannot say where the coordinator listens: {error}")))
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
