//! The records in `tests/forms` give the token ids and masks of TRL's own trainers, with the templates that TRL ships.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use dyad_data::tokenize::tokenize;
use dyad_data::tokenized::Tokenized;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::Rule;
use dyad_proto::Fault;
use dyad_proto::pairs::{Example, forms};
use dyad_tests::python::python;
use dyad_tests::{Workspace, root};
use serde_json::Value;

/// By template and file: what TRL makes of each record.
type Expected = BTreeMap<String, BTreeMap<String, Vec<Value>>>;

fn records(file: &str) -> Vec<Example> {
    let path = root().join("tests/forms").join(file).with_extension("jsonl");
    fs::read_to_string(path).unwrap().lines().map(|line| forms::parse(line).unwrap()).collect()
}

fn expected(workspace: &Workspace) -> Expected {
    python("forms.py", &["."], workspace);
    serde_json::from_str(&fs::read_to_string(workspace.path("forms.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// As TRL's SFT trainer has it: all ids, and which of them have a label.
fn whole(found: &Tokenized) -> (Vec<u32>, Vec<bool>) {
    let mut trained = vec![false; found.prompt.len() + found.chosen.len()];
    for at in found.chosen_untrained.trained(found.chosen.len()) {
        trained[found.prompt.len() + at] = true;
    }
    ([&found.prompt[..], &found.chosen[..]].concat(), trained)
}

/// Compares one record; `None` if TRL has no answer.
fn differs(right: &Value, found: Result<Tokenized, Fault>) -> Option<String> {
    let found = match (right.is_null(), found) {
        (true, Err(_)) => return None,
        (true, Ok(_)) => return Some("TRL fails, Dyad does not".into()),
        // Dyad refuses what it cannot know; this test does not know it either.
        (false, Err(fault))
            if right.get("ids").is_some()
                && right["trained"].is_null()
                && fault.message.contains("cannot be found") =>
        {
            return None;
        }
        (false, Err(fault)) => return Some(fault.to_string()),
        (false, Ok(found)) => found,
    };
    let same = match right.get("ids") {
        Some(all) => {
            let (own, trained) = whole(&found);
            let mut wanted: Option<Vec<bool>> = serde_json::from_value(right["trained"].clone()).unwrap();
            // Nothing predicts the first token.
            wanted.iter_mut().for_each(|wanted| wanted[0] = false);
            ids(all) == own && wanted.is_none_or(|wanted| wanted == trained)
        }
        None => {
            let completion = right.get("completion").or(right.get("chosen")).unwrap();
            let rejected = right.get("rejected").map_or_else(Vec::new, ids);
            (ids(&right["prompt"]), ids(completion), rejected)
                == (found.prompt.clone(), found.chosen.clone(), found.rejected.clone())
        }
    };
    (!same).then(|| format!("right {right}\nhere  {found:?}"))
}

#[test]
fn every_form_gives_the_tokens_and_masks_of_trl() {
    let workspace = Workspace::empty();
    let expected = expected(&workspace);
    let (mut compared, mut masked, mut wrong) = (0, 0, Vec::new());
    for (template, files) in &expected {
        let folder: PathBuf = workspace.path(template);
        let tokenizer = ChatTokenizer::load(&folder, &folder, chrono::NaiveDateTime::default()).unwrap();
        for (file, rights) in files {
            // TRL trains all tokens of an output, and knows no weights.
            let rule = Rule {
                max_len: 1 << 20,
                preferred_only: !rights.iter().any(|right| right.get("rejected").is_some()),
                embedding_rows: u32::MAX,
                train_on_inputs: false,
                assistant_only: file.starts_with("messages"),
            };
            for (at, (right, example)) in rights.iter().zip(records(file)).enumerate() {
                let weight = 1.0;
                let found = tokenize(&tokenizer, &Example { weight, ..example }, rule);
                compared += usize::from(!right.is_null());
                masked += usize::from(right["trained"].is_array());
                if let Some(difference) = differs(right, found.map(|(_, tokens)| tokens)) {
                    wrong.push(format!("{template} {file} {}: {difference}", at + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared > 450 && masked > 100, "{compared} and {masked} records compared");
}
