//! Starts from folders that earlier runs wrote: without `model`, damaged, edited, or with an unreadable file.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use dyad_tests::refusal::invalid;
use dyad_tests::{Workspace, binary, number, text};
use serde_json::Value;

fn flip_last_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    fs::write(path, bytes).unwrap();
}

fn generate(workspace: &Workspace, model: &str) -> Output {
    let mut command = Command::new(binary("trainer"));
    command.current_dir(workspace.path(".")).args([
        "generate",
        "--model",
        model,
        "--prompt",
        "What comes after 3?",
    ]);
    command.args(["--max-new-tokens", "2"]).output().unwrap()
}

/// Returns a workspace with a run of two steps in `first/`, and a configuration without `model`.
fn after_a_run(config: &str) -> Workspace {
    let workspace = Workspace::with_model(16, config);
    workspace.train(1, "first", &["--set", "max_steps=2", "--set", "save_steps=1"]);
    let run = fs::read_to_string(workspace.path("run.toml")).unwrap();
    workspace.write("run.toml", &run.replace("model = \"model\"\n", "max_steps = 1\n"));
    workspace
}

#[test]
fn from_checkpoint_needs_no_model_key() {
    for config in ["", "lora = true\nlora_r = 4\n"] {
        let workspace = after_a_run(config);
        let run = fs::read_to_string(workspace.path("run.toml")).unwrap();
        workspace.write("run.toml", &run.replace("lora_r = 4\n", ""));
        let start = ["--set", "from_checkpoint=first/final"];
        let alone = workspace.train(1, "alone", &start);
        let named = workspace.train(1, "named", &[&start[..], &["--set", "model=model"]].concat());
        assert_eq!(number(&alone[0], "loss"), number(&named[0], "loss"), "{config}");
        assert_eq!(number(&alone[0], "rewards/margins"), 0.0, "the start is its own reference");
    }
}

#[test]
fn a_start_with_damaged_weights_is_refused_by_every_loader() {
    let workspace = after_a_run("");
    for folder in ["first/final", "first/checkpoint-1"] {
        flip_last_byte(&workspace.path(folder).join("model.safetensors"));
        let message = [folder, " is damaged: model.safetensors has other bytes than were written"];
        invalid(&workspace, &["--set", &format!("from_checkpoint={folder}")], &message, "copy it again");
        invalid(&workspace, &["--set", &format!("model={folder}")], &message, "copy it again");
        let output = generate(&workspace, folder);
        assert!(
            output.status.code() == Some(2) && text(&output).contains(&message.concat()),
            "{}",
            text(&output)
        );
    }
    let complete = ["--resume", "--set", "model=model", "--set", "output_dir=first", "--set", "max_steps=2"];
    let output = workspace.launch(1, &[&complete[..], &["--set", "save_steps=1"]].concat());
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("is damaged: model.safetensors has other bytes than were written"), "{said}");
}

#[test]
fn an_adapter_whose_weights_were_damaged_is_refused_and_an_edited_file_is_named() {
    let workspace = after_a_run("lora = true\n");
    let template = workspace.path("first/final/tokenizer_config.json");
    let edited = fs::read_to_string(&template).unwrap() + "\n";
    fs::write(&template, edited).unwrap();
    let start = ["--set", "from_checkpoint=first/final"];
    let output = workspace.launch(1, &[&start[..], &["--set", "output_dir=edited"]].concat());
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let line = "first/final is not as the run left it: tokenizer_config.json has ";
    assert_eq!(said.matches(line).count(), 1, "{said}");
    flip_last_byte(&workspace.path("first/final/adapter_model.safetensors"));
    invalid(&workspace, &start, &["is damaged: adapter_model.safetensors"], "copy it again");
}

#[test]
fn an_unreadable_tokenizer_is_not_treated_as_absent() {
    let workspace = after_a_run("");
    let tokenizer = workspace.path("first/final/tokenizer.json");
    fs::remove_file(&tokenizer).unwrap();
    let start = ["--set", "from_checkpoint=first/final", "--set", "model=model"];
    symlink("nowhere", &tokenizer).unwrap();
    invalid(&workspace, &start, &["cannot read ", "first/final/tokenizer.json"], "may read");
    let output = generate(&workspace, "first/final");
    assert!(text(&output).contains("first/final/tokenizer.json"), "{}", text(&output));
    fs::remove_file(&tokenizer).unwrap();
    fs::create_dir(&tokenizer).unwrap();
    invalid(&workspace, &start, &["cannot read ", "first/final/tokenizer.json"], "may read");
}

#[test]
fn an_adapters_configuration_that_cannot_be_read_says_why() {
    let workspace = after_a_run("lora = true\n");
    let config = workspace.path("first/final/adapter_config.json");
    let start = ["--set", "from_checkpoint=first/final"];
    fs::write(&config, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n").unwrap();
    invalid(&workspace, &start, &["adapter_config.json is a Git LFS pointer"], "git lfs pull");
    fs::write(&config, "{\"peft_type\": ").unwrap();
    invalid(&workspace, &start, &["adapter_config.json: EOF"], "PEFT");
    let output = generate(&workspace, "first/final");
    assert!(text(&output).contains("adapter_config.json: EOF"), "{}", text(&output));
    fs::remove_file(&config).unwrap();
    symlink("nowhere", &config).unwrap();
    invalid(&workspace, &start, &["cannot read ", "first/final/adapter_config.json"], "may read");
}

/// Serving programs read from generation_config.json where an answer ends.
#[test]
fn a_model_keeps_only_the_generation_config_of_its_start() {
    let workspace = Workspace::with_model(16, "max_steps = 1\nmerge_adapter = true\nlora = true\n");
    workspace.new_model("start", &["--seed", "3"]);
    fs::remove_file(workspace.path("start/generation_config.json")).unwrap();
    let whole = ["--set", "lora=false", "--set", "merge_adapter=false"];
    workspace.train(1, "whole", &[&whole[..], &["--set", "from_checkpoint=start"]].concat());
    assert!(!workspace.path("whole/final/generation_config.json").exists(), "of the other folder");
    // An adapter with its own tokenizer and template, over a model with others.
    workspace.train(1, "adapter", &["--set", "save_steps=1"]);
    let template = "{% for m in messages %}{{ m.content }}|{% endfor %}";
    workspace.write("adapter/final/chat_template.jinja", template);
    fs::remove_file(workspace.path("adapter/final/dyad_manifest.json")).unwrap();
    workspace.train(
        1,
        "again",
        &[
            "--set",
            "from_checkpoint=adapter/final",
            "--set",
            "n_checkpoints=1",
            "--set",
            "max_steps=2",
            "--set",
            "save_steps=1",
        ],
    );
    for folder in ["final", "final/merged", "checkpoint-1"] {
        let read = |name: &str| fs::read_to_string(workspace.path("again").join(folder).join(name));
        assert_eq!(read("chat_template.jinja").unwrap(), template, "{folder}");
        let tokenizer: Value = serde_json::from_str(&read("tokenizer.json").unwrap()).unwrap();
        assert!(tokenizer.is_object(), "{folder}");
    }
    let generation = |folder: &str| fs::read(workspace.path(folder).join("generation_config.json")).unwrap();
    assert_eq!(generation("again/final/merged"), generation("model"));
}
