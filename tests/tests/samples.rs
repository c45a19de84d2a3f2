//! Sample answers at evaluations: which files a run writes, and that every number of trainers gives the same answers.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;

use dyad_tests::{Row, Workspace, binary, text};
use std::process::Command;

const CONFIG: &str =
    "validation_file = \"pairs.jsonl\"\nmax_steps = 4\nn_evals = 2\nn_samples = 3\nmax_new_tokens = 8\n";

/// Answers without the names of their files.
fn answers(workspace: &Workspace, out: &str, step: u64) -> Vec<Row> {
    workspace.rows(&format!("{out}/samples/step-{step}.jsonl"))
}

/// What `trainer generate` answers to the same prompts.
fn generated(workspace: &Workspace, model: &str) -> Vec<String> {
    let mut command = Command::new(binary("trainer"));
    command.current_dir(workspace.path(".")).args(["generate", "--model", model, "--pairs", "pairs.jsonl"]);
    let output = command.args(["--limit", "3", "--max-new-tokens", "8"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str::<Row>(line).unwrap()["completion"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn answers_before_and_after_training_are_those_of_the_two_models() {
    let workspace = Workspace::with_model(16, CONFIG);
    let output = workspace.launch(1, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains("samples  ") && text(&output).contains("out/samples"),
        "{}",
        text(&output)
    );
    let (base, trained) = (generated(&workspace, "model"), generated(&workspace, "out/final"));
    let rows = answers(&workspace, "out", 4);
    let column = |key: &str| rows.iter().map(|row| row[key].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(
        (column("base"), column("trained")),
        (base.iter().map(String::as_str).collect(), trained.iter().map(String::as_str).collect())
    );
    assert_eq!(
        rows.iter()
            .map(|row| row["place"].as_str().unwrap().rsplit(' ').next().unwrap().to_owned())
            .collect::<Vec<_>>(),
        ["1", "2", "3"]
    );
    assert!(column("prompt")[1].contains("What comes after 1?"), "{rows:?}");
    let page = fs::read_to_string(workspace.path("out/samples/step-4.md")).unwrap();
    assert!(
        page.starts_with("# Answers after 4 steps") && page.matches("Before training").count() == 3,
        "{page}"
    );
    let mut files: Vec<_> = fs::read_dir(workspace.path("out/samples"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(
        files,
        ["step-0.jsonl", "step-0.md", "step-2.jsonl", "step-2.md", "step-4.jsonl", "step-4.md"]
    );
}

#[test]
fn every_number_of_trainers_and_every_stage_gives_the_same_answers() {
    let workspace = Workspace::with_model(16, CONFIG);
    workspace.train(1, "one", &[]);
    for (world, keys) in [(2, "zero_stage=0"), (2, "zero_stage=2"), (2, "zero_stage=3"), (3, "zero_stage=3")]
    {
        let out = format!("out{world}{}", &keys[11..]);
        workspace.train(world, &out, &["--set", keys]);
        for step in [0, 2, 4] {
            assert_eq!(
                answers(&workspace, &out, step),
                answers(&workspace, "one", step),
                "{world} {keys} {step}"
            );
        }
    }
    let lora = ["--set", "lora=true", "--set", "lora_r=4"];
    workspace.train(1, "lora", &lora);
    workspace.train(2, "lora3", &[&lora[..], &["--set", "zero_stage=3"]].concat());
    assert_eq!(answers(&workspace, "lora", 4), answers(&workspace, "lora3", 4));
    assert_eq!(answers(&workspace, "lora", 0), answers(&workspace, "one", 0));
}

#[test]
fn overwrite_removes_the_earlier_answers_and_keeps_other_files() {
    let workspace = Workspace::with_model(16, CONFIG);
    workspace.train(1, "out", &[]);
    fs::write(workspace.path("out/samples/notes.md"), "mine").unwrap();
    workspace.write("run.toml", dyad_tests::BASE);
    workspace.train(1, "out", &["--overwrite"]);
    let left: Vec<_> = fs::read_dir(workspace.path("out/samples"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["notes.md"]);
}
