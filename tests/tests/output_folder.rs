//! Files of an earlier run stay until the new run has replacements, even if something blocks the new run.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use dyad_tests::{Workspace, binary, text};
use safetensors::SafeTensors;

/// Returns a workspace with a run of four steps in `out/`, with a checkpoint after two.
fn finished() -> Workspace {
    let workspace = Workspace::with_model(16, "max_steps = 4\nsave_steps = 2\n");
    workspace.train(1, "out", &[]);
    workspace
}

/// Panics unless the run is refused as invalid input, and its error contains every part and its hint contains `hint`.
fn refused(workspace: &Workspace, args: &[&str], message: &[&str], hint: &str) {
    let output = workspace.launch(1, args);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let line = |start: &str| said.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_owned();
    assert!(message.iter().all(|part| line("error: ").contains(part)), "{said}");
    assert!(line("hint: ").contains(hint), "{said}");
}

/// Returns the bytes of the files that must not be lost.
fn model(workspace: &Workspace) -> Vec<Vec<u8>> {
    let files =
        ["final/model.safetensors", "checkpoint-2/optimizer.safetensors", "checkpoint-2/dyad_state.json"];
    files.map(|file| fs::read(workspace.path("out").join(file)).unwrap()).into()
}

#[test]
fn an_overwriting_run_that_cannot_write_its_files_removes_nothing() {
    let workspace = finished();
    let before = model(&workspace);
    let out = workspace.path("out");
    fs::rename(out.join("tb"), out.join("charts")).unwrap();
    fs::write(out.join("tb"), "").unwrap();
    refused(&workspace, &["--overwrite"], &["tb is no folder, where a run makes one"], "move it away");
    fs::remove_file(out.join("tb")).unwrap();
    for name in ["metrics.jsonl", "run.json", ".run.json.part", "eval_metrics.jsonl"] {
        let (path, aside) = (out.join(name), workspace.path("aside"));
        let moved = fs::rename(&path, &aside).is_ok();
        fs::create_dir_all(path.join("mine")).unwrap();
        let message = format!("{name} is a folder, where a run writes a file");
        refused(&workspace, &["--overwrite"], &[&message], "move it away");
        fs::remove_dir_all(&path).unwrap();
        if moved {
            fs::rename(&aside, &path).unwrap();
        }
    }
    assert!(model(&workspace) == before, "the earlier run has changed");
}

fn spoil(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let end = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("model.norm.weight").unwrap().data();
        data.as_ptr() as usize - bytes.as_ptr() as usize + data.len()
    };
    bytes[end - 4..end].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_overwriting_run_whose_first_loss_is_nan_removes_nothing() {
    let workspace = finished();
    let before = model(&workspace);
    let rows = fs::read(workspace.path("out/metrics.jsonl")).unwrap();
    spoil(&workspace.path("model/model.safetensors"));
    for args in [
        &["--overwrite", "--max-restarts", "3"][..],
        &["--overwrite", "--set", "validation_file=pairs.jsonl"],
    ] {
        let output = workspace.launch(1, args);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(" is NaN"), "{said}");
        assert!(model(&workspace) == before, "{said}");
        assert!(fs::read(workspace.path("out/metrics.jsonl")).unwrap() == rows, "{said}");
    }
}

/// Writes a trainer that runs the shell line `first` before it starts. Returns the folder of the programs.
fn slow_trainer(workspace: &Workspace, first: &str) -> String {
    let bin = workspace.path("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["launcher", "coordinator"] {
        std::os::unix::fs::symlink(binary(name), bin.join(name)).unwrap();
    }
    let script = format!("#!/bin/sh\n{first}\nexec {} \"$@\"\n", binary("trainer").display());
    fs::write(bin.join("trainer"), script).unwrap();
    fs::set_permissions(bin.join("trainer"), fs::Permissions::from_mode(0o755)).unwrap();
    bin.display().to_string()
}

#[test]
fn an_output_folder_that_is_moved_before_the_first_step_ends_the_run() {
    let workspace = Workspace::with_model(16, "max_steps = 4\n");
    let (out, moved) = (workspace.path("out"), workspace.path("moved"));
    let bin = slow_trainer(&workspace, &format!("mv {} {}", out.display(), moved.display()));
    let output = workspace.launcher(1, &[]).env("DYAD_BIN_DIR", bin).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("was replaced by another folder while the run"), "{said}");
    assert!(!out.join("final").exists() && !out.join("metrics.jsonl").exists(), "{said}");
    assert!(!moved.join("final").exists() && !moved.join("metrics.jsonl").exists(), "{said}");
}

#[test]
fn a_lock_linked_to_another_file_leaves_that_file_unchanged() {
    let workspace = Workspace::with_model(16, "max_steps = 1\n");
    fs::create_dir(workspace.path("out")).unwrap();
    workspace.write("victim", "precious\n");
    let lock = workspace.path("out/.dyad-lock");
    fs::hard_link(workspace.path("victim"), &lock).unwrap();
    refused(&workspace, &[], &[".dyad-lock is not a lock that Dyad wrote"], "move it away");
    assert_eq!(fs::read_to_string(workspace.path("victim")).unwrap(), "precious\n");
    fs::remove_file(&lock).unwrap();
    workspace.write("victim", "");
    fs::hard_link(workspace.path("victim"), &lock).unwrap();
    workspace.train(1, "out", &[]);
    assert_eq!(fs::read_to_string(workspace.path("victim")).unwrap(), "");
}

#[test]
fn a_resume_with_foreign_files_in_its_way_is_refused_before_training() {
    let workspace = finished();
    let out = workspace.path("out");
    let rows = fs::read(out.join("metrics.jsonl")).unwrap();
    fs::remove_dir_all(out.join("final")).unwrap();
    for name in ["final", "checkpoint-3"] {
        fs::create_dir(out.join(name)).unwrap();
        fs::write(out.join(name).join("notes.txt"), "mine").unwrap();
        let message = format!("holds {name}, which Dyad did not write");
        refused(&workspace, &["--resume"], &[&message], "move it away");
        assert_eq!(fs::read_to_string(out.join(name).join("notes.txt")).unwrap(), "mine");
        fs::remove_dir_all(out.join(name)).unwrap();
    }
    assert!(fs::read(out.join("metrics.jsonl")).unwrap() == rows);
    let output = workspace.launch(1, &["--resume"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_complete_run_with_a_damaged_model_says_so_and_can_rebuild_it() {
    let workspace = finished();
    let model = workspace.path("out/final/model.safetensors");
    let whole = fs::read(&model).unwrap();
    fs::write(&model, "").unwrap();
    let message = ["this run is complete, but its model", "is damaged: model.safetensors has 0 bytes"];
    refused(&workspace, &["--resume"], &message, "the same command with --resume goes on from checkpoint-2");
    fs::rename(workspace.path("out/final"), workspace.path("out/broken")).unwrap();
    let output = workspace.launch(1, &["--resume"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(fs::read(&model).unwrap() == whole, "it is another model");
}

#[test]
fn a_checkpoint_without_its_checksums_is_damaged() {
    let workspace = finished();
    let out = workspace.path("out");
    let whole = fs::read(out.join("final/model.safetensors")).unwrap();
    fs::remove_dir_all(out.join("final")).unwrap();
    let output = workspace.launch(1, &["--resume", "--set", "save_steps=3"]);
    assert!(output.status.success(), "{}", text(&output));
    fs::remove_dir_all(out.join("final")).unwrap();
    fs::remove_file(out.join("checkpoint-3/dyad_manifest.json")).unwrap();
    let weights = out.join("checkpoint-3/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    fs::write(&weights, bytes).unwrap();
    let output = workspace.launch(1, &["--resume"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("checkpoint-3 is damaged (dyad_manifest.json is missing)"), "{said}");
    assert!(fs::read(out.join("final/model.safetensors")).unwrap() == whole, "{said}");
}

#[test]
fn user_files_in_a_removed_model_folder_are_kept() {
    let workspace = finished();
    for folder in ["final", "checkpoint-2"] {
        fs::write(workspace.path("out").join(folder).join("scores.txt"), folder).unwrap();
    }
    let args = ["--overwrite", "--set", "save_steps=1", "--set", "save_total_limit=1"];
    let output = workspace.launch(1, &args);
    assert!(output.status.success(), "{}", text(&output));
    for folder in ["final", "checkpoint-2"] {
        let kept = workspace.path("out").join(format!("{folder}-kept"));
        assert_eq!(fs::read_to_string(kept.join("scores.txt")).unwrap(), folder);
        assert_eq!(fs::read_dir(kept).unwrap().count(), 1);
        assert!(text(&output).contains(&format!("{folder} held files that Dyad did not write")));
    }
}
