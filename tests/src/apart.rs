//! Trainers that see different folders, as on several hosts without a shared file system: the paths in the configuration are relative,
//! and each process starts in its own folder.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::{Workspace, binary, text};

/// Outputs of a run's processes.
#[derive(Debug)]
pub struct Ended {
    /// Output of the coordinator.
    pub coordinator: Output,
    /// Outputs of the trainers, by launch index.
    pub trainers: Vec<Output>,
}

impl Ended {
    /// All outputs, joined.
    #[must_use]
    pub fn text(&self) -> String {
        self.trainers.iter().fold(text(&self.coordinator), |all, output| all + &text(output))
    }
}

/// Runs a coordinator in the first folder and a trainer in each folder.
pub fn run(workspace: &Workspace, config: &str, folders: &[&str], flag: &str) -> Ended {
    run_with(workspace, config, folders, flag, &binary("trainer"))
}

/// Like [`run`], but starts `last` as the last trainer.
pub fn run_with(workspace: &Workspace, config: &str, folders: &[&str], flag: &str, last: &Path) -> Ended {
    let mut coordinator = Command::new(binary("coordinator"));
    coordinator.current_dir(workspace.path(folders[0])).arg("--config").arg(workspace.path(config));
    coordinator
        .args([flag, "--world-size", &folders.len().to_string(), "--join-timeout-seconds", "30"])
        .env("NO_COLOR", "1");
    crate::processes::die_with_me(&mut coordinator);
    let mut coordinator =
        coordinator.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(coordinator.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let announced: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
    let trainers = match announced["listening"].as_str() {
        Some(address) => started(workspace, &format!("http://{address}"), folders, last),
        None => Vec::new(),
    };
    let trainers = trainers.into_iter().map(|trainer| trainer.wait_with_output().unwrap()).collect();
    Ended { coordinator: coordinator.wait_with_output().unwrap(), trainers }
}

fn started(workspace: &Workspace, url: &str, folders: &[&str], last: &Path) -> Vec<Child> {
    let program = |index: usize| if index + 1 == folders.len() { last.to_owned() } else { binary("trainer") };
    let start =
        |(index, folder): (usize, &&str)| trainer(&program(index), url, index, &workspace.path(folder));
    folders.iter().enumerate().map(start).collect()
}

fn trainer(program: &Path, url: &str, index: usize, folder: &Path) -> Child {
    let mut trainer = Command::new(program);
    trainer.current_dir(folder).args(["run", "--coordinator", url, "--device", "cpu", "--threads", "1"]);
    trainer.args(["--name", &format!("trainer-{index}"), "--launch-index", &index.to_string()]);
    trainer.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    crate::processes::die_with_me(&mut trainer);
    trainer.spawn().unwrap()
}

/// Copies a folder with its contents.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
