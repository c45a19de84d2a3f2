//! Tokenizer folders: Dyad gives the ids and special tokens of transformers' AutoTokenizer, or refuses the folder by name.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::pairs::{Message, Role};
use dyad_tests::python::python;
use dyad_tests::{Workspace, text};
use serde_json::{Value, json};

fn classes(args: &[&str], workspace: &Workspace) -> String {
    python("tokenizer_classes.py", args, workspace)
}

fn load(folder: &Path) -> Result<ChatTokenizer, String> {
    ChatTokenizer::load(folder, folder, chrono::NaiveDateTime::default()).map_err(|fault| fault.to_string())
}

#[derive(Debug, PartialEq)]
struct Made {
    ids: Vec<Vec<u32>>,
    /// Ids with the special tokens that the tokenizer adds.
    plain: Vec<Vec<u32>>,
    special: String,
}

#[test]
fn every_tokenizer_folder_gives_the_ids_of_transformers_or_is_refused_by_name() {
    let workspace = Workspace::empty();
    classes(&["folders"], &workspace);
    let expected = fs::read_to_string(workspace.path("folders/tokenizers.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let texts: Vec<String> = serde_json::from_value(expected["texts"].clone()).unwrap();
    let cases: BTreeMap<String, Value> = serde_json::from_value(expected["cases"].clone()).unwrap();
    let ids = cases.values().filter(|case| case["ids"].is_array()).count();
    assert!(ids > 600, "transformers gives ids in {ids} cases only");
    let mut wrong = Vec::new();
    for (name, case) in &cases {
        let loaded = load(&workspace.path("folders").join(name));
        if let Some(words) = case["refused"].as_str() {
            let refusal = loaded.err().unwrap_or_default();
            if !refusal.contains(words) {
                wrong.push(format!("{name}: refused with {refusal:?} instead of {words:?}"));
            }
            continue;
        }
        if case["fails"].is_string() {
            let works = |tokenizer: &ChatTokenizer| texts.iter().all(|text| tokenizer.encode(text).is_ok());
            if loaded.as_ref().is_ok_and(works) {
                wrong.push(format!("{name}: transformers fails with {}", case["fails"]));
            }
            continue;
        }
        let made = loaded.map(|tokenizer| Made {
            ids: texts.iter().map(|text| tokenizer.encode(text).unwrap()).collect(),
            plain: texts.iter().map(|text| tokenizer.encode_plain(text).unwrap()).collect(),
            special: tokenizer.render(&[Message::new(Role::User, "x")], false).unwrap(),
        });
        let right = Made {
            ids: serde_json::from_value(case["ids"].clone()).unwrap(),
            plain: serde_json::from_value(case["plain"].clone()).unwrap(),
            special: case["special"].as_str().unwrap().to_owned(),
        };
        if made.as_ref() != Ok(&right) {
            wrong.push(format!("{name}: {made:?} instead of {right:?}"));
        }
    }
    assert!(
        cases.len() > 550 && wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

/// Template and special tokens belong to the tokenizer in the same folder.
#[test]
fn final_holds_exactly_the_tokenizer_files_used_in_training() {
    let workspace = Workspace::with_model(8, "max_steps = 1\nfrom_checkpoint = \"start\"\n");
    workspace.new_model("start", &["--seed", "3"]);
    workspace.write("model/special_tokens_map.json", r#"{"bos_token": "!"}"#);
    workspace.write("model/chat_template.jinja", "{{ messages[0].content }}");
    let template = "{% for m in messages %}{{ m.content }}|{% endfor %}";
    workspace.write("start/chat_template.jinja", template);
    workspace.train(1, "out", &[]);
    let saved = |name: &str| fs::read_to_string(workspace.path("out/final").join(name));
    assert_eq!(saved("chat_template.jinja").unwrap(), template);
    assert!(saved("special_tokens_map.json").is_err(), "of the other folder");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(saved(name).unwrap(), fs::read_to_string(workspace.path("start").join(name)).unwrap());
    }
}

/// An adapter's folder has no config.json, from which transformers would know that the tokenizer is Qwen2's.
#[test]
fn an_adapters_tokenizer_encodes_like_the_one_used_in_training() {
    let workspace = Workspace::with_model(8, "max_steps = 1\nlora = true\n");
    fs::remove_dir_all(workspace.path("model")).unwrap();
    workspace.new_model("model", &["--model-type", "qwen2"]);
    let config = workspace.path("model/tokenizer.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    (json["normalizer"], json["pre_tokenizer"]["pretokenizers"][0]) =
        (Value::Null, json!({"type": "Digits", "individual_digits": false}));
    fs::write(config, json.to_string()).unwrap();
    let output = workspace.launch(1, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("tokenizer.json: its normalizer is passed over"), "{}", text(&output));
    let (base, adapter) =
        (load(&workspace.path("model")).unwrap(), load(&workspace.path("out/final")).unwrap());
    let words = "In 1234 ways it's cafe\u{301}.\n\n What?";
    assert_eq!(adapter.encode(words).unwrap(), base.encode(words).unwrap());
}

/// Dyad knows or refuses every class that changes tokenizer.json. It ignores class names that transformers does not know.
#[test]
fn every_class_of_transformers_that_rebuilds_a_tokenizer_is_known_or_refused() {
    let workspace = Workspace::with_model(4, "");
    let classes = classes(&["classes"], &workspace);
    let config = workspace.path("model/tokenizer_config.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    let mut load_as = |name: &str| {
        json["tokenizer_class"] = json!(name);
        fs::write(&config, json.to_string()).unwrap();
        load(&workspace.path("model")).map(|_| ())
    };
    let known = [
        "CohereTokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "GemmaTokenizer",
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "Qwen3_5Tokenizer",
    ];
    for name in classes.lines() {
        let refused = load_as(name)
            .is_err_and(|error| error.contains(&format!("tokenizer_class {name} is not supported")));
        assert_eq!(refused, !known.contains(&name), "{name}");
    }
    assert!(classes.lines().count() > 90);
    for name in ["PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "NobodysTokenizer"] {
        assert_eq!(load_as(name), Ok(()), "{name}");
    }
}
