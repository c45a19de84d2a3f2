//! Pipes without a writer and endless devices in place of every file that a run reads: an error names them, and the run never waits.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use dyad_tests::Workspace;
use dyad_tests::processes::{die_with_me, outcome};

fn pipe(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn endless(path: &Path) {
    let _ = fs::remove_file(path);
    std::os::unix::fs::symlink("/dev/zero", path).unwrap();
}

/// Panics unless the command ends as invalid input with `words` in its error.
fn refused(command: &mut Command, words: &[&str]) {
    let (status, error) = outcome(&mut command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
    assert_eq!(status, Some(2), "{error}");
    let line = error.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {error}");
}

#[test]
fn pipes_in_a_model_folder_are_refused() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let files = [
        "adapter_config.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "tokenizer.json",
        "config.json",
    ];
    for name in files {
        let path = workspace.path("model").join(name);
        let kept = fs::read(&path).ok();
        pipe(&path);
        refused(&mut workspace.launcher(1, &[]), &[if name == "config.json" { "model" } else { name }]);
        endless(&path);
        refused(&mut workspace.launcher(1, &[]), &[if name == "config.json" { "model" } else { name }]);
        fs::remove_file(&path).unwrap();
        kept.map_or(Ok(()), |bytes| fs::write(&path, bytes)).unwrap();
        let _ = fs::remove_dir_all(workspace.path("out"));
    }
    workspace.train(1, "out", &[]);
}

#[test]
fn pipes_in_an_output_folder_are_refused() {
    let workspace = Workspace::with_model(
        8,
        "max_steps = 2\nsave_steps = 1\nvalidation_file = \"pairs.jsonl\"\nn_evals = 1\n",
    );
    workspace.train(1, "out", &[]);
    let out = workspace.path("out");
    for name in ["run.json", "metrics.jsonl", "eval_metrics.jsonl"] {
        let kept = fs::read(out.join(name)).unwrap();
        for args in [&["--resume", "--set", "max_steps=3"][..], &["--overwrite"]] {
            pipe(&out.join(name));
            refused(&mut workspace.launcher(1, args), &[name, "neither a file nor a folder"]);
        }
        fs::remove_file(out.join(name)).unwrap();
        fs::write(out.join(name), kept).unwrap();
    }
    pipe(&out.join("final/dyad_state.json"));
    refused(&mut workspace.launcher(1, &["--resume"]), &["final", "dyad_state.json"]);
    fs::remove_dir_all(out.join("final")).unwrap();
    for name in ["dyad_state.json", "dyad_manifest.json"] {
        let path = out.join("checkpoint-1").join(name);
        let kept = fs::read(&path).unwrap();
        pipe(&path);
        refused(&mut workspace.launcher(1, &["--resume"]), &["checkpoint-1"]);
        fs::remove_file(&path).unwrap();
        fs::write(&path, kept).unwrap();
    }
}

#[test]
fn pipes_on_the_command_line_are_refused() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let path = workspace.path("pipe");
    pipe(&path);
    let mut hosts = Command::new(dyad_tests::binary("launcher"));
    hosts.current_dir(workspace.path(".")).stdin(Stdio::null());
    hosts.args(["--hostfile", "pipe", "--config", "run.toml"]);
    die_with_me(&mut hosts);
    refused(&mut hosts, &["cannot read hostfile pipe: it is a pipe"]);
    let cache = ["--set", "reference_logps=cache", "--set", "reference_cache=pipe"];
    refused(&mut workspace.launcher(1, &cache), &["pipe", "it is a pipe"]);
}
