//! `launcher check`, `launcher preview` and `launcher convert`, as a user starts them.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fmt::Write as _;
use std::fs;
use std::process::{Command, Output};

use dyad_tests::{Workspace, binary, pair, pair_lines, root, text};
use serde_json::{Value, json};

mod bad {
    include!("bad_files/cases.rs");
}

fn launcher(workspace: &Workspace, args: &[&str]) -> Output {
    let mut command = Command::new(binary("launcher"));
    command.current_dir(workspace.path(".")).env("XDG_CACHE_HOME", workspace.path("cache")).args(args);
    command.output().unwrap()
}

/// Every bad file of `bad_files/cases.rs`, and what `launcher check` says about it. `UPDATE_GOLDEN=1` writes the file anew.
#[test]
fn every_bad_file_gets_its_message() {
    let workspace = Workspace::with_model(8, "");
    let mut said = String::new();
    for (name, content) in bad::CASES {
        workspace.write("bad.jsonl", content);
        let model = content.contains("<|").then_some(["--model", "model"]);
        let args = [
            &["check", "bad.jsonl", "--max-seq-length", "48"][..],
            model.as_ref().map_or(&[], |model| &model[..]),
        ]
        .concat();
        let output = launcher(&workspace, &args);
        let _ =
            write!(said, "== {name}\n{}(status {})\n\n", text(&output), output.status.code().unwrap_or(-1));
        let _ = fs::remove_dir_all(workspace.path("cache"));
    }
    let path = root().join("tests/tests/bad_files/expected.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &said).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    for (said, expected) in said.split("== ").zip(expected.split("== ")) {
        assert_eq!(said, expected, "UPDATE_GOLDEN=1 writes {} anew", path.display());
    }
    assert_eq!(said.len(), expected.len());
    assert!(bad::CASES.len() >= 80, "{}", bad::CASES.len());
}

#[test]
fn a_good_file_gets_a_table_and_status_0() {
    let workspace = Workspace::with_model(40, "");
    let output =
        launcher(&workspace, &["check", "pairs.jsonl", "--model", "model", "--max-seq-length", "64"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for words in
        ["pairs.jsonl: 40 records", "prompt tokens", "chosen tokens", "rejected tokens", "max_seq_length"]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    let output = launcher(&workspace, &["check", "--config", "run.toml", "--json"]);
    let report: Value = serde_json::from_str(&text(&output)).unwrap();
    assert_eq!((&report["files"][0]["records"], &report["findings"]), (&json!(40), &json!([])));
    assert_eq!(
        report["files"][0]["tokens"]["chosen"]["histogram"]["records"]
            .as_array()
            .unwrap()
            .iter()
            .map(|count| count.as_u64().unwrap())
            .sum::<u64>(),
        40
    );
}

#[test]
fn duplicates_are_found_in_a_file_and_across_training_and_validation() {
    let workspace = Workspace::with_model(8, "");
    let (one, opposite) = (pair("Q", "A", "B"), pair("Q", "B", "A"));
    workspace.write("a.jsonl", &format!("{one}\n{}\n\n{one}\n{opposite}\n", pair("Q2", "A", "B")));
    workspace.write("b.jsonl", &format!("{}\n{one}\n", pair("Q3", "A", "B")));
    let said = text(&launcher(&workspace, &["check", "a.jsonl", "--validation", "b.jsonl"]));
    for words in [
        "warning: a.jsonl line 4: record: the same as line 1",
        "warning: a.jsonl line 5: record: prefers the opposite of line 1",
        "warning: b.jsonl line 2: record: the same as a.jsonl line 1",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

/// The clean file has every record without a finding, byte for byte, and checks clean. The rejects have the others. The input stays.
#[test]
fn fix_splits_a_file_into_clean_records_and_rejects() {
    let workspace = Workspace::with_model(8, "");
    let good = pair_lines(5);
    let bad = "{\"input\": 7}\nnot json\n";
    let same = pair("Same?", "Yes.", "Yes.").to_string();
    let input = format!("{good}{bad}{same}\n");
    workspace.write("mixed.jsonl", &input);
    let output = launcher(&workspace, &["check", "mixed.jsonl", "--fix"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert_eq!(fs::read_to_string(workspace.path("mixed.jsonl")).unwrap(), input);
    assert_eq!(fs::read_to_string(workspace.path("mixed.clean.jsonl")).unwrap(), good);
    let rejects = workspace.rows("mixed.rejects.jsonl");
    assert_eq!(rejects.iter().map(|row| row["line"].as_u64().unwrap()).collect::<Vec<_>>(), [6, 7, 8]);
    assert_eq!(rejects[1]["record"], "not json");
    assert_eq!(rejects[2]["problems"][0]["severity"], "left_out");
    assert!(launcher(&workspace, &["check", "mixed.clean.jsonl"]).status.success());
    let again = launcher(&workspace, &["check", "mixed.jsonl", "--fix"]);
    assert!(text(&again).contains("mixed.clean.jsonl exists"), "{}", text(&again));
}

#[test]
fn preview_marks_the_trained_tokens_of_both_sides() {
    let workspace = Workspace::with_model(8, "");
    workspace.write("one.jsonl", &(pair("What?", "This.", "That.").to_string() + "\n"));
    let output = launcher(&workspace, &["preview", "one.jsonl", "--model", "model"]);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦This.<|im_end|>\n⟧"),
        "{said}"
    );
    assert!(said.contains("⟦That.<|im_end|>\n⟧"), "{said}");
    assert!(!said.contains('\u{1b}'));
}

/// A run on the converted file has the numbers of the run on the original.
#[test]
fn converted_pairs_train_like_the_original() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let output = launcher(&workspace, &["convert", "pairs.jsonl", "--to", "preference", "-o", "trl.jsonl"]);
    assert!(output.status.success() && text(&output).contains("8 records of 8 records"), "{}", text(&output));
    let rows = ["pairs.jsonl", "trl.jsonl"].map(|file| {
        workspace.train(
            1,
            "out",
            &["--overwrite", "--set", &format!("training_file={file}"), "--set", "shuffle=false"],
        )
    });
    assert_eq!(rows[0][0]["loss"], rows[1][0]["loss"]);
    let lost =
        launcher(&workspace, &["convert", "pairs.jsonl", "--to", "prompt_completion", "-o", "sft.jsonl"]);
    assert!(text(&lost).contains("lost in 8 records: the rejected output"), "{}", text(&lost));
    let refused = launcher(&workspace, &["convert", "sft.jsonl", "--to", "preference", "-o", "no.jsonl"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        text(&refused).contains("sft.jsonl line 1: it has one answer, and a pair needs two"),
        "{}",
        text(&refused)
    );
    assert!(!workspace.path("no.jsonl").exists());
}
