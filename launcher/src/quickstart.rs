//! `launcher quickstart`: makes and trains a small model on one machine, with built-in data and configurations.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use clap::Args;
use dyad_proto::{Fault, files, safe_file};
use tokio::process::Command;

use crate::process::os::die_with_me;
use crate::process::programs::program;

/// Names and contents of the files that the quickstart writes.
const FILES: [(&str, &str); 4] = [
    ("train.jsonl", include_str!("../../examples/quickstart/train.jsonl")),
    ("validation.jsonl", include_str!("../../examples/quickstart/validation.jsonl")),
    ("sft.toml", include_str!("../../examples/quickstart/sft.toml")),
    ("dpo.toml", include_str!("../../examples/quickstart/dpo.toml")),
];

/// Arguments for a Llama of four million parameters, which learns the pairs in a minute.
const MODEL: [&str; 14] = [
    "--vocab-size",
    "2048",
    "--hidden-size",
    "256",
    "--layers",
    "4",
    "--heads",
    "8",
    "--kv-heads",
    "4",
    "--intermediate-size",
    "704",
    "--max-positions",
    "256",
];

/// Options of `launcher quickstart`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "It makes a small Llama with random weights and its own tokenizer, trains it on 400 shipped pairs, first
supervised, then with DPO from there, and shows answers to questions that it has not seen. It takes one to two minutes on two cores."
)]
pub struct QuickstartOptions {
    /// Folder for pairs, configurations, model and runs. Runs of an earlier quickstart in it are replaced
    #[arg(long, value_name = "DIR", default_value = "quickstart-runs")]
    pub out: PathBuf,
    /// Trainers of each run
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: u32,
}

/// A run of the quickstart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuickstartRun {
    /// Heading on the terminal.
    pub title: &'static str,
    /// Command line, starting with `launcher`.
    pub line: Vec<String>,
}

/// Writes pairs and configurations. Fails if a file exists with other content.
pub fn write_files(out: &Path) -> Result<(), Fault> {
    let cannot = |path: &Path, error: std::io::Error| {
        Fault::input(format!("cannot write {}: {error}", path.display()))
            .hint("--out takes a folder that you may write to")
    };
    let folder = out.to_str().filter(|folder| !folder.is_empty()).ok_or_else(|| {
        Fault::input(format!("--out {} is not valid UTF-8", out.display())).hint("choose another folder")
    })?;
    std::fs::create_dir_all(out).map_err(|error| cannot(out, error))?;
    for (name, text) in FILES {
        let path = out.join(name);
        let text = if name.ends_with(".toml") { placed(text, folder) } else { text.to_owned() };
        match files::read_to_string(&path) {
            Ok(there) if there == text => continue,
            Ok(_) => {
                return Err(Fault::input(format!("{} is not the quickstart's own file", path.display())).hint(
                    "give --out another folder, or remove the file if you no longer need what was changed in it",
                ));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(cannot(&path, error)),
        }
        safe_file::write(&path, text.as_bytes()).map_err(|error| cannot(&path, error))?;
    }
    Ok(())
}

/// A configuration with its paths moved into `folder`.
fn placed(config: &str, folder: &str) -> String {
    let folder = folder.trim_end_matches('/').replace('\\', "\\\\").replace('"', "\\\"");
    config
        .replace("\"examples/quickstart/", &format!("\"{folder}/"))
        .replace("\"quickstart-runs/", &format!("\"{folder}/"))
}

/// Arguments of the trainer program that makes the model.
#[must_use]
pub fn model_arguments(out: &Path) -> Vec<String> {
    let path = |name: &str| out.join(name).display().to_string();
    let fixed = MODEL.map(str::to_owned);
    let own = ["new-model".into(), "--out".into(), path("model"), "--texts".into(), path("train.jsonl")];
    own.into_iter().chain(fixed).chain(["--overwrite".to_owned()]).collect()
}

/// The two runs, in order.
#[must_use]
pub fn runs(options: &QuickstartOptions) -> [QuickstartRun; 2] {
    let line = |config: &str, more: &[&str]| {
        let config = options.out.join(config).display().to_string();
        let nodes = options.nodes.to_string();
        let words =
            ["launcher", "--nodes", &nodes, "--gpus-per-node", "0", "--config", &config, "--overwrite"];
        words.iter().chain(more).map(|word| (*word).to_owned()).collect()
    };
    [
        QuickstartRun {
            title: "supervised fine-tuning on the preferred outputs",
            line: line("sft.toml", &[]),
        },
        QuickstartRun { title: "DPO from there", line: line("dpo.toml", &["--samples", "4"]) },
    ]
}

/// Runs the trainer program to make the model.
pub async fn make_model(out: &Path) -> Result<(), Fault> {
    let trainer = program("trainer")?;
    let mut command = Command::new(&trainer);
    command.args(model_arguments(out)).stdin(Stdio::null());
    die_with_me(&mut command);
    let failed = |reason: &str| Fault::failed(format!("the quickstart's model cannot be made: {reason}"));
    let output = command
        .output()
        .await
        .map_err(|error| failed(&format!("cannot start {}: {error}", trainer.display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(match Fault::reported(&said, output.status.code()) {
        Some(fault) => failed(&fault.message).hint(fault.hint),
        None => failed(&said.lines().next_back().map_or_else(|| output.status.to_string(), str::to_owned)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_once_and_a_changed_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a \"quoted\" folder");
        write_files(&out).unwrap();
        write_files(&out).unwrap();
        let config = std::fs::read_to_string(out.join("dpo.toml")).unwrap();
        let config: toml::Table = config.parse().unwrap();
        for (key, name) in
            [("training_file", "train.jsonl"), ("model", "model"), ("from_checkpoint", "sft/final")]
        {
            assert_eq!(config[key].as_str().unwrap(), out.join(name).to_str().unwrap(), "{key}");
        }
        std::fs::write(out.join("sft.toml"), "n_epochs = 1\n").unwrap();
        let fault = write_files(&out).unwrap_err();
        assert!(fault.message.ends_with("sft.toml is not the quickstart's own file"), "{fault}");
        assert_eq!(std::fs::read_to_string(out.join("sft.toml")).unwrap(), "n_epochs = 1\n");
    }

    #[test]
    fn all_configured_paths_are_inside_the_folder() {
        for (name, text) in FILES.iter().filter(|(name, _)| name.ends_with(".toml")) {
            let placed = placed(text, "there/");
            let elsewhere = |path: &str| placed.contains(path);
            assert!(!elsewhere("examples/quickstart/") && !elsewhere("quickstart-runs/"), "{name}");
            assert!(placed.contains("training_file = \"there/train.jsonl\""), "{placed}");
        }
    }
}
