//! Summary of a finished run: metrics before and after, paths, and sample answers.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use dyad_proto::finished::ended_early;
use dyad_proto::names::metric;
use dyad_proto::run_config::DataFiles;
use dyad_proto::run_folder::SAMPLES;
use dyad_proto::{Fault, RunConfig, counted, grouped, plain};
use tokio::process::Command;

use crate::process::os::die_with_me;
use crate::process::programs::program;
use crate::show::rows::{self, Row};

/// Number of samples, and options of their generation.
#[derive(Clone, Copy, Debug)]
pub struct Samples {
    /// Number of prompts from the validation file.
    pub count: usize,
    /// Maximum length of an answer in tokens.
    pub max_new_tokens: usize,
    /// CPU threads of the generation.
    pub threads: usize,
}

/// Table of the run's metrics, from its metrics files, and the paths of model, plot and profile.
#[must_use]
pub fn table(output_dir: &Path, plot: Option<&Path>, profile: Option<&Path>) -> String {
    let steps = rows::read(&output_dir.join("metrics.jsonl"));
    let evaluations = rows::read(&output_dir.join("eval_metrics.jsonl"));
    let mut out = String::new();
    if let Some(last) = steps.last() {
        let seconds: f64 = steps.iter().filter_map(|row| row.get(metric::STEP_SECONDS)).sum();
        let get = |name: &str| last.get(name).copied().unwrap_or_default();
        let (steps, tokens) =
            (counted(get(metric::STEP), "step"), grouped(get(metric::NUM_TOKENS) as u64, "token"));
        let _ = writeln!(out, "trained  {steps}, {tokens} in {}", duration(seconds));
    }
    let model = output_dir.join("final");
    let best = best_step(&evaluations);
    // With early stopping the final model is that of the best evaluation.
    let last = evaluations.iter().rev().find(|row| best.is_none() || row.get(metric::STEP).copied() == best);
    if let (Some(first), Some(last)) = (evaluations.first(), last.filter(|_| evaluations.len() > 1)) {
        out += &before_and_after(first, last);
    }
    let how = ended_early(&model);
    let _ = writeln!(out, "model    {}{how}", plain::line(&model.to_string_lossy()));
    let samples = output_dir.join(SAMPLES);
    let samples = evaluations.last().filter(|_| samples.is_dir()).map(|_| samples.as_path());
    let others = [("plot    ", plot), ("samples ", samples), ("profile ", profile)];
    for (name, path) in others.into_iter().filter_map(|(name, path)| Some((name, path?))) {
        let _ = writeln!(out, "{name} {}", plain::line(&path.to_string_lossy()));
    }
    out
}

/// Step of the best evaluation; `None` without early stopping.
fn best_step(evaluations: &[Row]) -> Option<f64> {
    evaluations.last()?.get(metric::BEST_STEP).copied()
}

/// Metrics of an evaluation that tables show, without the prefix `eval_`, and their labels.
pub const EVALUATED: [(&str, &str); 7] = [
    (metric::LOSS, "loss"),
    (metric::REWARDS_ACCURACIES, "reward accuracy"),
    (metric::REWARDS_MARGINS, "reward margin"),
    (metric::LOGPS_ACCURACIES, "log-prob accuracy"),
    (metric::LOGPS_CHOSEN, "log-prob, preferred"),
    (metric::LOGPS_REJECTED, "log-prob, other"),
    (metric::KL, "KL from reference"),
];

fn before_and_after(first: &Row, last: &Row) -> String {
    let mut out = format!("{:22}{:>10}{:>10}\n", "held-out pairs", "before", "after");
    for (key, label) in EVALUATED {
        let key = format!("{}{key}", metric::EVAL);
        if let (Some(before), Some(after)) = (first.get(&key), last.get(&key)) {
            let _ = writeln!(out, "  {label:20}{before:>10.4}{after:>10.4}");
        }
    }
    out
}

fn duration(seconds: f64) -> String {
    match seconds as u64 {
        whole @ 0..60 => format!("{whole} s"),
        whole @ 60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        whole => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Answers of the initial and the trained model to the first held-out prompts; empty without a validation file.
pub async fn samples(config: &RunConfig, samples: Samples) -> Result<String, Fault> {
    let Some(pairs) = config.validation_file.as_ref().filter(|_| samples.count > 0) else {
        return Ok(String::new());
    };
    let start = config.from_checkpoint.as_deref().unwrap_or(&config.model);
    let before = generate(Path::new(start), pairs, samples).await?;
    let after = generate(&PathBuf::from(&config.output_dir).join("final"), pairs, samples).await?;
    let mut out = String::from("samples\n");
    for (before, after) in before.iter().zip(&after) {
        let text = |row: &HashMap<String, String>, key: &str| {
            row.get(key).map(|text| one_line(text)).unwrap_or_default()
        };
        let _ = writeln!(out, "  prompt   {}", text(before, "prompt"));
        let _ = writeln!(out, "  before   {}", text(before, "completion"));
        let _ = writeln!(out, "  after    {}\n", text(after, "completion"));
    }
    Ok(out)
}

fn one_line(text: &str) -> String {
    plain::line(&text.split_whitespace().collect::<Vec<_>>().join(" ")).into_owned()
}

async fn generate(
    model: &Path,
    pairs: &DataFiles,
    samples: Samples,
) -> Result<Vec<HashMap<String, String>>, Fault> {
    let mut command = Command::new(program("trainer")?);
    command.arg("generate").arg("--model").arg(model);
    for place in pairs.iter() {
        command.args(["--pairs", &place.path]);
    }
    command.args([
        "--limit",
        &samples.count.to_string(),
        "--max-new-tokens",
        &samples.max_new_tokens.to_string(),
    ]);
    command.args(["--threads", &samples.threads.to_string()]).stdin(Stdio::null());
    die_with_me(&mut command);
    let failed = |reason: &str| Fault::failed(format!("cannot sample from {}: {reason}", model.display()));
    let output = command.output().await.map_err(|error| failed(&error.to_string()))?;
    if !output.status.success() {
        return Err(failed(
            String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("unknown error"),
        ));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).map_err(|error| failed(&error.to_string()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_the_first_and_last_evaluation_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("eval_metrics.jsonl"),
            "{\"step\":0,\"eval_loss\":0.6931,\"eval_rewards/accuracies\":0.5}\n{\"step\":9,\"eval_loss\":0.2,\"eval_rewards/accuracies\":0.95}\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("metrics.jsonl"),
            "{\"step\":9,\"num_tokens\":1200,\"step_seconds\":61.5}\n",
        )
        .unwrap();
        let table = table(dir.path(), None, Some(Path::new("runs/a/profile")));
        assert!(table.contains("trained  9 steps, 1,200 tokens in 1 min 1 s"), "{table}");
        assert!(table.contains("reward accuracy         0.5000    0.9500"), "{table}");
        assert!(table.ends_with("\nprofile  runs/a/profile\n"), "{table}");
    }
}
