//! Entry point of the launcher: command line in, exit status out.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use dyad_proto::{ErrorCode, Fault, RunConfig};
use dyad_telemetry::{LogFormat, Logs, TARGET, Telemetry};
use launcher::agent::machine::Hello;
use launcher::cli::{Command, CommandLine, NumaBinding, Options};
use launcher::console::{self, Console, print};
use launcher::hosts::options::HostOptions;
use launcher::hosts::{Hosts, environment};
use launcher::interrupt::Interrupt;
use launcher::numa::{Topology, allowed_cores};
use launcher::plan::{Machine, Trainer, trainers};
use launcher::preflight::NextConfig;
use launcher::security::{Security, SecurityOptions};
use launcher::summary::Samples;
use launcher::supervise::Job;
use launcher::{
    agent, doctor, dry_run, fit, hosts, kubernetes, node, plot, predict, preflight, security, slurm, summary,
    supervise,
};
use tracing::Instrument;

// One thread: children are tied to the life of the thread that starts them.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let line = CommandLine::parse();
    let format = line.options.as_ref().map_or(LogFormat::Text, |options| options.log_format);
    // Lines for people go through the console.
    let default = if format == LogFormat::Json { "info" } else { "warn" };
    // Held until the exit status is known: what happened last leaves the process too.
    let _telemetry = Telemetry::start("launcher", Logs { format, variable: "DYAD_LOG", default });
    match act(line).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            dyad_telemetry::last_words(&fault);
            ExitCode::from(fault.code.exit_status())
        }
    }
}

async fn act(line: CommandLine) -> Result<(), Fault> {
    match (line.command, line.options) {
        (Some(Command::Plan(options)), _) => print(&predict::describe(&options)?),
        (Some(Command::Kubernetes(options)), _) => kubernetes::act(options.command).await,
        (Some(Command::Node(options)), _) => node::run(&options).await,
        (Some(Command::Agent(options)), _) => agent::serve::serve(&options).await,
        (Some(Command::Doctor(options)), _) => doctor::run(&options).await,
        (Some(Command::Slurm(options)), _) => slurm::run(&options).await,
        (None, Some(options)) => launch(&options, (&line.hosts, line.security)).await,
        (None, None) => Err(Fault::input("nothing to do").hint("give --config FILE, or see --help")),
    }
}

async fn launch(options: &Options, (wanted, secured): (&HostOptions, SecurityOptions)) -> Result<(), Fault> {
    let Some((asked, transport)) = hosts::asked(wanted, options.nodes)? else {
        return launch_here(options, wanted, secured).await;
    };
    let config = preflight::load(options, true)?;
    let mut interrupt = Interrupt::new()?;
    let connecting = Hosts::connect(&asked, transport, wanted);
    let hosts = unless(&mut interrupt, "connecting to the hosts", connecting).await?;
    let result = launch_there((options, wanted, secured), &config, &hosts, &mut interrupt).await;
    hosts.close().await;
    result
}

/// Before anything is started: Ctrl-C ends what the launcher waits for.
async fn unless<T>(
    interrupt: &mut Interrupt,
    doing: &str,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    tokio::select! {
        done = work => done,
        () = interrupt.wait() => {
            Err(Fault::new(ErrorCode::Interrupted, format!("interrupted while {doing}")).hint("no run was started"))
        }
    }
}

async fn launch_here(options: &Options, wanted: &HostOptions, secured: SecurityOptions) -> Result<(), Fault> {
    let machine = Machine::here();
    let nodes = options.nodes.map_or(1, |nodes| nodes.max);
    let mut trainers = trainers(nodes, options.gpus_per_node, machine)?;
    if options.numa_binding == NumaBinding::Node {
        Topology::read(Path::new("/"), &allowed_cores()).bind(&mut trainers);
    }
    let config = preflight::load(options, false)?;
    preflight::look(&config, true, !options.resume && !options.overwrite)?;
    fit::check(options, &config, &trainers, &[Hello::here()])?;
    let listen = options.listen.as_deref().unwrap_or("127.0.0.1:0");
    if options.dry_run {
        let tls = security::describe(secured, listen, security::given())?;
        return print(&dry_run::describe(&config, &trainers, &tls)?);
    }
    let mut interrupt = Interrupt::new()?;
    let config_file = NextConfig(preflight::write_config(&config)?);
    let place = (&trainers[..], None, listen);
    train((options, wanted, secured), &config, &config_file.0, place, &mut interrupt)
        .instrument(launch_span())
        .await?;
    tokio::select! {
        told = tell(options, &config, machine) => told,
        () = interrupt.wait() => Err(Fault::new(ErrorCode::Interrupted, "interrupted once the run was complete")
            .hint(format!("the model lies in {}", Path::new(&config.output_dir).join("final").display()))),
    }
}

async fn launch_there(
    (options, wanted, secured): (&Options, &HostOptions, SecurityOptions),
    config: &RunConfig,
    hosts: &Hosts,
    interrupt: &mut Interrupt,
) -> Result<(), Fault> {
    let found = hosts.found();
    let numa = options.numa_binding == NumaBinding::Node;
    let trainers = hosts::plan::trainers(options.gpus_per_node, numa, &found)?;
    let hellos: Vec<Hello> = found.into_iter().map(|(_, hello)| hello).collect();
    fit::check(options, config, &trainers, &hellos)?;
    let listening = hosts.listen(options.listen.as_deref());
    let listen = unless(interrupt, "the hosts tried to reach each other", listening).await?;
    if options.dry_run {
        let tls = security::describe(secured, &listen, security::given())?;
        let on_first = hosts.coordinator_node().is_some();
        return print(&dry_run::describe_hosts(config, &trainers, (&listen, &tls), on_first));
    }
    let preparing = hosts.prepare(config, !options.resume && !options.overwrite);
    let config_file = NextConfig(unless(interrupt, "the hosts looked at the run's files", preparing).await?);
    // Logs are gathered on this machine, which may share no file system with the hosts.
    let output_dir = Path::new(&config.output_dir);
    preflight::make_logs(output_dir)?;
    let names: Vec<&str> = hosts.agents().iter().map(|agent| agent.host.name.as_str()).collect();
    let place = if hosts.coordinator_node().is_some() { names[0] } else { "this machine" };
    let count = trainers.len();
    Console::new(false, options.log_format)
        .line(&format!("hosts    {}: {count} trainers, coordinator on {place}", names.join(", ")));
    let place = (&trainers[..], Some(hosts), listen.as_str());
    train((options, wanted, secured), config, &config_file.0, place, interrupt)
        .instrument(launch_span())
        .await?;
    if output_dir.join("final").is_dir() {
        return tell(options, config, Machine::here()).await;
    }
    let host = &hosts.agent(0).host;
    print(&format!("\nmodel    {host}:{}\n", output_dir.join("final").display()))
}

/// The span that the run is part of, below whatever started the launcher.
fn launch_span() -> tracing::Span {
    let span = tracing::info_span!(target: TARGET, "launch");
    if let Some(parent) = dyad_telemetry::environment() {
        dyad_telemetry::adopt(&span, &parent);
    }
    span
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
    console::warn(&fault.to_string());
    T::default()
}

async fn train(
    (options, wanted, secured): (&Options, &HostOptions, SecurityOptions),
    config: &RunConfig,
    config_file: &Path,
    (trainers, hosts, listen): (&[Trainer], Option<&Hosts>, &str),
    interrupt: &mut Interrupt,
) -> Result<(), Fault> {
    let security = Security::new(secured, listen, security::given())?;
    let environment = environment::chosen(&wanted.env, &environment::here())?;
    let console = Console::new(options.verbose, options.log_format);
    let job = Job {
        config_file,
        output_dir: Path::new(&config.output_dir),
        trainers,
        listen,
        security: &security,
        profile: options.profile,
        coordinator_flags: coordinator_flags(options),
        hosts,
        environment: &environment,
        connect_timeout: options.connect_timeout,
        log_format: options.log_format,
    };
    let grace = Duration::from_secs(options.grace_period);
    tokio::select! {
        result = supervise::run(&job, &console, interrupt, grace) => result,
        () = console.clone().show_held() => Ok(()),
    }
}

fn coordinator_flags(options: &Options) -> Vec<String> {
    let mut flags = vec![format!("--trace-every={}", options.trace_every)];
    flags.extend(options.metrics_listen.iter().map(|address| format!("--metrics-listen={address}")));
    let set = [("--resume", options.resume), ("--overwrite", options.overwrite)];
    flags.extend(set.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.to_owned()));
    flags
}
