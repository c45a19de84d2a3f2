//! Tokens per second of one core, from a line of JSON to the ids of a pair, for common tokenizers and templates.

use std::path::Path;
use std::time::Instant;

use dyad_data::tokenize::tokenize;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::Rule;
use dyad_proto::pairs::forms;

use crate::families::{FAMILIES, folder};
use crate::text::Writer;
use crate::usage::cpu_seconds;

const RULE: Rule = Rule {
    max_len: 4096,
    preferred_only: false,
    embedding_rows: u32::MAX,
    train_on_inputs: false,
    assistant_only: true,
};

/// Calls `tell` with each tokenizer's name and million tokens per second of processor time as soon as it is measured.
pub(crate) fn measure(dir: &Path, seconds: f64, tell: &dyn Fn(&str, &str)) {
    let mut writer = Writer::new(3);
    let texts = dir.join("texts.jsonl");
    let lines: Vec<String> = (0..20_000).map(|_| writer.pair()).collect();
    std::fs::write(&texts, lines.join("\n")).unwrap();
    // Measure on other texts than the tokenizer was trained on.
    let lines: Vec<String> = (0..4_000).map(|_| writer.pair()).collect();
    for family in &FAMILIES {
        tell(family.name, &one(&folder(family, dir, &texts), &lines, seconds));
    }
}

fn one(folder: &Path, lines: &[String], seconds: f64) -> String {
    let tokenizer = ChatTokenizer::load(folder, folder, chrono::NaiveDateTime::default()).unwrap();
    let stat = Path::new("/proc/thread-self/stat");
    let (start, before) = (Instant::now(), cpu_seconds(stat));
    let (mut tokens, mut pairs) = (0, 0);
    for line in lines.iter().cycle() {
        let pair = forms::parse(line).unwrap();
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
