//! Entry point of the launcher: command line in, exit status out.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use dyad_proto::{ErrorCode, Fault, RunConfig};
use launcher::cli::{Command, CommandLine, NumaBinding, Options};
use launcher::console::Console;
use launcher::interrupt::Interrupt;
use launcher::numa::{Topology, allowed_cores};
use launcher::plan::{Machine, Trainer, trainers};
use launcher::security::Security;
use launcher::summary::Samples;
use launcher::supervise::Job;
use launcher::{dry_run, plot, predict, preflight, security, summary, supervise};

// One thread: children are tied to the life of the thread that starts them.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match act(CommandLine::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            let _ = writeln!(std::io::stderr(), "{}", fault.report());
            ExitCode::from(fault.code.exit_status())
        }
    }
}

async fn act(line: CommandLine) -> Result<(), Fault> {
    match (line.command, line.options) {
        (Some(Command::Plan(options)), _) => print(&predict::describe(&options)?),
        (None, Some(options)) => launch(&options).await,
        (None, None) => Err(Fault::input("nothing to do").hint("give --config FILE, or see --help")),
    }
}

async fn launch(options: &Options) -> Result<(), Fault> {
    let machine = Machine::here();
    let mut trainers = trainers(options.nodes, options.gpus_per_node, machine)?;
    if options.numa_binding == NumaBinding::Node {
        Topology::read(Path::new("/"), &allowed_cores()).bind(&mut trainers);
    }
    let config = preflight::check(options)?;
    if options.dry_run {
        return print(&dry_run::describe(&config, &trainers)?);
    }
    let mut interrupt = Interrupt::new()?;
    train(options, &config, &trainers, &mut interrupt).await?;
    tokio::select! {
        told = tell(options, &config, machine) => told,
        () = interrupt.wait() => Err(Fault::new(ErrorCode::Interrupted, "interrupted once the run was complete")
            .hint(format!("the model lies in {}", Path::new(&config.output_dir).join("final").display()))),
    }
}

/// What there is to say of a complete run.
async fn tell(options: &Options, config: &RunConfig, machine: Machine) -> Result<(), Fault> {
    let output_dir = Path::new(&config.output_dir);
    // The model is there: a plot or sample that fails must not make the run look failed.
    let plot = plot::draw(output_dir).unwrap_or_else(warn);
    print(&format!("\n{}", summary::table(output_dir, plot.as_deref())))?;
    let wanted =
        Samples { count: options.samples, max_new_tokens: options.max_new_tokens, threads: machine.cores };
    let samples = summary::samples(config, wanted).await.unwrap_or_else(warn);
    if samples.is_empty() { Ok(()) } else { print(&format!("\n{samples}")) }
}

fn warn<T: Default>(fault: Fault) -> T {
    let _ = writeln!(std::io::stderr(), "warning: {fault}");
    T::default()
}

async fn train(
    options: &Options,
    config: &RunConfig,
    trainers: &[Trainer],
    interrupt: &mut Interrupt,
) -> Result<(), Fault> {
    let reachable = security::is_reachable(&options.listen);
    let security = Security::new(options.security, reachable, security::given())?;
    let config_file = preflight::write_config(config)?;
    let console = Console::new(options.verbose);
    let flags = [("--resume", options.resume), ("--overwrite", options.overwrite)];
    let job = Job {
        config_file: &config_file,
        output_dir: Path::new(&config.output_dir),
        spares_memory: config.zero_stage > 0,
        trainers,
        listen: &options.listen,
        security: &security,
        profile: options.profile,
        coordinator_flags: flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag).collect(),
    };
    supervise::run(&job, &console, interrupt).await
}

fn print(text: &str) -> Result<(), Fault> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Fault::failed(format!("cannot write to standard output: {error}")))
}
