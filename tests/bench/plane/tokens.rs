//! Tokens per second of one core, from a line of JSON to the ids of a pair, for the tokenizers and templates in use.

use std::path::{Path, PathBuf};
use std::time::Instant;

use dyad_data::new_model::{NewModelOptions, create};
use dyad_data::tokenize::{Rule, tokenize};
use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::preference::PreferencePair;

use crate::text::Writer;
use crate::usage::cpu_seconds;

const RULE: Rule = Rule { max_len: 4096, preferred_only: false };
const VOCABULARY: usize = 32_000;

/// A tokenizer with the template that goes with it.
struct Family {
    name: &'static str,
    template: &'static str,
    /// As `trainer new-model` knows it.
    model_type: &'static str,
}

const FAMILIES: [Family; 3] = [
    Family { name: "GPT-2 split, ChatML", template: include_str!("chatml.jinja"), model_type: "llama" },
    Family {
        name: "Qwen2 split, NFC, Qwen2.5 template",
        template: include_str!("qwen2.jinja"),
        model_type: "qwen2",
    },
    Family {
        name: "Llama 3 split and template",
        template: include_str!("llama3.jinja"),
        model_type: "qwen2",
    },
];

/// One row a tokenizer: its name and million tokens per second of processor time.
pub(crate) fn measure(dir: &Path, seconds: f64) -> Vec<(String, String)> {
    let mut writer = Writer::new(3);
    let texts = dir.join("texts.jsonl");
    let lines: Vec<String> = (0..20_000).map(|_| writer.pair()).collect();
    std::fs::write(&texts, lines.join("\n")).unwrap();
    // What is measured is not what the tokenizer was trained on.
    let lines: Vec<String> = (0..4_000).map(|_| writer.pair()).collect();
    FAMILIES
        .iter()
        .map(|family| (family.name.to_owned(), one(family, dir, &texts, &lines, seconds)))
        .collect()
}

fn one(family: &Family, dir: &Path, texts: &Path, lines: &[String], seconds: f64) -> String {
    let tokenizer = ChatTokenizer::load(&folder(family, dir, texts)).unwrap();
    let stat = Path::new("/proc/thread-self/stat");
    let (start, before) = (Instant::now(), cpu_seconds(stat));
    let (mut tokens, mut pairs) = (0, 0);
    for line in lines.iter().cycle() {
        let pair = PreferencePair::parse(line).unwrap();
        let (_, pair) = tokenize(&tokenizer, &pair, RULE).unwrap();
        tokens += pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
        pairs += 1;
        if pairs % 64 == 0 && start.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    let rate = tokens as f64 / (cpu_seconds(stat) - before) / 1e6;
    format!("{rate:.2} M tokens/s/core ({} tokens a pair)", tokens / pairs)
}

fn folder(family: &Family, dir: &Path, texts: &Path) -> PathBuf {
    let out = dir.join(family.name);
    create(&NewModelOptions {
        out: out.clone(),
        texts: texts.to_owned(),
        vocab_size: VOCABULARY,
        hidden_size: 4,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        intermediate_size: 4,
        max_positions: RULE.max_len,
        model_type: family.model_type.into(),
        seed: 0,
        overwrite: true,
    })
    .unwrap();
    std::fs::write(out.join("chat_template.jinja"), family.template).unwrap();
    if family.name.starts_with("Llama 3") {
        as_llama3(&out.join("tokenizer.json"));
    }
    out
}

/// Llama 3 takes digits by threes, normalises nothing, and looks whole words up before it merges.
fn as_llama3(path: &Path) {
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json["normalizer"] = serde_json::Value::Null;
    json["model"]["ignore_merges"] = true.into();
    let split = &mut json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
    *split = split.as_str().unwrap().replace(r"|\p{N}|", r"|\p{N}{1,3}|").into();
    std::fs::write(path, json.to_string()).unwrap();
}
