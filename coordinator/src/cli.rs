//! The command line, and how it becomes a run that is ready to serve.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use dyad_proto::finished::{complete, kept_template_date};
use dyad_proto::inputs::refuse_entangled;
use dyad_proto::ownership::Ownership;
use dyad_proto::run_flags::{EarlierRunFlags, ObservationFlags, OutputMode};
use dyad_proto::run_folder::{RUN_CONFIG, STATE};
use dyad_proto::security::{TLS_DIR, TOKEN_FILE};
use dyad_proto::wire::EvaluationOnly;
use dyad_proto::{Fault, RunConfig, files};
use dyad_sources::cache::hex;
use dyad_telemetry::LogFormat;
use sha2::{Digest, Sha256};

use crate::files::output_dir::{self, OutputPlan, RunFiles};
use crate::observe::traces::Sampling;
use crate::run::RunSpec;
use crate::run::dataset::Datasets;
use crate::run::early_stopping::EarlyStopping;
use crate::run::facts::Then;
use crate::run::same_run::Now;
use crate::run::training::Start;

/// Owns one Dyad run: checks its data, waits for its trainers, shards the pairs over them, writes the metrics.
///
/// Normally started by `launcher`. Once it listens it prints one line on standard output, such as
/// {"listening":"127.0.0.1:41234"}; logs go to standard error.
#[derive(Clone, Debug, Parser)]
#[command(name = "coordinator", version, after_help = EXIT_STATUS)]
pub struct CoordinatorCli {
    /// The run's configuration, a .toml or .json file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Number of trainers that take part
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub world_size: u32,

    /// Address to listen on; port 0 takes any that is free
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub listen: String,

    /// Folder with ca.pem, cert.pem, key.pem and join-token: mutual TLS instead of plain text (docs/security.md)
    #[arg(long, env = TLS_DIR, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,

    /// File with the join token that callers must know, in plain text. Without it, on a loopback address, a token is made, which
    /// trainers of this user on this machine find by the port
    #[arg(long, env = TOKEN_FILE, value_name = "FILE", conflicts_with = "tls_dir")]
    pub token_file: Option<PathBuf>,

    /// Listen in plain text where other machines can reach it: anybody on the network can read and join the run
    #[arg(long, conflicts_with = "tls_dir")]
    pub insecure: bool,

    /// Also serve grpc.health.v1 here, in plain text, for probes that show no certificate (Kubernetes)
    #[arg(long, value_name = "HOST:PORT")]
    pub health_listen: Option<String>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would take it for the program's own")]
    pub earlier: EarlierRunFlags,

    /// If the run is complete already, stay until every trainer has connected and been told. For schedulers that start coordinator
    /// and trainers together
    #[arg(long, requires = "auto_resume")]
    pub tell_trainers: bool,

    /// How long to wait until all trainers have joined
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub join_timeout_seconds: u64,

    /// Write every event of the run as a JSON line on standard output
    #[arg(long)]
    pub print_events: bool,

    /// Before the line that says where it listens, write one like {"preparing":3} every second: a sign of life for the launcher
    #[arg(long, hide = true)]
    pub announce_preparing: bool,

    /// The command that started the run, as a JSON list; recorded in run.json
    #[arg(long, hide = true, value_name = "JSON")]
    pub recorded_command: Option<String>,

    /// Do not train: evaluate the pairs of validation_file once, and write nothing but their row
    #[arg(long, hide = true)]
    pub evaluate_only: bool,

    /// With --evaluate-only: the model to compare with
    #[arg(long, hide = true, value_name = "MODEL", requires = "evaluate_only")]
    pub reference: Option<String>,

    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would take it for the program's own")]
    pub observation: ObservationFlags,
}

const EXIT_STATUS: &str = "\
Exit status:
  0    the run is done
  1    the run failed
  2    wrong usage, configuration, data, output folder or certificates
  3    the port or the output folder is taken, or not all trainers joined in time
  130  stopped by SIGINT, SIGTERM or SIGHUP: after the step in progress and with a checkpoint; at once when it is sent again, or by SIGQUIT

Environment:
  DYAD_LOG  which log lines are written, such as `debug` or `dyad_coordinator=trace` [default: info]
  OTEL_*    where traces go: OTEL_EXPORTER_OTLP_ENDPOINT and the rest of the standard [default: nowhere]";

/// Number of first steps that are all traced.
const FIRST_STEPS: u64 = 3;

/// The task that follows from the command line.
#[derive(Debug)]
pub enum Task {
    /// A run.
    Run(Box<Prepared>),
    /// None: the resumed run is complete, and this is the path of its model.
    Complete(PathBuf),
}

/// A run whose input is checked and whose output folder is unchanged so far.
#[derive(Debug)]
pub struct Prepared {
    config: RunConfig,
    config_json: String,
    data: Datasets,
    output: OutputPlan,
    /// Lock on the output folder; to be held until the run has ended.
    pub owner: Arc<Ownership>,
}

impl CoordinatorCli {
    /// Checks config, data and output folder: everything that can be wrong before a trainer connects.
    pub fn prepare(&self) -> Result<Task, Fault> {
        self.earlier.check()?;
        let mut config = read_config(&self.config)?;
        refuse_entangled(&config, &self.config)?;
        // Before anything in the folder is read, because another run may be changing it.
        let owner = Arc::new(Ownership::take(Path::new(&config.output_dir))?);
        let mode = self.earlier.mode(Path::new(&config.output_dir));
        if matches!(mode, OutputMode::Resume | OutputMode::AutoResume) && config.template_date.is_none() {
            let dir = Path::new(&config.output_dir);
            config.template_date = kept_template_date(dir).or_else(|| recorded_date(dir));
        }
        // Chosen once, here: trainers get it with the configuration and never read their own clocks.
        config.fill_template_date();
        let data = match self.evaluate_only {
            true => Datasets::to_evaluate(&config)?,
            false => Datasets::load(&config)?,
        };
        let sha256 = data.train.sha256().to_owned();
        let dir = Path::new(&config.output_dir);
        if matches!(mode, OutputMode::Resume | OutputMode::AutoResume)
            && let Some(model) = complete(dir, &config, &|| Ok(sha256.clone()))?
        {
            return Ok(Task::Complete(model));
        }
        let now = Now {
            config: config.clone(),
            dataset_sha256: sha256,
            validation_sha256: data.validation_sha256().to_owned(),
            world_size: self.world_size,
        };
        let output = output_dir::inspect(owner.folder(), mode, &now)?.of_job(self.earlier.job.clone());
        Ok(Task::Run(Box::new(Prepared { config_json: config.to_json()?, config, data, output, owner })))
    }

    /// Which steps are traced.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        let first = if self.observation.trace_every == 0 { 0 } else { FIRST_STEPS };
        Sampling { first, every: self.observation.trace_every }
    }

    /// The command that the user typed: the launcher's, or this program's.
    #[must_use]
    pub fn typed(&self) -> Vec<String> {
        let given = self.recorded_command.as_deref().and_then(|json| serde_json::from_str(json).ok());
        given.unwrap_or_else(|| std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect())
    }

    /// Prepares the output folder and returns it with the run's specification.
    pub fn start(&self, prepared: Prepared) -> Result<(RunSpec, RunFiles), Fault> {
        let resume = prepared.output.resume.clone();
        let output = prepared.output.start(prepared.config_json.clone())?;
        let start = Start {
            step: resume.as_ref().map_or(0, |resume| resume.step),
            num_tokens: resume.as_ref().map_or(0, |resume| resume.num_tokens),
            evaluations: resume.as_ref().map_or(0, |resume| resume.evaluations),
            evaluated: output.evaluated,
            early_stopping: early_stopping(&prepared.config, &output),
        };
        let spec = RunSpec {
            run_id: run_id(),
            config: prepared.config,
            config_json: prepared.config_json,
            command: self.typed(),
            data: prepared.data,
            world_size: self.world_size,
            join_timeout: Duration::from_secs(self.join_timeout_seconds),
            stall_timeout: self.observation.stall_timeout,
            start,
            resume_from: resume.as_ref().map_or_else(String::new, |resume| resume.path.display().to_string()),
            evaluation_only: self
                .evaluate_only
                .then(|| EvaluationOnly { reference: self.reference.clone().unwrap_or_default() }),
            then: resume.map(|resume| Then { fingerprint: resume.then, step: resume.step }),
        };
        Ok((spec, output))
    }
}

/// State of early stopping after the evaluations that a resumed run keeps. It starts anew if the checkpoint of the best one is missing,
/// for example because the run did not stop early before: the final model could not be that of the best evaluation.
fn early_stopping(config: &RunConfig, output: &RunFiles) -> Option<EarlyStopping> {
    let resumed = EarlyStopping::resumed(config, &output.earlier)?;
    let missing = |step: &u64| !output.dir().join(format!("checkpoint-{step}")).join(STATE).is_file();
    match resumed.best().map(|best| best.step).filter(missing) {
        None => Some(resumed),
        Some(step) => {
            tracing::warn!(
                "early stopping starts anew: there is no checkpoint-{step}, the best evaluation so far was after step {step}"
            );
            EarlyStopping::new(config)
        }
    }
}

/// The `template_date` in the folder's `run.json`; `None` without one.
fn recorded_date(dir: &Path) -> Option<String> {
    let recorded: serde_json::Value =
        serde_json::from_str(&files::read_to_string(&dir.join(RUN_CONFIG)).ok()?).ok()?;
    Some(recorded.get("template_date")?.as_str()?.to_owned())
}

fn read_config(path: &Path) -> Result<RunConfig, Fault> {
    if path.extension().is_none_or(|extension| extension != "json") {
        return RunConfig::load(path, &[]);
    }
    let shown = path.display();
    let json = files::read_to_string_or_pipe(path, files::MOST_BYTES).map_err(|error| {
        Fault::input(format!("cannot read config file {shown}: {error}"))
            .hint("give the path of a TOML or JSON file with --config")
    })?;
    RunConfig::from_json(&json)
        .map_err(|fault| Fault { message: format!("{shown}: {}", fault.message), ..fault })
}

/// A name from time and process id that tells runs apart in logs and traces.
fn run_id() -> String {
    let seed = format!("{:?} {}", std::time::SystemTime::now(), std::process::id());
    format!("run-{}", &hex(&Sha256::digest(seed))[..12])
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn recorded_date_reads_template_date_from_run_json() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(recorded_date(dir.path()), None);
        let mut config = RunConfig::default();
        config.fill_template_date();
        std::fs::write(dir.path().join(RUN_CONFIG), config.to_json().unwrap()).unwrap();
        assert_eq!(recorded_date(dir.path()), config.template_date);
    }

    #[test]
    fn flags_are_consistent() {
        CoordinatorCli::command().debug_assert();
        let parse = |args: &[&str]| {
            CoordinatorCli::try_parse_from([&["coordinator", "--config", "c.toml"], args].concat())
        };
        assert!(parse(&["--world-size", "2", "--resume", "--overwrite"]).is_err());
        let fault =
            parse(&["--world-size", "2", "--auto-resume", "--overwrite"]).unwrap().prepare().unwrap_err();
        assert!(fault.message.contains("needs --job"), "{fault}");
        assert!(parse(&["--world-size", "0"]).is_err());
    }

    #[test]
    fn config_errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        assert!(read_config(&path).unwrap_err().message.starts_with("cannot read config file"));
        std::fs::write(&path, "{\"batch_sise\": 3}").unwrap();
        let fault = read_config(&path).unwrap_err();
        assert!(fault.message.contains("run.json: ") && fault.message.contains("batch_sise"), "{fault}");
    }
}
