//! Entry point of the launcher: command line in, exit status out.
// Only tests may use `std::fs` to read; other code uses `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use dyad_proto::finished::ended_early;
use dyad_proto::folder::Folder;
use dyad_proto::ownership::Ownership;
use dyad_proto::run_flags::{EarlierRunFlags, OutputMode};
use dyad_proto::{ErrorCode, Fault, RunConfig, files, safe_file};
use dyad_telemetry::{LogFormat, Logs, TARGET, Telemetry};
use launcher::agent::machine::Hello;
use launcher::agent::run_files::{self, NextConfig};
use launcher::cli::{CommandLine, LauncherCommand};
use launcher::evaluate::{EvaluateOptions, Evaluation, TemporaryFolder};
use launcher::hosts::options::HostOptions;
use launcher::hosts::{Hosts, environment};
use launcher::placement::numa::Topology;
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
use launcher::train::options::{self, NumaBinding, Options};
use launcher::train::restart::Restarts;
use launcher::train::supervise::Job;
use launcher::train::{dry_run, fit, supervise};
use launcher::{
    agent, doctor, evaluate, hosts, inspect, kubernetes, node, predict, quickstart, security, slurm,
};
use tracing::Instrument;

/// How long the launcher tries to reconnect to a lost host.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time between two such tries.
const PAUSE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let line: CommandLine = dyad_telemetry::command_line();
    dyad_proto::signals::ignore_size_limit();
    let format = line.options.0.as_ref().map_or(LogFormat::Text, |options| options.log_format);
    // In text format the console prints the launcher's progress, so its log only shows warnings.
    let default = if format == LogFormat::Json { "info" } else { "warn" };
    // Dropped after the exit status is known, so that the last spans and logs are exported.
    let _telemetry = Telemetry::start("launcher", Logs { format, variable: "DYAD_LOG", default });
    match runtime().and_then(|runtime| runtime.block_on(act(line))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            dyad_telemetry::last_words(&fault);
            ExitCode::from(fault.code.exit_status())
        }
    }
}

/// A runtime with one thread: the kernel kills children when the thread that started them ends.
fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    files::enough_may_be_open()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Fault::failed(format!("cannot start the async runtime: {error}"))
            .hint("raise the limits of open files (ulimit -n) and of processes (ulimit -u)")
    })
}

async fn act(line: CommandLine) -> Result<(), Fault> {
    match (line.command, line.options.0) {
        (Some(LauncherCommand::Plan(options)), _) => {
            let plan = predict::plan(&options)?;
            print(&plan.text)?;
            plan.verdict
        }
        (Some(LauncherCommand::Kubernetes(options)), _) => kubernetes::act(options.command).await,
        (Some(LauncherCommand::Node(options)), _) => node::run(&options).await,
        (Some(LauncherCommand::Agent(options)), _) => agent::serve::serve(&options).await,
        (Some(LauncherCommand::Doctor(options)), _) => doctor::run(&options).await,
        (Some(LauncherCommand::Check(arguments)), _) => inspect::check(&arguments),
        (Some(LauncherCommand::Preview(arguments)), _) => inspect::preview(&arguments),
        (Some(LauncherCommand::Convert(arguments)), _) => inspect::convert(&arguments),
        (Some(LauncherCommand::Slurm(options)), _) => slurm::run(&options).await,
        (Some(LauncherCommand::Quickstart(options)), _) => start_quickly(&options).await,
        (Some(LauncherCommand::Evaluate(options)), _) => evaluate_model(&options).await,
        (None, Some(options)) => launch(RunRequest::new(&options, &line.hosts, line.security)).await,
        (None, None) => Err(Fault::input("nothing to do").hint("give --config FILE, or see --help")),
    }
}

/// Runs the quickstart: writes its files, makes its model, trains twice.
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
        let options =
            line.options.0.ok_or_else(|| Fault::failed("the quickstart's own command is no run"))?;
        // Boxed: the future of a run is large.
        let request = RunRequest::new(&options, &line.hosts, line.security);
        Box::pin(launch(request)).await?;
    }
    Ok(())
}

/// Runs an evaluation on this machine, and prints its metrics.
async fn evaluate_model(options: &EvaluateOptions) -> Result<(), Fault> {
    options.output.as_deref().map_or(Ok(()), evaluate::check_output)?;
    let folder = TemporaryFolder::new()?;
    let evaluation = Evaluation::new(options, folder.path())?;
    let config = folder.path().join("run.json");
    safe_file::write(&config, evaluation.config.to_json()?.as_bytes())
        .map_err(|error| Fault::failed(format!("cannot write {}: {error}", config.display())))?;
    let mut words =
        vec!["launcher".to_owned(), "--no-memory-check".into(), "--max-restarts".into(), "0".into()];
    words.extend(["--config".into(), config.to_string_lossy().into_owned()]);
    words.extend(options.verbose.then(|| "--verbose".into()));
    let line = CommandLine::try_parse_from(&words)
        .map_err(|error| Fault::failed(format!("the command of the evaluation is wrong: {error}")))?;
    let given = line.options.0.ok_or_else(|| Fault::failed("the command of the evaluation is no run"))?;
    let given = Options { nodes: options.nodes, gpus_per_node: options.gpus_per_node, ..given };
    let request = RunRequest {
        evaluates: Some(&evaluation.reference),
        ..RunRequest::new(&given, &line.hosts, line.security)
    };
    Box::pin(launch_here(request)).await?;
    let row = evaluate::metrics(&evaluation)?;
    let result = evaluate::as_json(options, &evaluation, &row);
    if let Some(path) = &options.output {
        evaluate::write(path, &result)?;
    }
    print(&if options.json { format!("{result}\n") } else { evaluate::table(options, &evaluation, &row) })
}

/// The options of a run from the command line.
#[derive(Clone, Copy)]
struct RunRequest<'a> {
    options: &'a Options,
    hosts: &'a HostOptions,
    security: SecurityOptions,
    /// The run only evaluates, and compares with this model; empty for the base of an adapter, or the model itself.
    evaluates: Option<&'a str>,
}

impl<'a> RunRequest<'a> {
    /// A run that trains.
    fn new(options: &'a Options, hosts: &'a HostOptions, security: SecurityOptions) -> Self {
        Self { options, hosts, security, evaluates: None }
    }
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
    // Until when to reconnect to lost hosts; `None` before the first restart.
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

/// Waits for `work`; a signal ends the wait with an error. Used while no process of the run exists.
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
    // MIN:MAX counts hosts, and there is one: this machine.
    let nodes = match options.nodes {
        Some(nodes) if nodes.min < nodes.max => nodes.of(1)?,
        nodes => nodes.map_or(1, |nodes| nodes.max),
    };
    let mut trainers = trainers(nodes, options.gpus_per_node, &machine)?;
    let (devices, idle) =
        trainers::devices(&trainers, options.gpus_per_node, &[(String::new(), machine.gpus)]);
    idle.iter().for_each(|idle| console::warn(idle));
    if options.numa_binding == NumaBinding::Node {
        Topology::here().bind(&mut trainers);
    }
    let config = options::load(options, false)?;
    options.earlier.check()?;
    let mode = options.earlier.mode(Path::new(&config.output_dir));
    if let Some(model) = options::complete(mode, &config)? {
        let how = ended_early(&model);
        console::tell(&format!("this run is complete: {}{how}\n", model.display())).await;
        return Ok(());
    }
    fit::check(options, &config, &trainers, &[Hello::of_this_machine()])?;
    let fresh = mode == OutputMode::Fresh;
    let listen = options.listen.as_deref().unwrap_or("127.0.0.1:0");
    if options.dry_run {
        run_files::look(&config, true, fresh)?;
        let tls = security::describe(request.security, listen, security::given())?;
        let look = || trainer_check::run(&config);
        return print(&dry_run::describe(&config, &trainers, &devices, &tls, look)?);
    }
    let mut interrupt = Interrupt::new()?;
    // Held until this process ends, so that no other run takes the folder between two attempts.
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
            // No restart if the folder was removed or replaced: its checkpoints are gone.
            Err(fault) if interrupt.came() || folder.still_there().is_err() => {
                return Err(restarts.stopped(fault));
            }
            Err(fault) => {
                // A killed coordinator does not report its last checkpoint.
                reached.look(Path::new(&config.output_dir));
                console.line(&restarts.after(fault, &reached)?);
            }
        }
    }
    if request.evaluates.is_some() {
        plot.finish(true).await;
        return Ok(());
    }
    tell(options, &config, &plot, &machine, &restarts, &mut interrupt).await
}

/// One attempt at a run; a restart makes another one.
struct Attempt<'a> {
    /// Earlier attempts.
    restarts: &'a Restarts,
    /// Progress of this attempt.
    reached: &'a mut Reached,
}

/// Trainers, hosts and output folder of a run.
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
    // With --auto-resume only the coordinator can see whether this job began the run in the hosts' folder, so it decides.
    options.earlier.check()?;
    let fresh = options.earlier.mode(Path::new(&config.output_dir)) == OutputMode::Fresh
        && !options.earlier.auto_resume
        && restarts.total() == 0;
    let preparing = hosts.prepare(config, fresh);
    let (config_file, owner) =
        unless(interrupt, restarts, "the hosts looked at the run's files", preparing).await?;
    let config_file = NextConfig(config_file);
    // The launcher writes all logs here; this machine may share no file system with the hosts.
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

/// Runs an attempt in a tracing span, a child of the span in `TRACEPARENT` if there is one.
async fn traced(attempt: impl Future<Output = Result<(), Fault>>) -> Result<(), Fault> {
    let span = tracing::info_span!(target: TARGET, "launch");
    if let Some(parent) = dyad_telemetry::environment() {
        dyad_telemetry::adopt(&span, &parent);
    }
    let result = attempt.instrument(span.clone()).await;
    dyad_telemetry::conclude(&span, &result);
    result
}

/// Prints the summary and sample answers of a complete run. Generating samples may take long; a signal stops it.
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
    // The run is complete, so SIGTERM and SIGHUP succeed. After Ctrl-C the user learns that samples are missing.
    if signal != libc::SIGINT {
        return Ok(());
    }
    let model = Path::new(&config.output_dir).join("final");
    Err(Fault::new(ErrorCode::Interrupted, "stopped once the run was complete, before all was shown")
        .hint(format!("the model lies in {}", model.display())))
}

/// Prints restarts, summary table and samples.
async fn say(options: &Options, config: &RunConfig, plot: &LivePlot, machine: &Machine, restarts: &Restarts) {
    let output_dir = Path::new(&config.output_dir);
    // The model is complete: if a plot or sample fails, the run still succeeds.
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
        coordinator_flags: [
            coordinator_flags(options, attempt.restarts),
            evaluation_flags(request.evaluates),
        ]
        .concat(),
        hosts: place.hosts,
        environment: &environment,
        connect_timeout: options.connect_timeout,
        stall_timeout: options.observation.stall_timeout,
        log_format: options.log_format,
        owner: place.owner,
        plot: place.plot,
        last_scrape: Duration::from_secs(
            options.observation.metrics_listen.as_ref().map_or(0, |_| options.observation.metrics_linger),
        ),
    };
    let grace = Duration::from_secs(options.grace_period);
    let result = tokio::select! {
        result = supervise::run(&job, &console, interrupt, grace, attempt.reached) => result,
        () = console.clone().show_held() => Ok(()),
    };
    if result.is_err() {
        // Finish the plot of the partial run.
        tokio::select! {
            _ = place.plot.finish(false) => {}
            _ = interrupt.wait() => {}
        }
    }
    result
}

fn evaluation_flags(evaluates: Option<&str>) -> Vec<String> {
    let Some(reference) = evaluates else { return Vec::new() };
    ["--evaluate-only", "--reference", reference].map(str::to_owned).into()
}

fn coordinator_flags(options: &Options, restarts: &Restarts) -> Vec<String> {
    let given = &options.earlier;
    // Before this run's first row the folder still holds the earlier run, so a restart passes --overwrite again.
    let overwrite = given.overwrite && !restarts.has_rows();
    let again = restarts.total() > 0 && !overwrite;
    // With --job the flags stay as given: the coordinator reads in the folder whether this job began the run.
    let job = given.job.is_some();
    let earlier = EarlierRunFlags {
        resume: given.resume && (job || !again),
        overwrite: if job { given.overwrite } else { overwrite },
        auto_resume: given.auto_resume || again,
        job: given.job.clone(),
    };
    [options.observation.arguments(), earlier.arguments()].concat()
}
