//! Pairs of a file: which are trained on, which are dropped and counted, and which end the run with their line number.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use dyad_tests::refusal::{invalid, invalid_at_once, invalid_of};
use dyad_tests::{Workspace, binary, pair, pair_lines, text};
use serde_json::{Value, json};

/// Returns a workspace with good pairs, two pairs with equal sides, and one whose sides are equal once it is cut.
fn with_equal_sides() -> Workspace {
    let workspace =
        Workspace::with_model(9, "max_steps = 1\nmax_seq_length = 60\nvalidation_file = \"val.jsonl\"\n");
    let long = "No idea about that. ".repeat(20);
    let equal = pair("What comes after 1?", "After 1 comes 2.", "After 1 comes 2.").to_string();
    let late = pair("What comes after 1?", &format!("{long}A"), &format!("{long}B")).to_string();
    workspace.write("pairs.jsonl", &format!("{}{equal}\n{late}\n{equal}\n", pair_lines(3)));
    workspace.write("val.jsonl", &format!("{}{equal}\n", pair_lines(2)));
    workspace
}

#[test]
fn pairs_with_equal_sides_are_dropped_and_counted() {
    let workspace = with_equal_sides();
    let output = workspace.launch(2, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let told = "6 pairs, 1 step per epoch, 1 step, 3 dropped: both sides the same tokens, \
                3 validation pairs (1 dropped: both sides the same tokens)";
    assert!(text(&output).contains(told), "{}", text(&output));
    let sft = workspace.launch(1, &["--set", "training_method=sft", "--set", "output_dir=sft"]);
    assert!(sft.status.success(), "{}", text(&sft));
    assert!(!text(&sft).contains("dropped"), "a supervised run has one side alone: {}", text(&sft));
}

#[test]
fn a_file_with_only_equal_sides_is_refused_with_the_reason() {
    let workspace = with_equal_sides();
    let equal = pair("What comes after 1?", "Two.", "Two.").to_string();
    workspace.write("equal.jsonl", &format!("{equal}\n{equal}\n"));
    for key in ["training_file", "validation_file"] {
        let args = ["--set", &format!("{key}=equal.jsonl")];
        let message =
            [&format!("no pair of {key}"), "equal.jsonl is left: 2 pairs have the same tokens on both sides"];
        invalid(&workspace, &args, &message, "max_seq_length");
    }
}

/// Returns a workspace whose tokenizer has a token without a row in the embedding.
fn with_a_token_too_many() -> Workspace {
    let workspace = Workspace::with_model(4, "validation_file = \"val.jsonl\"\n");
    let path = workspace.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let mut token = tokenizer["added_tokens"][0].clone();
    token["content"] = json!("<|more|>");
    token["id"] = json!(320);
    tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    fs::write(&path, tokenizer.to_string()).unwrap();
    let good = pair_lines(4);
    let bad = pair("What is <|more|>?", "Nothing.", "Something.").to_string();
    workspace.write("val.jsonl", &good);
    workspace.write("prompt.jsonl", &format!("\n{good}\n{bad}\n{bad}\n"));
    workspace.write("answer.jsonl", &format!("{good}{}\n", pair("What?", "Nothing.", "<|more|>")));
    workspace
}

#[test]
fn a_token_without_a_row_in_the_embedding_is_refused_before_the_first_step() {
    let workspace = with_a_token_too_many();
    let token = "token \"<|more|>\" has id 320, but the model's embedding has only 320 rows";
    let refuse = |trainers, key: &str, file: &str, place: &str| {
        let args = ["--set", &format!("{key}={file}")];
        invalid_of(trainers, &workspace, &args, &[place, token], "resize the embedding");
    };
    let first = "prompt.jsonl line 7: ";
    for trainers in [1, 2] {
        refuse(trainers, "training_file", "prompt.jsonl", first);
        refuse(trainers, "training_file", "answer.jsonl", "answer.jsonl line 5: ");
    }
    refuse(2, "validation_file", "prompt.jsonl", first);
    // Supervised fine-tuning does not read the other side.
    let args =
        ["--set", "training_file=answer.jsonl", "--set", "training_method=sft", "--set", "max_steps=1"];
    workspace.train(1, "sft", &args);
}

fn generate(workspace: &Workspace, pairs: &str) -> Output {
    let mut command = Command::new(binary("trainer"));
    command.current_dir(workspace.path("")).args(["generate", "--model", "model", "--pairs", pairs]);
    command.args(["--max-new-tokens", "2", "--limit", "9"]).output().unwrap()
}

#[test]
fn generating_refuses_unknown_tokens_by_file_and_line() {
    let workspace = with_a_token_too_many();
    let output = generate(&workspace, "prompt.jsonl");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    let told = "error: prompt.jsonl line 7: token \"<|more|>\" has id 320";
    assert!(text(&output).contains(told), "{}", text(&output));
    assert!(generate(&workspace, "answer.jsonl").status.success(), "the answers are not asked for");
}

/// Makes the template refuse system messages, as the templates of some models do.
fn refuse_system_messages(model: &Path) {
    let path = model.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let template = config["chat_template"].as_str().unwrap();
    let refusing =
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
    config["chat_template"] = json!(format!("{refusing}{template}"));
    fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn a_pair_that_the_template_refuses_is_named_by_file_and_line() {
    let workspace = Workspace::with_model(4, "");
    refuse_system_messages(&workspace.path("model"));
    let good = pair("Hi", "Hello", "No").to_string();
    let mut bad = pair("Hi", "Hello", "No");
    let system = json!({ "role": "system", "content": "Be kind." });
    bad["input"]["messages"].as_array_mut().unwrap().insert(0, system);
    workspace.write("bad.jsonl", &format!("\n\n{good}\n\n{bad}\n{good}\n{bad}\n"));
    for (key, trainers) in [("training_file", 1), ("validation_file", 2)] {
        let args = ["--set", &format!("{key}=bad.jsonl")];
        let message = [
            "bad.jsonl line 5: the chat template refuses",
            "System role not supported",
            "(the first of 2 pairs",
        ];
        invalid_of(trainers, &workspace, &args, &message, "roles");
    }
    let output = generate(&workspace, "bad.jsonl");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(
        text(&output).contains("error: bad.jsonl line 5: the chat template refuses"),
        "{}",
        text(&output)
    );
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_change_nothing() {
    let workspace = Workspace::with_model(8, "max_steps = 1\nshuffle = false\n");
    let plain = workspace.train(1, "plain", &[]);
    let windows = pair_lines(8).replace('\n', "\r\n");
    workspace.write("pairs.jsonl", &format!("\u{feff}{windows}\r\n\r\n"));
    let marked = workspace.train(1, "marked", &[]);
    assert_eq!(plain[0]["loss"], marked[0]["loss"]);
    assert_eq!(plain[0]["grad_norm"], marked[0]["grad_norm"]);
}

#[test]
fn files_in_other_formats_are_refused_with_a_hint() {
    let workspace = Workspace::with_model(4, "");
    let lines = pair_lines(4);
    let utf16: Vec<u8> = format!("\u{feff}{lines}").encode_utf16().flat_map(u16::to_le_bytes).collect();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    let cases: [(&[u8], &str, &str); 6] = [
        (&utf16, "UTF-16 text", "iconv"),
        (b"\x1f\x8b\x08\x08....", "cannot be unpacked", "the file is damaged"),
        (b"PAR1....", "cannot be unpacked", "the file is damaged"),
        (b"BZh91AY", "a bzip2 file", "bunzip2"),
        (format!("{first:#}\n").leak().as_bytes(), "JSON over several lines", "jq -c ."),
        (format!("{lines}\0\0\0\0").leak().as_bytes(), "line 5: record: holds NUL bytes", "one JSON object"),
    ];
    for (bytes, what, hint) in cases {
        fs::write(workspace.path("pairs.jsonl"), bytes).unwrap();
        invalid(&workspace, &[], &["pairs.jsonl", what], hint);
    }
}

#[test]
fn pipes_devices_sockets_and_folders_are_refused_as_pair_files() {
    let workspace = Workspace::with_model(4, "");
    let made = Command::new("mkfifo").arg(workspace.path("pipe")).status().unwrap();
    assert!(made.success());
    for (path, what) in
        [("pipe", "a pipe"), ("/dev/zero", "a device"), ("/dev/stdin", "a stream of this process")]
    {
        for key in ["training_file", "validation_file"] {
            let args = ["--set", &format!("{key}={path}")];
            let message = format!("cannot read {key} {path}: it is {what}");
            invalid_at_once(&workspace, &args, &[&message], "");
        }
    }
    let output = generate(&workspace, "pipe");
    assert!(text(&output).contains("it is a pipe, not a regular file"), "{}", text(&output));
}

#[test]
fn a_line_too_long_to_send_is_refused_by_its_number() {
    let workspace = Workspace::with_model(4, "");
    let long = pair("Hi", &"word ".repeat(14_000_000), "No");
    workspace.write("pairs.jsonl", &format!("{}{long}\n", pair_lines(2)));
    invalid(
        &workspace,
        &[],
        &["pairs.jsonl line 3: record: 70", "at most 67043328 bytes"],
        "one JSON object",
    );
}

/// A model that never sees the end of an answer does not learn to stop.
#[test]
fn outputs_without_a_stop_token_cause_one_warning_that_names_the_stop_tokens() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let warning = "no preferred output ends with a token that ends an answer";
    let said = |name: &str| {
        let output = workspace.launch(2, &["--set", &format!("output_dir={name}")]);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    assert!(!said("ends").contains(warning));
    let config = fs::read_to_string(workspace.path("model/generation_config.json")).unwrap();
    // generation_config.json, which serving programs read, names another token as the end of an answer.
    workspace.write("model/generation_config.json", r#"{"eos_token_id": 0}"#);
    let other = said("other");
    assert_eq!(other.matches(warning).count(), 1, "{other}");
    assert!(other.contains("<|endoftext|>"), "{other}");
    workspace.write("model/generation_config.json", &config);
    workspace.write("model/chat_template.jinja", "{% for m in messages %}{{ m.content }} {% endfor %}");
    let endless = said("endless");
    assert_eq!(endless.matches(warning).count(), 1, "{endless}");
}
