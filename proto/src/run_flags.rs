//! Flags that launcher and coordinator share: the launcher takes them and passes them on.

use std::path::Path;

use clap::Args;

use crate::Fault;
use crate::run_folder::begun_by;

/// Default of `--metrics-linger`: slightly more than 30 s, a common scrape interval of Prometheus.
const LAST_SCRAPE_SECONDS: u64 = 35;

/// Flags that say what to do with an earlier run in `output_dir`.
#[derive(Args, Clone, Debug, Default)]
pub struct EarlierRunFlags {
    /// Go on from the newest checkpoint in `output_dir`
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
    /// Remove the metrics, checkpoints and final model of an earlier run in `output_dir`
    #[arg(long)]
    pub overwrite: bool,
    /// Go on from the newest checkpoint in `output_dir`; if there is none, start again. A complete run stays as it is. For schedulers
    /// that restart jobs
    #[arg(long)]
    pub auto_resume: bool,
    /// Id of the scheduler's job: --auto-resume applies only if this job started the run in `output_dir`. Otherwise --auto-resume is
    /// ignored, and --overwrite or --resume apply if given
    #[arg(long, value_name = "ID", requires = "auto_resume")]
    pub job: Option<String>,
}

/// What a new run does with an earlier run in its output folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputMode {
    /// Refuses it.
    Fresh,
    /// Removes it.
    Overwrite,
    /// Goes on from its newest checkpoint.
    Resume,
    /// Goes on from its newest checkpoint; without one, starts again.
    AutoResume,
}

impl EarlierRunFlags {
    /// Refuses flags that do not go together.
    pub fn check(&self) -> Result<(), Fault> {
        if self.auto_resume && self.job.is_none() && (self.resume || self.overwrite) {
            return Err(Fault::input("--auto-resume with --resume or --overwrite needs --job")
                .hint("give --job ID: it tells a run of this job from an earlier run in output_dir"));
        }
        Ok(())
    }

    /// What the flags come to for a folder. Reads which job started the run in it.
    #[must_use]
    pub fn mode(&self, output_dir: &Path) -> OutputMode {
        let own = self.job.as_ref().is_none_or(|job| begun_by(output_dir, job));
        match (self.resume, self.overwrite) {
            _ if self.auto_resume && own => OutputMode::AutoResume,
            (true, _) => OutputMode::Resume,
            (false, true) => OutputMode::Overwrite,
            (false, false) => OutputMode::Fresh,
        }
    }

    /// The flags as arguments of another program.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let set =
            [("--resume", self.resume), ("--overwrite", self.overwrite), ("--auto-resume", self.auto_resume)];
        let set = set.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.to_owned());
        set.chain(self.job.iter().map(|job| format!("--job={job}"))).collect()
    }
}

/// Flags about stalls, metrics and traces.
#[derive(Args, Clone, Debug)]
pub struct ObservationFlags {
    /// How long a trainer that still sends heartbeats may make no progress; also shortens how long it, or the coordinator, may be
    /// silent [default: by phase, 5 to 20 minutes, and longer where a run's own pauses are long]. 0 sets no limit
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=604_800))]
    pub stall_timeout: Option<u64>,
    /// Let the coordinator serve metrics for Prometheus on this address, under /metrics [default: not at all]
    #[arg(long, value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// How long the coordinator waits after the end of the run for a last scrape of its metrics, if they were scraped before. Without it
    /// Prometheus cannot tell the end of a run from a coordinator that died. A little more than the scrape interval is enough; 0 does
    /// not wait
    #[arg(long, value_name = "SECONDS", default_value_t = LAST_SCRAPE_SECONDS, value_parser = clap::value_parser!(u64).range(..=3600))]
    pub metrics_linger: u64,
    /// Trace the first three steps and then one in N, if OTEL_EXPORTER_OTLP_ENDPOINT is set; slow and failed steps are always
    /// traced. 0 traces only slow and failed steps
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub trace_every: u64,
}

impl ObservationFlags {
    /// The flags as arguments of another program.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut flags = vec![format!("--trace-every={}", self.trace_every)];
        if let Some(address) = &self.metrics_listen {
            flags.push(format!("--metrics-listen={address}"));
            flags.push(format!("--metrics-linger={}", self.metrics_linger));
        }
        flags.extend(self.stall_timeout.iter().map(|seconds| format!("--stall-timeout={seconds}")));
        flags
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        earlier: EarlierRunFlags,
        #[command(flatten)]
        observation: ObservationFlags,
    }

    fn parsed(arguments: &[String]) -> Flags {
        Flags::parse_from(std::iter::once(&"x".to_owned()).chain(arguments))
    }

    #[test]
    fn arguments_are_parsed_to_the_same_flags() {
        for given in [
            "--resume --trace-every=7",
            "--overwrite --auto-resume --job=c/7 --stall-timeout=0",
            "--metrics-listen=:9090 --metrics-linger=3",
        ] {
            let given: Vec<String> = given.split(' ').map(str::to_owned).collect();
            let first = parsed(&given);
            let second = parsed(&[first.earlier.arguments(), first.observation.arguments()].concat());
            assert_eq!(format!("{first:?}"), format!("{second:?}"));
            assert!(given.iter().all(|flag| {
                [second.earlier.arguments(), second.observation.arguments()].concat().contains(flag)
            }));
        }
        assert!(Flags::try_parse_from(["x", "--resume", "--overwrite"]).is_err());
    }

    #[test]
    fn auto_resume_with_another_flag_needs_a_job() {
        let flags =
            |text: &str| parsed(&text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).earlier;
        assert_eq!(flags("--auto-resume").check(), Ok(()));
        assert_eq!(flags("--auto-resume --job 7 --overwrite").check(), Ok(()));
        for other in ["--resume", "--overwrite"] {
            assert!(flags(&format!("--auto-resume {other}")).check().unwrap_err().message.contains("--job"));
        }
    }

    #[test]
    fn only_the_job_that_began_a_run_resumes_it_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(crate::run_folder::JOB), "7\n").unwrap();
        let mode = |text: &str| {
            let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            parsed(&arguments).earlier.mode(dir.path())
        };
        assert_eq!(mode(""), OutputMode::Fresh);
        assert_eq!(mode("--auto-resume"), OutputMode::AutoResume);
        assert_eq!(mode("--auto-resume --job 7 --overwrite"), OutputMode::AutoResume);
        assert_eq!(mode("--auto-resume --job 8 --overwrite"), OutputMode::Overwrite);
        assert_eq!(mode("--auto-resume --job 8"), OutputMode::Fresh);
        assert_eq!(mode("--resume"), OutputMode::Resume);
    }
}
