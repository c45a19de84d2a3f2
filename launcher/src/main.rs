//! Entry point of the launcher: command line in, exit status out.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use dyad_proto::folder::Folder;
use dyad_proto::ownership::Ownership;
use dyad_proto::{ErrorCode, Fault, RunConfig, files};
use dyad_telemetry::{LogFormat, Logs, TARGET, Telemetry};
use launcher::agent::machine::Hello;
use launcher::agent::run_files::{self, NextConfig};
use launcher::cli::{CommandLine, LauncherCommand};
use launcher::hosts::options::HostOptions;
use launcher::hosts::{Hosts, environment};
use launcher::placement::numa::{Topology, allowed_cores};
use launcher::placement::trainers::{self, Machine, Trainer, trainers};
use launcher::process::trainer_check;
use launcher::quickstart::QuickstartOptions;
use launcher::security::{Security, SecurityOptions};
use launcher::show::console::{self, Console, print};
use launcher::show::live_plot::LivePlot;
use launcher::show::reached::Reached;
use launcher::show::summary;
use launcher::show::summary::Samples;
use launcher::train::interrupt::Interrupt;
use launcher::train::options::{self, Earlier, NumaBinding, Options};
use launcher::train::restart::Restarts;
use launcher::train::supervise::Job;
use launcher::train::{dry_run, fit, supervise};
use launcher::{agent, doctor, hosts, kubernetes, node, predict, quickstart, security, slurm};
use tracing::Instrument;

/// How long hosts that a run has lost are tried again, and how often.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let line: CommandLine = dyad_telemetry::command_line();
    dyad_proto::signals::ignore_size_limit();
    let format = line.options.as_ref().map_or(LogFormat::Text, |options| options.log_format);
    // Lines for people go through the console.
    let default = if format == LogFormat::Json { "info" } else { "warn" };
    // Held until the exit status is known: what happened last leaves the process too.
    let _telemetry = Telemetry::start("launcher", Logs { format, variable: "DYAD_LOG", default });
    match runtime().and_then(|runtime| runtime.block_on(act(line))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            dyad_telemetry::last_words(&fault);
            ExitCode::from(fault.code.exit_status())
        }
    }
}

/// One thread: children are tied to the life of the thread that starts them.
fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    files::enough_may_be_open()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Fault::failed(format!("cannot start the async runtime: {error}"))
            .hint("raise the limits of open files (ulimit -n) and of processes (ulimit -u)")
    })
}

async fn act(line: CommandLine) -> Result<(), Fault> {
    match (line.command, line.options) {
        (Some(LauncherCommand::Plan(options)), _) => {
            let plan = predict::plan(&options)?;
            print(&plan.text)?;
            plan.verdict
        }
        (Some(LauncherCommand::Kubernetes(options)), _) => kubernetes::act(options.command).await,
        (Some(LauncherCommand::Node(options)), _) => node::run(&options).await,
        (Some(LauncherCommand::Agent(options)), _) => agent::serve::serve(&options).await,
        (Some(LauncherCommand::Doctor(options)), _) => doctor::run(&options).await,
        (Some(LauncherCommand::Slurm(options)), _) => slurm::run(&options).await,
        (Some(LauncherCommand::Quickstart(options)), _) => start_quickly(&options).await,
        (None, Some(options)) => {
            launch(RunRequest { options: &options, hosts: &line.hosts, security: line.security }).await
        }
        (None, None) => Err(Fault::input("nothing to do").hint("give --config FILE, or see --help")),
    }
}

/// The quickstart's files, its model, and both its runs.
async fn start_quickly(options: &QuickstartOptions) -> Result<(), Fault> {
    quickstart::write_files(&options.out)?;
    let step = |title: &str, program: &str, words: &[String]| {
        console::heading(&format!("== {title}\n$ {program} {}", words.join(" ")));
    };
    let arguments = quickstart::model_arguments(&options.out);
    step("a small Llama with random weights and its own tokenizer", "trainer", &arguments);
    quickstart::make_model(&options.out).await?;
    for run in quickstart::runs(options) {
        step(run.title, "launcher", &run.line[1..]);
        let line = CommandLine::try_parse_from(&run.line)
            .map_err(|error| Fault::failed(format!("the quickstart's own command is wrong: {error}")))?;
        let options = line.options.ok_or_else(|| Fault::failed("the quickstart's own command is no run"))?;
        // Each run is as large as a task of its own.
        let request = RunRequest { options: &options, hosts: &line.hosts, security: line.security };
        Box::pin(launch(request)).await?;
    }
    Ok(())
}

/// What the command line asks for.
#[derive(Clone, Copy)]
struct RunRequest<'a> {
    options: &'a Options,
    /// Where the run goes.
    hosts: &'a HostOptions,
    /// Who may talk to whom.
    security: SecurityOptions,
}

async fn launch(request: RunRequest<'_>) -> Result<(), Fault> {
    let options = request.options;
    let Some((asked, transport)) = hosts::asked(request.hosts, options.nodes)? else {
        return launch_here(request).await;
    };
    let config = options::load(options, true)?;
    let mut interrupt = Interrupt::new()?;
    let mut restarts = Restarts::new(options.max_restarts);
    let transport = Arc::new(transport);
    // Until when hosts are tried again that a run has lost.
    let mut deadline = None;
    loop {
        let mut reached = Reached::default();
        let connecting = Hosts::connect(&asked, &transport, request.hosts);
        let result = match unless(&mut interrupt, &restarts, "connecting to the hosts", connecting).await {
            Ok(hosts) => {
                let attempt = Attempt { restarts: &restarts, reached: &mut reached };
                let result = launch_there(request, &config, &hosts, &mut interrupt, attempt).await;
                hosts.close().await;
                result
            }
            Err(fault) => Err(fault),
        };
        let Err(fault) = result else { return Ok(()) };
        if interrupt.came() {
            return Err(restarts.stopped(fault));
        }
        if fault.code == ErrorCode::Unavailable && deadline.is_some_and(|deadline| Instant::now() < deadline)
        {
            let pausing = async {
                tokio::time::sleep(PAUSE).await;
                Ok(())
            };
            unless(&mut interrupt, &restarts, "waiting for a lost host", pausing).await?;
            continue;
        }
        let line = restarts.after(fault, &reached)?;
        Console::new(false, options.log_format).line(&line);
        deadline = Some(Instant::now() + PATIENCE);
    }
}

/// Before anything is started: Ctrl-C ends what the launcher waits for.
async fn unless<T>(
    interrupt: &mut Interrupt,
    restarts: &Restarts,
    doing: &str,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    tokio::select! {
        done = work => done,
        _ = interrupt.wait() => {
            let begun = restarts.total() > 0;
            let hint = if begun { "continue with --resume where a checkpoint was written" } else { "no run was started" };
            Err(Fault::new(ErrorCode::Interrupted, format!("stopped while {doing}")).hint(hint))
        }
    }
}

async fn launch_here(request: RunRequest<'_>) -> Result<(), Fault> {
    let options = request.options;
    let machine = Machine::here();
    // Of a range as many as there are, which is this machine.
    let nodes = match options.nodes {
        Some(nodes) if nodes.min < nodes.max => nodes.of(1)?,
        nodes => nodes.map_or(1, |nodes| nodes.max),
    };
    let mut trainers = trainers(nodes, options.gpus_per_node, &machine)?;
    let (devices, idle) =
        trainers::devices(&trainers, options.gpus_per_node, &[(String::new(), machine.gpus)]);
    idle.iter().for_each(|idle| console::warn(idle));
    if options.numa_binding == NumaBinding::Node {
        Topology::read(Path::new("/"), &allowed_cores()).bind(&mut trainers);
    }
    let config = options::load(options, false)?;
    let earlier = Earlier::of(options, Path::new(&config.output_dir))?;
    if let Some(model) = options::complete(earlier, &config)? {
        console::tell(&format!("this run is complete: {}\n", model.display())).await;
        return Ok(());
    }
    fit::check(options, &config, &trainers, &[Hello::of_this_machine()])?;
    let fresh = earlier == Earlier::Refused;
    let listen = options.listen.as_deref().unwrap_or("127.0.0.1:0");
    if options.dry_run {
        run_files::look(&config, true, fresh)?;
        let tls = security::describe(request.security, listen, security::given())?;
        let look = || trainer_check::run(&config);
        return print(&dry_run::describe(&config, &trainers, &devices, &tls, look)?);
    }
    let mut interrupt = Interrupt::new()?;
    // Kept until this process ends: no other run comes in between two attempts of this one.
    let owner = run_files::take(&config, fresh)?;
    let config_file = NextConfig(run_files::write_config(&config)?);
    let console = Console::new(options.verbose, options.log_format);
    console.line(&format!("devices  {devices}"));
    let plot = LivePlot::new(Path::new(&config.output_dir));
    let place = RunPlace { trainers: &trainers, hosts: None, listen, owner: Some(&owner), plot: &plot };
    let folder = Folder::seen(Path::new(&config.output_dir));
    let folder = folder.unwrap_or_else(|_| Folder::unseen(Path::new(&config.output_dir)));
    let mut restarts = Restarts::new(options.max_restarts);
    loop {
        let mut reached = Reached::default();
        let attempt = Attempt { restarts: &restarts, reached: &mut reached };
        let attempt = train(request, &config, &config_file.0, &place, &mut interrupt, attempt);
        let trained = traced(attempt).await;
        match trained {
            Ok(()) => break,
            // A folder that was removed or replaced has nothing to go on from.
            Err(fault) if interrupt.came() || folder.still_there().is_err() => {
                return Err(restarts.stopped(fault));
            }
            Err(fault) => {
                // A coordinator that is killed does not tell of its last checkpoint.
                reached.look(Path::new(&config.output_dir));
                console.line(&restarts.after(fault, &reached)?);
            }
        }
    }
    tell(options, &config, &plot, &machine, &restarts, &mut interrupt).await
}

/// One of possibly several starts of a run.
struct Attempt<'a> {
    /// What came before.
    restarts: &'a Restarts,
    /// How far this one comes.
    reached: &'a mut Reached,
}

/// Where a run goes.
struct RunPlace<'a> {
    trainers: &'a [Trainer],
    hosts: Option<&'a Hosts>,
    listen: &'a str,
    owner: Option<&'a Ownership>,
    plot: &'a LivePlot,
}

async fn launch_there(
    request: RunRequest<'_>,
    config: &RunConfig,
    hosts: &Hosts,
    interrupt: &mut Interrupt,
    attempt: Attempt<'_>,
) -> Result<(), Fault> {
    let options = request.options;
    let found = hosts.found();
    let numa = options.numa_binding == NumaBinding::Node;
    let trainers = hosts::plan::trainers(options.gpus_per_node, numa, &found)?;
    let here: Vec<(String, u32)> =
        found.iter().map(|(host, hello)| (host.name.clone(), hello.gpus)).collect();
    let (devices, idle) = trainers::devices(&trainers, options.gpus_per_node, &here);
    idle.iter().for_each(|idle| console::warn(idle));
    let hellos: Vec<Hello> = found.into_iter().map(|(_, hello)| hello).collect();
    fit::check(options, config, &trainers, &hellos)?;
    let restarts = attempt.restarts;
    let listening = hosts.listen(options.listen.as_deref());
    let listen = unless(interrupt, restarts, "the hosts tried to reach each other", listening).await?;
    if options.dry_run {
        let tls = security::describe(request.security, &listen, security::given())?;
        let on_first = hosts.coordinator_node().is_some();
        return print(&dry_run::describe_hosts(config, &trainers, &listen, &devices, &tls, on_first));
    }
    // Whether the job has begun what lies on the hosts is not known here: the coordinator looks.
    let fresh = Earlier::of(options, Path::new(&config.output_dir))? == Earlier::Refused
        && !options.auto_resume
        && restarts.total() == 0;
    let preparing = hosts.prepare(config, fresh);
    let (config_file, owner) =
        unless(interrupt, restarts, "the hosts looked at the run's files", preparing).await?;
    let config_file = NextConfig(config_file);
    // Logs are gathered on this machine, which may share no file system with the hosts.
    let output_dir = Path::new(&config.output_dir);
    run_files::make_logs(output_dir)?;
    let names: Vec<&str> = hosts.agents().iter().map(|agent| agent.host.name.as_str()).collect();
    let place = if hosts.coordinator_node().is_some() { names[0] } else { "this machine" };
    Console::new(false, options.log_format)
        .line(&format!("hosts    {}: {devices}, coordinator on {place}", names.join(", ")));
    let plot = LivePlot::new(output_dir);
    let place = RunPlace {
        trainers: &trainers,
        hosts: Some(hosts),
        listen: &listen,
        owner: owner.as_ref(),
        plot: &plot,
    };
    let trained = train(request, config, &config_file.0, &place, interrupt, attempt);
    traced(trained).await?;
    if output_dir.join("final").is_dir() {
        return tell(options, config, &plot, &Machine::here(), restarts, interrupt).await;
    }
    let host = &hosts.agent(0).host;
    let again = restarts.summary().map(|again| format!("restarts {again}\n")).unwrap_or_default();
    console::tell(&format!("\n{again}model    {host}:{}\n", output_dir.join("final").display())).await;
    Ok(())
}

/// One attempt at a run, in a span that everything of it is part of, below whatever started the launcher.
async fn traced(attempt: impl Future<Output = Result<(), Fault>>) -> Result<(), Fault> {
    let span = tracing::info_span!(target: TARGET, "launch");
    if let Some(parent) = dyad_telemetry::environment() {
        dyad_telemetry::adopt(&span, &parent);
    }
    let result = attempt.instrument(span.clone()).await;
    dyad_telemetry::conclude(&span, &result);
    result
}

/// Says it, and draws samples, which may take long, until somebody has had enough of that.
async fn tell(
    options: &Options,
    config: &RunConfig,
    plot: &LivePlot,
    machine: &Machine,
    restarts: &Restarts,
    interrupt: &mut Interrupt,
) -> Result<(), Fault> {
    let signal = tokio::select! {
        () = say(options, config, plot, machine, restarts) => return Ok(()),
        signal = interrupt.wait() => signal,
    };
    // A scheduler asks for an end, and the run has come to its own. A person learns that not all was shown.
    if signal != libc::SIGINT {
        return Ok(());
    }
    let model = Path::new(&config.output_dir).join("final");
    Err(Fault::new(ErrorCode::Interrupted, "stopped once the run was complete, before all was shown")
        .hint(format!("the model lies in {}", model.display())))
}

/// What there is to say of a complete run.
async fn say(options: &Options, config: &RunConfig, plot: &LivePlot, machine: &Machine, restarts: &Restarts) {
    let output_dir = Path::new(&config.output_dir);
    // The model is there: a plot or sample that fails must not make the run look failed.
    let plot = plot.finish(true).await;
    let again = restarts.summary().map(|again| format!("restarts {again}\n")).unwrap_or_default();
    let profile = options.profile.then(|| output_dir.join("profile")).filter(|folder| folder.is_dir());
    let table = summary::table(output_dir, plot.as_deref(), profile.as_deref());
    console::tell(&format!("\n{again}{table}")).await;
    let wanted =
        Samples { count: options.samples, max_new_tokens: options.max_new_tokens, threads: machine.cores };
    let samples = summary::samples(config, wanted).await.unwrap_or_else(warn);
    if !samples.is_empty() {
        console::tell(&format!("\n{samples}")).await;
    }
}

fn warn<T: Default>(fault: Fault) -> T {
    console::warn(&fault.to_string());
    T::default()
}

async fn train(
    request: RunRequest<'_>,
    config: &RunConfig,
    config_file: &Path,
    place: &RunPlace<'_>,
    interrupt: &mut Interrupt,
    attempt: Attempt<'_>,
) -> Result<(), Fault> {
    let options = request.options;
    let security = Security::new(request.security, place.listen, security::given())?;
    let environment = environment::chosen(&request.hosts.env, &environment::here())?;
    let console = Console::new(options.verbose, options.log_format);
    let job = Job {
        config_file,
        output_dir: Path::new(&config.output_dir),
        trainers: place.trainers,
        listen: place.listen,
        security: &security,
        profile: options.profile,
        coordinator_flags: coordinator_flags(options, attempt.restarts),
        hosts: place.hosts,
        environment: &environment,
        connect_timeout: options.connect_timeout,
        stall_timeout: options.stall_timeout,
        log_format: options.log_format,
        owner: place.owner,
        plot: place.plot,
        last_scrape: Duration::from_secs(
            options.metrics_listen.as_ref().map_or(0, |_| options.metrics_linger),
        ),
    };
    let grace = Duration::from_secs(options.grace_period);
    let result = tokio::select! {
        result = supervise::run(&job, &console, interrupt, grace, attempt.reached) => result,
        () = console.clone().show_held() => Ok(()),
    };
    if result.is_err() {
        // So far the run has come, and that can be looked at.
        tokio::select! {
            _ = place.plot.finish(false) => {}
            _ = interrupt.wait() => {}
        }
    }
    result
}

fn coordinator_flags(options: &Options, restarts: &Restarts) -> Vec<String> {
    let mut flags = vec![format!("--trace-every={}", options.trace_every)];
    if let Some(address) = &options.metrics_listen {
        let seconds = options.metrics_linger;
        flags.extend([format!("--metrics-listen={address}"), format!("--metrics-linger={seconds}")]);
    }
    flags.extend(options.stall_timeout.iter().map(|seconds| format!("--stall-timeout={seconds}")));
    // Until the run has a row of its own, what lies in the folder is an earlier run's, and still to be removed.
    let overwrite = options.overwrite && !restarts.has_rows();
    let again = restarts.total() > 0 && !overwrite;
    // The job's mark in the folder tells as much of later attempts, also those of a launcher that is started again.
    let job = options.job.is_some();
    flags.extend(options.job.iter().map(|job| format!("--job={job}")));
    let set = [
        ("--resume", options.resume && (job || !again)),
        ("--overwrite", if job { options.overwrite } else { overwrite }),
        ("--auto-resume", options.auto_resume || again),
    ];
    flags.extend(set.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.to_owned()));
    flags
}
