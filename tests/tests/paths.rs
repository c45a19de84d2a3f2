//! Paths in the configuration: `~`, unexpanded shell syntax, and texts that are not paths.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Output};

use dyad_tests::refusal::{invalid, invalid_at_once};
use dyad_tests::{Workspace, binary, text};

/// Returns a workspace with a home folder that holds the pairs and the model.
fn at_home() -> Workspace {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    fs::create_dir(workspace.path("home")).unwrap();
    fs::rename(workspace.path("pairs.jsonl"), workspace.path("home/pairs.jsonl")).unwrap();
    fs::rename(workspace.path("model"), workspace.path("home/model")).unwrap();
    let config = fs::read_to_string(workspace.path("run.toml")).unwrap();
    fs::write(workspace.path("home/run.toml"), config).unwrap();
    workspace
}

fn launch_from_home(workspace: &Workspace, set: &[&str]) -> Output {
    let mut command = workspace.launcher(1, &[]);
    command.env("HOME", workspace.path("home"));
    for item in set {
        command.args(["--set", item]);
    }
    command.output().unwrap()
}

#[test]
fn a_tilde_is_the_home_folder_in_every_key() {
    let workspace = at_home();
    let output = launch_from_home(
        &workspace,
        &[
            "training_file=~/pairs.jsonl",
            "validation_file=~/pairs.jsonl",
            "model=~/model",
            "from_checkpoint=~/model/",
            "output_dir=~/runs/1",
            "reference_logps=cache",
            "reference_cache=~/kept/scores.sqlite",
        ],
    );
    assert!(output.status.success(), "{}", text(&output));
    for made in ["home/runs/1/final/config.json", "home/kept/scores.sqlite"] {
        assert!(workspace.path(made).is_file(), "{made} is missing");
    }
    assert!(!workspace.path("~").exists());
}

#[test]
fn a_tilde_is_the_home_folder_in_the_name_of_the_configuration() {
    let workspace = at_home();
    let mut command = Command::new(binary("launcher"));
    command.args(["--nodes", "1", "--gpus-per-node", "0", "--config=~/run.toml", "--dry-run"]);
    let output =
        command.current_dir(workspace.path("home")).env("HOME", workspace.path("home")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn unexpanded_shell_syntax_in_paths_is_refused() {
    let workspace = Workspace::with_model(4, "");
    for key in ["output_dir", "training_file", "model", "from_checkpoint", "reference_cache"] {
        for (path, words) in
            [("~ada/x", "begins with `~`"), ("$HOME/x", "holds $HOME"), ("${X}/x", "holds ${X}")]
        {
            let message = [&format!("config key `{key}`"), words];
            invalid_at_once(&workspace, &["--set", &format!("{key}={path}")], &message, "in full");
        }
    }
    assert!(!workspace.path("~ada").exists() && !workspace.path("$HOME").exists());
}

#[test]
fn control_characters_and_addresses_are_refused_as_paths() {
    let workspace = Workspace::with_model(4, "");
    let refuse = |set: &str, words: &str| {
        invalid_at_once(&workspace, &["--set", set], &["config key `output_dir`", words], "");
    };
    refuse("output_dir=a\nb", "\"a\\nb\" holds the control character '\\n'");
    refuse("output_dir=a\u{1b}[2Jb", "holds the control character");
    refuse("output_dir=s3://bucket/run", "is an address, not a path");
    assert!(!workspace.path("s3:").exists());
}

#[test]
fn unicode_spaces_dots_and_slashes_are_allowed_in_paths() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    workspace.train(1, "mein Lauf ü 漢/1 🙂/", &[]);
    assert!(workspace.path("mein Lauf ü 漢/1 🙂/final/config.json").is_file());
    let output = workspace.launch(1, &["--set", "output_dir=."]);
    assert!(output.status.success(), "{}", text(&output));
    let folder = fs::canonicalize(workspace.path("")).unwrap();
    let told = format!("model    {}\n", folder.join("final").display());
    assert!(text(&output).contains(&told), "no {told:?} in {}", text(&output));
    assert!(workspace.path("pairs.jsonl").is_file() && workspace.path("model").is_dir());
}

#[test]
fn a_dangling_link_and_a_file_as_output_folder_are_refused_with_their_kind() {
    let workspace = Workspace::with_model(4, "");
    symlink("nowhere/deep", workspace.path("dangling")).unwrap();
    let refuse = |path: &str, why: &str| {
        let args = ["--set", &format!("output_dir={path}")];
        invalid(&workspace, &args, &["cannot write output_dir", why], "that you may write to");
    };
    refuse("dangling", "dangling is a link to nowhere/deep, which is not there");
    refuse("dangling/run", "dangling is a link to nowhere/deep, which is not there");
    refuse("pairs.jsonl", "pairs.jsonl is no folder");
    assert!(!workspace.path("nowhere").exists());
}
