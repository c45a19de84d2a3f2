//! The batch script: one launcher on the job's first node, which reaches the others by srun. Pure.

use std::fmt::Write;
use std::path::Path;

use clap::Parser as _;
use dyad_proto::Fault;

use crate::cli::CommandLine;
use crate::hosts::transport::quoted;
use crate::slurm::options::SlurmOptions;

/// The script's text.
pub fn write(options: &SlurmOptions, folder: &Path, launcher: &Path) -> Result<String, Fault> {
    let mut out = String::from("#!/bin/bash\n");
    for option in sbatch(options) {
        // A line break would end the #SBATCH line and start a command.
        if option.contains(['\n', '\r']) {
            return Err(Fault::input(format!("{option:?} is no option of sbatch"))
                .hint("give options without line breaks"));
        }
        let _ = writeln!(out, "#SBATCH {option}");
    }
    let folder = quoted(&folder.to_string_lossy());
    let command = command(options, launcher);
    let _ = write!(
        out,
        r#"
cd {folder} || exit 2

# A requeued job continues its own run: from the newest checkpoint, from the start if there is none, and not at all if the run is
# complete. Files of an earlier run in the output folder are treated as on the first start.
{command} --auto-resume --job "${{SLURM_CLUSTER_NAME:-slurm}}/$SLURM_JOB_ID" &
launcher=$!

# Slurm sends USR1 before the time limit, TERM when the job is preempted or cancelled: the launcher then writes a checkpoint and ends.
signalled=0
requeue=0
trap 'signalled=1; requeue=1; kill -TERM "$launcher"' USR1
trap 'signalled=1; kill -TERM "$launcher"' TERM
while :; do
  signalled=0
  wait "$launcher"
  status=$?
  [ "$signalled" = 1 ] || break
done
if [ "$requeue" = 1 ] && [ "$status" = 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"#
    );
    Ok(out)
}

fn sbatch(options: &SlurmOptions) -> Vec<String> {
    let nodes = options.nodes;
    let count =
        if nodes.min == nodes.max { nodes.max.to_string() } else { format!("{}-{}", nodes.min, nodes.max) };
    let mut all = vec![
        format!("--job-name={}", options.job_name),
        format!("--nodes={count}"),
        "--ntasks-per-node=1".into(),
    ];
    let optional = [
        ("gpus-per-node", options.gpus_per_node.filter(|gpus| *gpus > 0).map(|gpus| gpus.to_string())),
        ("cpus-per-task", options.cpus_per_task.map(|cores| cores.to_string())),
        ("partition", options.partition.clone()),
        ("account", options.account.clone()),
        ("qos", options.qos.clone()),
        ("constraint", options.constraint.clone()),
        ("time", options.time.clone()),
    ];
    all.extend(optional.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value?))));
    all.push("--output=%x-%j.log".into());
    all.push("--open-mode=append".into());
    all.push("--requeue".into());
    all.push(format!("--signal=B:USR1@{}", options.checkpoint_before));
    all.extend(options.extra.iter().cloned());
    all
}

/// Fails if the launcher in the job would reject its options, hours later.
pub fn check(options: &SlurmOptions) -> Result<(), Fault> {
    let added = ["--auto-resume", "--job", "0"].map(str::to_owned);
    let words = words(options, Path::new("launcher")).into_iter().chain(added);
    let line = match CommandLine::try_parse_from(words) {
        Ok(line) => line,
        Err(error) => {
            let said = error.to_string();
            let said = said.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            return Err(Fault::input(format!("the launcher in the job would refuse its options: {said}"))
                .hint("options after `--` are options of `launcher`; the script itself adds --auto-resume and --job"));
        }
    };
    match line.command {
        Some(_) => Err(Fault::input("after `--` there is a command of the launcher, not options of a run")
            .hint("the script starts a run; leave the command out")),
        None => Ok(()),
    }
}

fn command(options: &SlurmOptions, launcher: &Path) -> String {
    words(options, launcher).iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

fn words(options: &SlurmOptions, launcher: &Path) -> Vec<String> {
    // Without a number use all GPUs of the job, which another option of sbatch may have requested.
    let gpus = options.gpus_per_node.map_or_else(|| "auto".into(), |gpus| gpus.to_string());
    let mut words = vec![launcher.to_string_lossy().into_owned()];
    words.extend(["--nodes".into(), options.nodes.to_string(), "--gpus-per-node".into(), gpus]);
    words.extend(["--config".into(), options.config.to_string_lossy().into_owned()]);
    words.extend(options.overrides.iter().flat_map(|set| ["--set".into(), set.clone()]));
    words.extend(options.launcher.iter().cloned());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: SlurmOptions,
    }

    fn script(line: &str) -> Result<String, Fault> {
        let words = ["slurm"].into_iter().chain(line.split(' '));
        let line = <Line as clap::Parser>::try_parse_from(words).unwrap();
        write(&line.options, Path::new("/home/ann/it's"), Path::new("/opt/dyad/launcher"))
    }

    #[test]
    fn script_has_the_given_options_and_a_checkpoint_signal() {
        let script = script(
            "--nodes 2:4 --gpus-per-node 8 --config run.toml --set n_epochs=2 --partition gpu --time 12:00:00 --sbatch=--mem=0 -- --verbose",
        )
        .unwrap();
        for line in [
            "#SBATCH --nodes=2-4",
            "#SBATCH --gpus-per-node=8",
            "#SBATCH --partition=gpu",
            "#SBATCH --time=12:00:00",
            "#SBATCH --requeue",
            "#SBATCH --signal=B:USR1@300",
            "#SBATCH --mem=0",
            r"cd '/home/ann/it'\''s' || exit 2",
            "'/opt/dyad/launcher' '--nodes' '2:4' '--gpus-per-node' '8' '--config' 'run.toml' '--set' 'n_epochs=2' '--verbose' --auto-resume --job \"${SLURM_CLUSTER_NAME:-slurm}/$SLURM_JOB_ID\" &",
        ] {
            assert!(script.lines().any(|it| it == line), "{line}\n{script}");
        }
        assert!(!script.contains("--account"));
    }

    #[test]
    fn gpus_per_node_defaults_to_auto_and_0_means_cpu() {
        let given = script("--nodes 2 --config run.toml --sbatch=--gres=gpu:8").unwrap();
        assert!(
            given.contains("'--gpus-per-node' 'auto'") && !given.contains("#SBATCH --gpus-per-node"),
            "{given}"
        );
        let on_cpu = script("--nodes 2 --config run.toml --gpus-per-node 0").unwrap();
        assert!(
            on_cpu.contains("'--gpus-per-node' '0'") && !on_cpu.contains("#SBATCH --gpus-per-node"),
            "{on_cpu}"
        );
    }

    #[test]
    fn invalid_launcher_options_are_refused_before_submission() {
        let check = |words: &str| {
            let words = ["slurm", "--nodes", "1", "--config", "c", "--"].into_iter().chain(words.split(' '));
            let line = <Line as clap::Parser>::try_parse_from(words).unwrap();
            check(&line.options).map_err(|fault| fault.message)
        };
        for fine in ["--overwrite", "--resume", "--set n_epochs=2 --verbose"] {
            assert_eq!(check(fine), Ok(()), "{fine}");
        }
        for bad in ["--overwrite --resume", "--auto-resume", "--overwritten", "--max-restarts x"] {
            assert!(check(bad).unwrap_err().starts_with("the launcher in the job would refuse"), "{bad}");
        }
    }

    #[test]
    fn options_with_line_breaks_are_refused() {
        let mut line =
            <Line as clap::Parser>::try_parse_from(["slurm", "--nodes", "1", "--config", "c"]).unwrap();
        line.options.account = Some("a\nrm -rf /".into());
        assert!(write(&line.options, Path::new("/"), Path::new("/l")).is_err());
    }
}
