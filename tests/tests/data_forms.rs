//! Data formats: hosted, TRL's messages and plain text.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_tests::refusal::invalid;
use dyad_tests::{CURVE, Workspace, assert_same_curve, text};
use serde_json::{Value, json};

fn workspace(lines: &[Value]) -> Workspace {
    let workspace = Workspace::with_model(16, "max_steps = 2\nshuffle = false\n");
    workspace.write("trl.jsonl", &lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    workspace
}

fn said(role: &str, text: &str) -> Value {
    json!({ "role": role, "content": text })
}

/// Returns question, preferred and other answer of each pair of a workspace.
fn contents(workspace: &Workspace) -> Vec<[String; 3]> {
    let content = |value: &Value| value[0]["content"].as_str().unwrap().to_owned();
    let rows = workspace.rows("pairs.jsonl");
    rows.iter()
        .map(|row| {
            let prompt = content(&row["input"]["messages"]);
            [prompt, content(&row["preferred_output"]), content(&row["non_preferred_output"])]
        })
        .collect()
}

const TRL: [&str; 2] = ["--set", "training_file=trl.jsonl"];

#[test]
fn trl_messages_train_like_the_same_pairs_in_the_hosted_format() {
    let hosted = Workspace::with_model(16, "max_steps = 2\nshuffle = false\n");
    let expected = hosted.train(1, "out", &[]);
    let pairs = contents(&hosted);
    let explicit = pairs.iter().map(|[prompt, chosen, rejected]| {
        json!({ "prompt": [said("user", prompt)], "chosen": [said("assistant", chosen)],
                "rejected": [said("assistant", rejected)], "score_chosen": 9.5, "source": "x", "tools": null })
    });
    let implicit = pairs.iter().map(|[prompt, chosen, rejected]| {
        json!({ "chosen": [said("user", prompt), said("assistant", chosen)],
                "rejected": [said("user", prompt), said("assistant", rejected)] })
    });
    for (lines, extra) in [(explicit.collect::<Vec<_>>(), true), (implicit.collect(), false)] {
        let workspace = workspace(&lines);
        let output = workspace.launch(1, &TRL);
        let shown = text(&output);
        assert!(output.status.success(), "{shown}");
        assert_same_curve(&expected, &workspace.rows("out/metrics.jsonl"), &CURVE, 0.0);
        let passed_over = "training_file has columns that are not read: score_chosen, source";
        assert_eq!(shown.contains(passed_over), extra, "{shown}");
        assert!(!shown.contains("no chat template"), "{shown}");
    }
}

#[test]
fn plain_text_is_trained_without_a_template_and_says_so() {
    let line = json!({ "prompt": "The sky is", "chosen": " blue.", "rejected": " green and square." });
    let workspace = workspace(&vec![line; 8]);
    for args in [&TRL[..], &[&TRL[..], &["--dry-run", "--set", "output_dir=none"]].concat()] {
        let output = workspace.launch(1, args);
        let shown = text(&output);
        assert!(output.status.success(), "{shown}");
        assert_eq!(shown.matches("no chat template is applied").count(), 1, "{shown}");
    }
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 2);
}

#[test]
fn plain_text_needs_a_tokenizer_with_an_end_of_sequence_token() {
    let line = json!({ "prompt": "The sky is", "chosen": " blue.", "rejected": " green." });
    let workspace = workspace(&[line]);
    let path = workspace.path("model/tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["eos_token"] = Value::Null;
    std::fs::write(&path, config.to_string()).unwrap();
    invalid(
        &workspace,
        &TRL,
        &["trl.jsonl line 1", "the tokenizer has no eos_token"],
        "tokenizer_config.json",
    );
}

#[test]
fn lines_of_two_formats_in_one_file_are_refused() {
    let trl = json!({ "prompt": "a", "chosen": "b", "rejected": "c" });
    let workspace = workspace(&[]);
    let hosted = std::fs::read_to_string(workspace.path("pairs.jsonl")).unwrap();
    workspace.write("trl.jsonl", &format!("{hosted}{trl}\n"));
    invalid(
        &workspace,
        &TRL,
        &["trl.jsonl line 17", "unknown field `prompt`"],
        "all lines of a file have the same fields",
    );
}

#[test]
fn pairs_of_any_format_serve_as_prompts_for_generating() {
    let line = json!({ "prompt": "The sky is", "chosen": " blue.", "rejected": " green." });
    let workspace = workspace(&[line]);
    let mut command = std::process::Command::new(dyad_tests::binary("trainer"));
    command.current_dir(workspace.path(".")).args(["generate", "--model", "model", "--pairs", "trl.jsonl"]);
    let output = command.args(["--max-new-tokens", "1"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("The sky is"), "{}", text(&output));
}
