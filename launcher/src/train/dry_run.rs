//! Output of `--dry-run`: processes that would start, pairs, steps, model and the complete configuration.

use std::fmt::{Display, Write};

use dyad_families::{FirstPairs, ModelFindings};
use dyad_proto::pairs::wanted::Wanted;
use dyad_proto::{Fault, RunConfig, agrees, counted, grouped, plain, thousands};
use dyad_sources::open;

use crate::placement::trainers::Trainer;
use dyad_families::shape::Shape;

/// The output for a run on this machine. `look` checks the model with the trainer program.
pub fn describe(
    config: &RunConfig,
    trainers: &[Trainer],
    devices: &str,
    tls: &str,
    look: impl FnOnce() -> Result<ModelFindings, Fault>,
) -> Result<String, Fault> {
    let wanted = Wanted::of(config);
    let count = |key, places| open::pairs(key, places, wanted).map(|pairs| pairs.len() as u64);
    let pairs = count("training_file", &config.training_file)?;
    let validation = config.validation_file.as_ref();
    let held_out = validation.map(|places| count("validation_file", places)).transpose()?;
    let steps_per_epoch = pairs.div_ceil(u64::from(config.batch_size)).max(1);
    let steps = config.max_steps.unwrap_or(u64::from(config.n_epochs) * steps_per_epoch);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "would start 1 coordinator and {} on this machine:",
        counted(trainers.len(), "trainer")
    );
    out += &list(trainers, devices, tls);
    let _ = writeln!(
        out,
        "{}, at most {} per epoch, at most {}",
        counted(pairs, "pair"),
        counted(steps_per_epoch, "step"),
        counted(steps, "step")
    );
    if let Some(held_out) = held_out {
        let _ = writeln!(out, "{}", counted(held_out, "validation pair"));
    }
    // Check the model after the pairs: reading the pairs names the first bad line and counts all of them.
    out += &start(&look()?);
    out += &configuration(config);
    Ok(out)
}

/// Lines about the model and the first pairs, from the trainer program's findings.
fn start(report: &ModelFindings) -> String {
    let mut out = String::new();
    let parameters = match report.parameters {
        Some(parameters) => grouped(parameters, "parameter"),
        // Counts only weight matrices.
        None => format!("about {}", short(Shape::of("", &report.model).parameters())),
    };
    let _ = write!(out, "model: {}, {parameters}", plain::line(&report.model.model_type));
    let _ = match report.trainable {
        Some(trainable) => writeln!(out, ", {} of them trainable", thousands(trainable)),
        None => writeln!(out),
    };
    for name in &report.to_download {
        let _ = writeln!(
            out,
            "{} would be downloaded first: of it only config.json was looked at, not weights, tokenizer and template",
            plain::line(name)
        );
    }
    if let Some(pairs) = &report.pairs {
        let FirstPairs { pairs, longest, truncated, dropped, notes, .. } = pairs;
        notes.iter().for_each(|note| out += &format!("{}\n", plain::line(note)));
        let limit = report.max_seq_length.unwrap_or(0);
        let _ = writeln!(
            out,
            "tensors, tokenizer and template fit together; the first pairs ({pairs}): longest {longest} of at most {}, \
             {truncated} cut, {dropped} left out",
            counted(limit as u64, "token")
        );
    }
    out
}

/// `1.5 B parameters`, `135.0 M parameters`.
fn short(parameters: f64) -> String {
    match parameters {
        billions if billions >= 1e9 => format!("{:.1} B parameters", billions / 1e9),
        others => format!("{:.1} M parameters", others / 1e6),
    }
}

/// The output for a run on other hosts; without pairs and model, which are not on this machine.
#[must_use]
pub fn describe_hosts(
    config: &RunConfig,
    trainers: &[Trainer],
    listen: &str,
    devices: &str,
    tls: &str,
    on_first: bool,
) -> String {
    let place = if on_first { "the first host" } else { "this machine" };
    let out = format!(
        "would start 1 coordinator on {place} ({listen}) and {}:\n",
        counted(trainers.len(), "trainer")
    );
    out + &list(trainers, devices, tls) + &configuration(config)
}

fn list(trainers: &[Trainer], devices: &str, tls: &str) -> String {
    let mut out = String::new();
    for trainer in trainers {
        let Trainer { name, launch_index, device, threads, cores, .. } = trainer;
        let _ = write!(out, "  rank {launch_index}  {name}  device {device}  threads {threads}");
        let _ = if cores.is_empty() { writeln!(out) } else { writeln!(out, "  cores {cores:?}") };
    }
    let _ = writeln!(out, "{devices}");
    let _ = writeln!(out, "TLS between them is {tls}");
    out
}

/// `every step`, `every 10 steps`.
fn every<N: Copy + Display + PartialEq + From<u8>>(count: N, one: &str) -> String {
    if count == N::from(1) { format!("every {one}") } else { format!("every {}", counted(count, one)) }
}

/// When checkpoints are written, and how many are kept.
fn checkpoints(config: &RunConfig) -> String {
    let mut when = Vec::new();
    if config.n_checkpoints > 1 {
        when.push(format!("{} evenly spaced", config.n_checkpoints - 1));
    }
    when.extend(config.save_steps.map(|steps| every(steps, "step")));
    if config.save_minutes > 0.0 {
        when.push(every(config.save_minutes, "minute") + " (of these the last two are kept)");
    }
    if when.is_empty() {
        return "none; the finished model alone".into();
    }
    let limit =
        config.save_total_limit.map(|limit| format!("; at most {limit} {} kept", agrees(limit, "is", "are")));
    when.join(", ") + &limit.unwrap_or_default() + "; then the finished model"
}

fn configuration(config: &RunConfig) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "results go to {}", plain::line(&config.output_dir));
    let _ = writeln!(out, "checkpoints: {}", checkpoints(config));
    let _ = writeln!(out, "configuration (* differs from the default):");
    let values =
        |config: &RunConfig| serde_json::to_value(config).ok().and_then(|value| value.as_object().cloned());
    if let (Some(chosen), Some(defaults)) = (values(config), values(&RunConfig::default())) {
        for key in RunConfig::keys() {
            let mark = if chosen.get(key) == defaults.get(key) { ' ' } else { '*' };
            let value = chosen.get(key).filter(|value| !value.is_null());
            let _ = writeln!(
                out,
                "{mark} {key} = {}",
                value.map_or_else(|| "(unset)".into(), ToString::to_string)
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_schedule_is_described() {
        let told = |change: fn(&mut RunConfig)| {
            let mut config = RunConfig::default();
            change(&mut config);
            checkpoints(&config)
        };
        let timed = "every 30 minutes (of these the last two are kept)";
        assert_eq!(told(|_| {}), format!("{timed}; then the finished model"));
        assert_eq!(told(|config| config.save_minutes = 0.0), "none; the finished model alone");
        let all = told(|config| {
            (config.n_checkpoints, config.save_steps, config.save_total_limit) = (3, Some(10), Some(4));
        });
        let expected =
            format!("2 evenly spaced, every 10 steps, {timed}; at most 4 are kept; then the finished model");
        assert_eq!(all, expected);
    }
}
