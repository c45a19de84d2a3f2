//! Trainers that see different folders: one without weights gets them from rank 0, different weights are an error.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::Output;

use dyad_tests::{BASE, Workspace, apart, text};

/// Runs a coordinator and a trainer in each folder. The model's path is relative, so that each trainer reads its own folder.
fn run(workspace: &Workspace, folders: [&str; 2], output_dir: &str, config: &str) -> (Output, Vec<Output>) {
    let pairs = workspace.path("pairs.jsonl").display().to_string();
    let out = workspace.path(output_dir).display().to_string();
    let base = BASE.replace("\"pairs.jsonl\"", &format!("{pairs:?}")).replace("\"out\"", &format!("{out:?}"));
    let file = format!("{output_dir}.toml");
    workspace.write(&file, &format!("{base}max_steps = 2\n{config}"));
    let ended = apart::run(workspace, &file, &folders, "--overwrite");
    (ended.coordinator, ended.trainers)
}

/// Returns a workspace with `full/`, which holds everything, and `bare/`, which lacks the weights.
fn workspace() -> Workspace {
    let workspace = Workspace::empty();
    workspace.write("pairs.jsonl", &dyad_tests::pair_lines(16));
    for folder in ["full", "bare"] {
        std::fs::create_dir(workspace.path(folder)).unwrap();
    }
    workspace.new_model("full/model", &[]);
    copy_without_weights(&workspace, "model");
    workspace
}

fn copy_without_weights(workspace: &Workspace, name: &str) {
    let (from, to) = (workspace.path(&format!("full/{name}")), workspace.path(&format!("bare/{name}")));
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        if entry.path().extension().is_none_or(|extension| extension != "safetensors") {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn assert_same_result(workspace: &Workspace, config: &str, file: &str) {
    let finished = |folders, output_dir: &str, config: &str| {
        let (coordinator, trainers) = run(workspace, folders, output_dir, config);
        for output in trainers.iter().chain([&coordinator]) {
            assert!(output.status.success(), "{config}: {}", text(output));
        }
        let ways: Vec<bool> =
            trainers.iter().map(|output| text(output).contains("model_loading=\"broadcast\"")).collect();
        (std::fs::read(workspace.path(output_dir).join("final").join(file)).unwrap(), ways)
    };
    let (expected, ways) = finished(["full", "full"], "every", config);
    assert_eq!(ways, [false, false], "one host whose trainers all have the weights");
    let (found, ways) = finished(["full", "bare"], "auto", config);
    assert_eq!(ways, [true, true], "a trainer has no weights");
    assert!(found == expected, "{config}: other weights");
    let (found, _) =
        finished(["full", "full"], "broadcast", &format!("{config}model_loading = \"broadcast\"\n"));
    assert!(found == expected, "{config}: other weights");
}

#[test]
fn a_trainer_without_weights_gets_rank_0s() {
    let workspace = workspace();
    assert_same_result(&workspace, "", "model.safetensors");
    assert_same_result(&workspace, "zero_stage = 3\n", "model.safetensors");
}

#[test]
fn a_trainer_without_an_adapters_weights_gets_rank_0s() {
    let workspace = workspace();
    assert_same_result(&workspace, "lora = true\nlora_r = 4\n", "adapter_model.safetensors");
    std::fs::rename(workspace.path("every/final"), workspace.path("full/adapter")).unwrap();
    copy_without_weights(&workspace, "adapter");
    let config = "lora = true\nfrom_checkpoint = \"adapter\"\nzero_stage = 3\n";
    assert_same_result(&workspace, config, "adapter_model.safetensors");
}

#[test]
fn trainers_with_different_weights_fail() {
    let workspace = workspace();
    std::fs::remove_dir_all(workspace.path("bare/model")).unwrap();
    workspace.new_model("bare/model", &["--seed", "2"]);
    let (coordinator, trainers) = run(&workspace, ["full", "bare"], "out", "");
    assert!(!coordinator.status.success());
    let said = format!("{}{}", text(&coordinator), trainers.iter().map(text).collect::<String>());
    assert!(said.contains("the content of the weights of `model` is "), "{said}");
    let (coordinator, trainers) = run(&workspace, ["full", "bare"], "out", "model_loading = \"broadcast\"\n");
    assert!(coordinator.status.success(), "{}", trainers.iter().map(text).collect::<String>());
}

#[test]
fn rank_0_without_weights_fails_with_the_reason() {
    let workspace = workspace();
    let (coordinator, trainers) = run(&workspace, ["bare", "full"], "out", "");
    assert!(!coordinator.status.success());
    assert_eq!(trainers[0].status.code(), Some(2));
    assert!(text(&trainers[0]).contains("no weights in model"), "{}", text(&trainers[0]));
}
