//! Dry runs, the doctor and plans check the same as the run itself: they refuse the same input with the same words, and download nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Command, Output};

use dyad_tests::refusal::refused;
use dyad_tests::{Workspace, binary, text};

fn launcher(workspace: &Workspace, args: &[&str]) -> Output {
    let mut command = Command::new(binary("launcher"));
    command.current_dir(workspace.path(".")).env("HF_HUB_OFFLINE", "1").args(args).output().unwrap()
}

/// Panics unless the run and each check fail with the same error, which contains `words`.
fn refused_everywhere(workspace: &Workspace, set: &[&str], words: &str) {
    let set: Vec<&str> = set.iter().flat_map(|item| ["--set", item]).collect();
    let run = refused(workspace, &set);
    assert!(run.message.contains(words), "{}", run.message);
    let plan = ["--gpu", "cpu", "--cpu-gflops", "100"];
    for (command, more) in
        [(&[][..], &["--dry-run", "--gpus-per-node", "0"][..]), (&["doctor"], &[]), (&["plan"], &plan)]
    {
        let output = launcher(workspace, &[command, &["--config", "run.toml"], more, &set].concat());
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{command:?}: {said}");
        assert!(said.contains(words), "{command:?} does not say {words:?}: {said}");
    }
}

#[test]
fn every_check_refuses_what_the_run_refuses() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let config = std::fs::read_to_string(workspace.path("model/config.json")).unwrap();
    let broken = |name: &str, change: &dyn Fn(&str)| {
        let copied =
            Command::new("cp").arg("-r").args([workspace.path("model"), workspace.path(name)]).status();
        assert!(copied.unwrap().success());
        change(name);
        format!("model={name}")
    };
    let rewritten = |name: &str, from: &str, to: &str| {
        assert!(config.contains(from), "{config}");
        workspace.write(&format!("{name}/config.json"), &config.replace(from, to));
    };
    let cases = [
        ("family", "\"llama\"", "\"mixtral\"", "model_type \"mixtral\" is not supported"),
        ("layers", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "missing tensors model.layers.2."),
        ("width", "\"intermediate_size\": ", "\"intermediate_size\": 9", "has shape"),
    ];
    for (name, from, to, words) in cases {
        let set = broken(name, &|name| rewritten(name, from, to));
        refused_everywhere(&workspace, &[&set], words);
    }
    let set = broken("template", &|name| {
        let _ = std::fs::remove_file(workspace.path(&format!("{name}/chat_template.jinja")));
        workspace.write(&format!("{name}/chat_template.jinja"), "{% for m in messages %}{{ m.content }}");
    });
    refused_everywhere(&workspace, &[&set], "chat template");
    let set = broken("tokenizer", &|name| workspace.write(&format!("{name}/tokenizer.json"), "{}"));
    refused_everywhere(&workspace, &[&set], "tokenizer");
    refused_everywhere(&workspace, &["lora=true", "lora_trainable_modules=q_prj"], "q_prj");
}

#[test]
fn a_file_without_a_usable_pair_is_refused_before_the_run() {
    let workspace = Workspace::with_model(4, "max_steps = 1\n");
    let same = dyad_tests::pair("Why?", "Because.", "Because.");
    workspace.write("pairs.jsonl", &format!("{same}\n"));
    refused_everywhere(&workspace, &[], "1 pair has the same tokens on both sides");
}

#[test]
fn a_misspelt_folder_is_not_looked_up_on_the_hub() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::fs::create_dir(workspace.path("models")).unwrap();
    std::fs::rename(workspace.path("model"), workspace.path("models/model")).unwrap();
    // No hub error: it would name HF_HUB_OFFLINE.
    for (model, error, hint) in [
        ("models/modle", "no folder modle in models", "did you mean models/model?"),
        ("modles", "no model folder at modles", "did you mean ./models?"),
        ("models/other-thing", "no folder other-thing in models", "models/other-thing is taken for a path"),
    ] {
        let output = launcher(
            &workspace,
            &[
                "--config",
                "run.toml",
                "--dry-run",
                "--gpus-per-node",
                "0",
                "--set",
                &format!("model={model}"),
            ],
        );
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(error) && said.contains(hint), "{said}");
    }
}

#[test]
fn a_dry_run_reports_model_and_pairs() {
    let workspace = Workspace::with_model(20, "max_steps = 1\nlora = true\nlora_r = 4\n");
    let output = launcher(&workspace, &["--config", "run.toml", "--dry-run", "--gpus-per-node", "0"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for part in [
        "model: llama, 28,832 parameters, ",
        "of them trainable",
        "the first pairs (16): longest ",
        "0 left out",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(!workspace.path("out").exists());
}

#[test]
fn a_plan_counts_pairs_and_exits_with_1_if_the_run_does_not_fit() {
    let workspace = Workspace::with_model(20, "n_epochs = 2\n");
    let plan = |more: &[&str]| {
        launcher(&workspace, &[&["plan", "--config", "run.toml", "--gpus", "1"], more].concat())
    };
    let output = plan(&["--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // 20 pairs in steps of 8, two epochs.
    assert_eq!((&json["steps"], &json["fits"]), (&6.into(), &true.into()), "{json}");
    let small = plan(&["--gpu-memory", "0.5"]);
    assert_eq!(small.status.code(), Some(1), "{}", text(&small));
    assert!(text(&small).contains("error: the run does not fit") && text(&small).contains("DOES NOT FIT"));
    let supervised = plan(&["--json", "--training-method", "sft", "--lora", "--lora-r", "2"]);
    let other: serde_json::Value = serde_json::from_slice(&supervised.stdout).unwrap();
    assert!(other["trained_parameters"].as_u64() < json["trained_parameters"].as_u64(), "{other}");
    std::fs::rename(workspace.path("pairs.jsonl"), workspace.path("elsewhere")).unwrap();
    let without = plan(&["--set", "model=8B"]);
    assert!(
        text(&without).contains("pairs.jsonl is not here: its pairs are not counted"),
        "{}",
        text(&without)
    );
}

#[test]
fn run_json_is_a_valid_configuration_and_records_the_run() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    workspace.train(1, "out", &[]);
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(workspace.path("out/run.json")).unwrap()).unwrap();
    let record = &json["recorded"];
    assert!(record["command"].as_array().unwrap().iter().any(|word| word == "--config"), "{record}");
    assert_eq!(record["trainers"][0]["name"], "node0-cpu", "{record}");
    assert_eq!(record["facts"]["training_file_sha256"].as_str().unwrap().len(), 64, "{record}");
    assert!(record["dyad_version"].is_string() && record["run_id"].is_string(), "{record}");
    let mut again = Command::new(binary("launcher"));
    again.current_dir(workspace.path(".")).args([
        "--nodes",
        "1",
        "--gpus-per-node",
        "0",
        "--config",
        "out/run.json",
    ]);
    let output = again.args(["--set", "output_dir=again"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let rows = |name: &str| std::fs::read_to_string(workspace.path(name)).unwrap();
    let loss =
        |name: &str| rows(name).split("\"loss\":").nth(1).unwrap().split(',').next().unwrap().to_owned();
    assert_eq!(loss("out/metrics.jsonl"), loss("again/metrics.jsonl"));
}

#[test]
fn config_keys_of_other_trainers_are_refused_with_dyads_name() {
    let workspace = Workspace::with_model(4, "beta = 0.1\n");
    let refusal = refused(&workspace, &[]);
    assert!(refusal.message.contains("unknown config key `beta`"), "{}", refusal.message);
    assert!(refusal.hint.contains("it is called `dpo_beta` here"), "{}", refusal.hint);
}

#[test]
fn samples_need_a_validation_file_and_a_validation_file_is_evaluated_at_the_end() {
    let workspace = Workspace::with_model(8, "max_steps = 2\n");
    let refusal = refused(&workspace, &["--samples", "2"]);
    assert!(refusal.message.contains("--samples needs validation_file"), "{}", refusal.message);
    workspace.train(1, "out", &["--set", "validation_file=pairs.jsonl"]);
    let steps: Vec<f64> =
        workspace.rows("out/eval_metrics.jsonl").iter().map(|row| row["step"].as_f64().unwrap()).collect();
    assert_eq!(steps, [0.0, 2.0]);
}

#[test]
fn generate_answers_a_prompt_and_standard_input() {
    let workspace = Workspace::with_model(4, "");
    let generate = |args: &[&str], input: &str| {
        workspace.write("question", input);
        let mut command = Command::new(binary("trainer"));
        command.current_dir(workspace.path(".")).args([
            "generate",
            "--model",
            "model",
            "--max-new-tokens",
            "4",
        ]);
        command.args(args).stdin(std::fs::File::open(workspace.path("question")).unwrap()).output().unwrap()
    };
    let answers = |output: &Output| -> Vec<serde_json::Value> {
        assert!(output.status.success(), "{}", text(output));
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let told = answers(&generate(&["--prompt", "Hello?", "--prompt", "And you?"], ""));
    assert_eq!((told.len(), &told[1]["prompt"]), (2, &"And you?".into()));
    let read = answers(&generate(&[], "Hello?\n"));
    assert_eq!(read, told[..1]);
    assert_eq!(answers(&generate(&["--prompt", "-"], "Hello?\n")), read);
    let empty = generate(&[], "\n");
    assert_eq!(empty.status.code(), Some(2), "{}", text(&empty));
    assert!(text(&empty).contains("prompt 1 is empty"), "{}", text(&empty));
}
