//! A resume is the same run: changes that alter its numbers are refused by name, other changes are listed, and a complete run stays as
//! it is.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dyad_tests::apart::{copy, run};
use dyad_tests::{BASE, CURVE, Workspace, assert_same_curve, text};

/// Returns all files below a folder with their bytes, without logs, which every start changes.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("logs") {
            found.extend(files(&path));
        } else if path.is_file() {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// Returns a workspace with a run of four steps that was interrupted after two.
fn interrupted(extra: &str) -> Workspace {
    let workspace = Workspace::with_model(16, &format!("max_steps = 4\nn_checkpoints = 2\n{extra}"));
    workspace.train(1, "out", &[]);
    fs::remove_dir_all(workspace.path("out/final")).unwrap();
    workspace
}

/// Panics unless a resume is refused with `words` and changes no file.
fn refused(workspace: &Workspace, args: &[&str], words: &str) {
    let before = files(&workspace.path("out"));
    let output = workspace.launch(1, &[args, &["--resume"]].concat());
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert!(said.contains(words) && said.contains("hint: "), "{args:?}: {said}");
    assert!(files(&workspace.path("out")) == before, "{args:?}: a refused resume has changed files");
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{}: {text}", path.display());
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn a_resume_with_changed_results_is_refused_by_key() {
    let workspace = interrupted("");
    for (change, words) in [
        ("dpo_beta=0.9", "dpo_beta was 0.1 and is now 0.9"),
        ("training_method=sft", "training_method was dpo and is now sft"),
        ("learning_rate=1e-3", "learning_rate was 0.01 and is now 0.001"),
        ("shuffle=false", "shuffle was true and is now false"),
        ("lora=true", "lora was false and is now true"),
        ("max_steps=1", "has done 2 steps, but the configuration asks for 1"),
        // Only trainers know the model's own maximum length.
        ("max_seq_length=60", "max_seq_length was"),
        ("dtype=bfloat16", "dtype was float32 and is now bfloat16"),
    ] {
        refused(&workspace, &["--set", change], words);
    }
    workspace.new_model("other", &["--seed", "7"]);
    refused(&workspace, &["--set", "model=other"], "the content of the weights of `model` was");
}

#[test]
fn changed_model_files_are_named() {
    let workspace = interrupted("");
    copy(&workspace.path("model"), &workspace.path("kept"));
    let model = |file: &str| workspace.path("model").join(file);
    let put_back = |file: &str| fs::copy(workspace.path("kept").join(file), model(file)).unwrap();
    replace(&model("config.json"), "\"rope_theta\": 10000.0", "\"rope_theta\": 77777.0");
    refused(&workspace, &[], "config.json rope_");
    put_back("config.json");
    fs::write(model("special_tokens_map.json"), "{\"bos_token\": \"!\"}").unwrap();
    refused(&workspace, &[], "special_tokens_map.json bos_token was");
    fs::remove_file(model("special_tokens_map.json")).unwrap();
    replace(&model("tokenizer.json"), "\"fuse_unk\": false", "\"fuse_unk\": true");
    refused(&workspace, &[], "tokenizer.json was");
    put_back("tokenizer.json");
    // Whitespace in the file does not matter.
    let json = fs::read_to_string(model("tokenizer.json")).unwrap();
    fs::write(model("tokenizer.json"), json.replace(": ", ":") + "\n").unwrap();
    assert!(workspace.launch(1, &["--resume"]).status.success());
}

#[test]
fn an_adapter_resumes_over_its_own_base_and_with_its_own_scale() {
    let workspace = interrupted("lora = true\nlora_r = 4\nlora_alpha = 8\n");
    refused(&workspace, &["--set", "lora_alpha=64"], "lora_alpha was 8.0 and is now 64.0");
    refused(&workspace, &["--set", "lora_r=8"], "lora_r was 4 and is now 8");
    refused(&workspace, &["--set", "lora_trainable_modules=q_proj"], "lora_trainable_modules was all-linear");
    workspace.new_model("other", &["--seed", "7"]);
    refused(&workspace, &["--set", "model=other"], "the content of the weights of `model` was");
}

#[test]
fn a_moved_model_is_the_same_run() {
    let workspace = interrupted("");
    let whole = workspace.train(1, "whole", &[]);
    fs::rename(workspace.path("model"), workspace.path("moved")).unwrap();
    fs::rename(workspace.path("pairs.jsonl"), workspace.path("elsewhere.jsonl")).unwrap();
    let moved = ["--set", "model=moved", "--set", "training_file=elsewhere.jsonl", "--resume"];
    let output = workspace.launch(1, &moved);
    assert!(output.status.success(), "{}", text(&output));
    assert!(!text(&output).contains("with changes"), "{}", text(&output));
    assert_same_curve(&whole, &workspace.rows("out/metrics.jsonl"), &CURVE, 0.0);
}

#[test]
fn deliberate_changes_are_listed_in_one_line() {
    let workspace = interrupted("");
    let output = workspace.launch(2, &["--set", "max_steps=6", "--set", "n_checkpoints=3", "--resume"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("with changes")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    for words in [
        "max_steps was 4 and is now 6",
        "n_checkpoints was 2 and is now 3",
        "the number of trainers was 1 and is now 2",
        "the learning rate is that of a run of the new length",
    ] {
        assert!(lines[0].contains(words), "{said}");
    }
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 6);
}

#[test]
fn a_checkpoint_of_an_earlier_version_resumes_with_a_warning() {
    let workspace = interrupted("");
    let state = workspace.path("out/checkpoint-2/dyad_state.json");
    let mut json: serde_json::Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    for key in ["config", "facts", "steps_per_epoch", "validation_sha256"] {
        json.as_object_mut().unwrap().remove(key).unwrap();
    }
    fs::write(&state, json.to_string()).unwrap();
    // Earlier versions wrote no checksums either.
    fs::remove_file(workspace.path("out/checkpoint-2/dyad_manifest.json")).unwrap();
    let output = workspace.launch(1, &["--resume"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("could be compared").count(), 1, "{said}");
}

#[test]
fn a_complete_run_says_so_and_changes_nothing() {
    for n_checkpoints in ["n_checkpoints = 1\n", "n_checkpoints = 2\n"] {
        let workspace = Workspace::with_model(16, &format!("max_steps = 2\n{n_checkpoints}"));
        workspace.train(1, "out", &[]);
        let before = files(&workspace.path("out"));
        let output = workspace.launch(1, &["--resume"]);
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("this run is complete: ") && said.contains("out/final"), "{said}");
        assert!(files(&workspace.path("out")) == before, "a complete run has changed");
        refused(&workspace, &["--set", "dpo_beta=0.3"], "dpo_beta was 0.1 and is now 0.3");
        refused(&workspace, &["--set", "max_steps=1"], "this run is complete with 2 steps");
        // As schedulers start it again.
        let config = BASE.to_owned() + "max_steps = 2\n" + n_checkpoints;
        workspace.write("again.toml", &config);
        for flag in ["--resume", "--auto-resume"] {
            let again = run(&workspace, "again.toml", &["."], flag);
            assert!(again.coordinator.status.success() && again.trainers.is_empty(), "{}", again.text());
            assert!(again.text().contains("this run is complete: "), "{}", again.text());
        }
        assert!(files(&workspace.path("out")) == before, "a complete run has changed");
    }
}

#[test]
fn an_extended_complete_run_equals_an_uninterrupted_longer_one() {
    let workspace = Workspace::with_model(32, "n_checkpoints = 2\nn_epochs = 1\n");
    let longer = ["--set", "lr_scheduler_type=constant", "--set", "n_epochs=2"];
    let whole = workspace.train(2, "whole", &longer);
    workspace.train(2, "out", &["--set", "lr_scheduler_type=constant"]);
    let output = workspace.launch(2, &[&longer[..], &["--resume"]].concat());
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("n_epochs was 1 and is now 2") && !said.contains("learning rate is that"),
        "{said}"
    );
    assert_same_curve(&whole, &workspace.rows("out/metrics.jsonl"), &CURVE, 0.0);
    let bytes = |dir: &str| fs::read(workspace.path(&format!("{dir}/final/model.safetensors"))).unwrap();
    assert!(bytes("whole") == bytes("out"), "final weights differ");
}

#[test]
fn a_complete_run_without_a_checkpoint_says_how_to_continue() {
    let workspace = Workspace::with_model(16, "max_steps = 2\n");
    workspace.train(1, "out", &[]);
    let words =
        format!("from_checkpoint = \"{}\"", workspace.path("out/final").canonicalize().unwrap().display());
    refused(&workspace, &["--set", "max_steps=6"], &words);
}

/// Returns a workspace with two folders with the same model and pairs, and a configuration with relative paths for both.
fn two_hosts(extra: &str) -> Workspace {
    let workspace = Workspace::empty();
    for host in ["a", "b"] {
        fs::create_dir(workspace.path(host)).unwrap();
    }
    workspace.write("pairs.jsonl", &dyad_tests::pair_lines(16));
    workspace.new_model("a/model", &[]);
    workspace.write("a/pairs.jsonl", &dyad_tests::pair_lines(16));
    copy(&workspace.path("a"), &workspace.path("b"));
    workspace.write("two.toml", &format!("{BASE}max_steps = 4\nn_checkpoints = 2\n{extra}"));
    workspace
}

/// Panics unless training on both hosts fails before its first row with `words`.
fn differs(workspace: &Workspace, flag: &str, words: &str) {
    let rows = workspace.path("a/out/metrics.jsonl");
    let before = fs::read(&rows).ok();
    let ended = run(workspace, "two.toml", &["a", "b"], flag);
    let said = ended.text();
    assert_eq!(ended.coordinator.status.code(), Some(2), "{said}");
    assert!(said.contains("the trainers would not compute the same: ") && said.contains(words), "{said}");
    assert!(
        said.contains("trainer rank 0 (trainer-0) on ") && said.contains("trainer rank 1 (trainer-1) on "),
        "{said}"
    );
    assert!(fs::read(&rows).ok() == before, "rows were recorded of ranks that differ");
}

#[test]
fn ranks_with_different_files_fail_before_the_first_row() {
    let workspace = two_hosts("");
    let model = |file: &str| workspace.path("b/model").join(file);
    let put_back = |file: &str| fs::copy(workspace.path("a/model").join(file), model(file)).unwrap();
    replace(
        &model("tokenizer_config.json"),
        "{% if add_generation_prompt %}",
        " {% if add_generation_prompt %}",
    );
    differs(&workspace, "--overwrite", "tokenizer_config.json chat_template is ");
    put_back("tokenizer_config.json");
    replace(&model("config.json"), "\"rope_theta\": 10000.0", "\"rope_theta\": 77777.0");
    differs(&workspace, "--overwrite", "config.json rope_");
    put_back("config.json");
    replace(&model("tokenizer.json"), "\"fuse_unk\": false", "\"fuse_unk\": true");
    differs(&workspace, "--overwrite", "tokenizer.json is ");
    put_back("tokenizer.json");
    fs::write(model("special_tokens_map.json"), "{\"eos_token\": \"!\"}").unwrap();
    differs(&workspace, "--overwrite", "special_tokens_map.json eos_token is absent at");
}

#[test]
fn ranks_with_different_adapters_fail() {
    let workspace = two_hosts("lora = true\nlora_r = 4\n");
    let first = run(&workspace, "two.toml", &["a", "b"], "--overwrite");
    assert!(first.coordinator.status.success(), "{}", first.text());
    for host in ["a", "b"] {
        copy(&workspace.path("a/out/final"), &workspace.path(&format!("{host}/adapter")));
    }
    let config = fs::read_to_string(workspace.path("two.toml")).unwrap().replace("lora_r = 4\n", "");
    workspace.write("two.toml", &(config + "from_checkpoint = \"adapter\"\n"));
    let description = workspace.path("b/adapter/adapter_config.json");
    replace(&description, "\"lora_alpha\": 8", "\"lora_alpha\": 9");
    differs(&workspace, "--overwrite", "adapter_config.json lora_alpha is ");
}

/// As on a host that still has the folder of an earlier run.
#[test]
fn a_rank_that_resumes_from_another_checkpoint_fails() {
    for stage in ["zero_stage = 0\n", "zero_stage = 2\n"] {
        let workspace = two_hosts(stage);
        let first = run(&workspace, "two.toml", &["a", "b"], "--overwrite");
        assert!(first.coordinator.status.success(), "{}", first.text());
        fs::remove_dir_all(workspace.path("a/out/final")).unwrap();
        copy(&workspace.path("a/out/checkpoint-2"), &workspace.path("b/out/checkpoint-2"));
        let stale = workspace.path("b/out/checkpoint-2/optimizer.safetensors");
        let good = fs::read(&stale).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&stale, bad).unwrap();
        differs(&workspace, "--resume", "the content of the checkpoint is ");
        fs::write(&stale, good).unwrap();
        replace(&workspace.path("b/out/checkpoint-2/dyad_state.json"), "\"step\": 2", "\"step\": 3");
        differs(&workspace, "--resume", "the step of the checkpoint is 2 at ");
    }
}

#[test]
fn trainers_of_two_builds_are_refused_by_name() {
    let workspace = two_hosts("");
    // A build that differs only in an unused byte.
    let folder = workspace.path("target/release");
    fs::create_dir_all(&folder).unwrap();
    // The trainer looks for libtorch relative to its own folder.
    std::os::unix::fs::symlink(dyad_tests::root().join(".libtorch"), workspace.path(".libtorch")).unwrap();
    let other = folder.join("trainer");
    let mut program = fs::read(dyad_tests::binary("trainer")).unwrap();
    program.push(0);
    fs::write(&other, program).unwrap();
    fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ended = dyad_tests::apart::run_with(&workspace, "two.toml", &["a", "b"], "--overwrite", &other);
    let said = ended.text();
    assert!(!ended.coordinator.status.success(), "{said}");
    assert!(said.contains("all trainers of a run must be of one build"), "{said}");
}
