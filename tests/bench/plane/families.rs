//! Tokenizers of common model families, with vocabularies that this benchmark trains.

use std::path::{Path, PathBuf};

use dyad_data::new_model::{NewModelOptions, create};
use dyad_proto::pairs::forms;
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer};

const VOCABULARY: usize = 32_000;
/// Smaller and from fewer texts, because training a unigram vocabulary takes minutes where BPE takes seconds.
const UNIGRAM_VOCABULARY: u32 = 8_000;
const UNIGRAM_TEXTS: usize = 5_000;

/// Origin of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// `trainer new-model` with llama.
    Gpt2,
    /// `trainer new-model` with qwen2.
    Qwen2,
    SentencePiece,
    Unigram,
}

/// A tokenizer with its template.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    template: &'static str,
    base: Base,
    change: fn(&mut Value),
}

const CHATML: &str = include_str!("chatml.jinja");
const LLAMA2: &str = include_str!("llama2.jinja");

pub(crate) const FAMILIES: [Family; 11] = [
    Family { name: "GPT-2 split, ChatML", template: CHATML, base: Base::Gpt2, change: |_| {} },
    Family {
        name: "Qwen2 split, NFC, Qwen2.5 template",
        template: include_str!("qwen2.jinja"),
        base: Base::Qwen2,
        change: |_| {},
    },
    Family {
        name: "Llama 3 split and template",
        template: include_str!("llama3.jinja"),
        base: Base::Qwen2,
        change: llama3,
    },
    Family {
        name: "Llama 2, its template",
        template: LLAMA2,
        base: Base::SentencePiece,
        change: |json| json["normalizer"] = normalizers(&[prepend(), spaces()]),
    },
    Family {
        name: "Mistral (Metaspace, not split)",
        template: LLAMA2,
        base: Base::SentencePiece,
        change: |json| json["pre_tokenizer"] = metaspace("first", false),
    },
    Family { name: "Gemma", template: LLAMA2, base: Base::SentencePiece, change: gemma },
    Family {
        name: "Metaspace, split",
        template: LLAMA2,
        base: Base::SentencePiece,
        change: |json| json["pre_tokenizer"] = metaspace("always", true),
    },
    Family {
        name: "digits one by one (SmolLM)",
        template: CHATML,
        base: Base::Gpt2,
        change: |json| json["pre_tokenizer"] = sequence(&[digits(true), bytes(true)]),
    },
    Family { name: "digits cut after (Falcon)", template: CHATML, base: Base::Gpt2, change: falcon },
    Family {
        name: "four splits, normalized tokens (DeepSeek)",
        template: CHATML,
        base: Base::Gpt2,
        change: deepseek,
    },
    Family {
        name: "Unigram (XLM-R)",
        template: LLAMA2,
        base: Base::Unigram,
        change: |json| {
            json["pre_tokenizer"] =
                sequence(&[json!({ "type": "WhitespaceSplit" }), metaspace("always", true)])
        },
    },
];

fn metaspace(scheme: &str, split: bool) -> Value {
    json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split })
}

fn prepend() -> Value {
    json!({ "type": "Prepend", "prepend": "▁" })
}

fn spaces() -> Value {
    json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })
}

fn normalizers(parts: &[Value]) -> Value {
    json!({ "type": "Sequence", "normalizers": parts })
}

fn sequence(parts: &[Value]) -> Value {
    json!({ "type": "Sequence", "pretokenizers": parts })
}

fn digits(each: bool) -> Value {
    json!({ "type": "Digits", "individual_digits": each })
}

fn bytes(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn isolated(regex: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
}

/// Splits digits into groups of three, normalises nothing, and looks up whole words before it merges.
fn llama3(json: &mut Value) {
    json["normalizer"] = Value::Null;
    json["model"]["ignore_merges"] = true.into();
    let split = &mut json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
    *split = split.as_str().unwrap().replace(r"|\p{N}|", r"|\p{N}{1,3}|").into();
}

fn gemma(json: &mut Value) {
    json["normalizer"] = spaces();
    json["pre_tokenizer"] = json!({
        "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious", "invert": false,
    });
}

fn falcon(json: &mut Value) {
    let punctuation = json!({ "type": "Punctuation", "behavior": "Contiguous" });
    json["pre_tokenizer"] = sequence(&[bytes(true), punctuation, digits(false), isolated("[0-9][0-9][0-9]")]);
}

fn deepseek(json: &mut Value) {
    json["normalizer"] = normalizers(&[]);
    for token in json["added_tokens"].as_array_mut().unwrap() {
        token["normalized"] = true.into();
    }
    json["pre_tokenizer"] = sequence(&[
        isolated("[\r\n]"),
        isolated(r"\s?\p{L}+"),
        isolated(r"\s?\p{P}+"),
        digits(true),
        bytes(false),
    ]);
}

/// Creates a family's model folder and returns its path. A vocabulary that several families share is trained once.
pub(crate) fn folder(family: &Family, dir: &Path, texts: &Path) -> PathBuf {
    let base = dir.join(format!("{:?}", family.base));
    if !base.exists() {
        train(family.base, &base, texts);
    }
    let out = dir.join(family.name);
    std::fs::create_dir(&out).unwrap();
    for name in ["config.json", "tokenizer_config.json"] {
        std::fs::copy(base.join(name), out.join(name)).unwrap();
    }
    std::fs::write(out.join("chat_template.jinja"), family.template).unwrap();
    let mut json: Value =
        serde_json::from_slice(&std::fs::read(base.join("tokenizer.json")).unwrap()).unwrap();
    (family.change)(&mut json);
    std::fs::write(out.join("tokenizer.json"), json.to_string()).unwrap();
    out
}

fn train(base: Base, out: &Path, texts: &Path) {
    // If the vocabulary is trained below, this only writes the other files.
    let vocab_size = if matches!(base, Base::Gpt2 | Base::Qwen2) { VOCABULARY } else { 300 };
    let options = NewModelOptions {
        out: out.to_owned(),
        texts: texts.to_owned(),
        vocab_size,
        hidden_size: 4,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        intermediate_size: 4,
        max_positions: 4096,
        model_type: if base == Base::Qwen2 { "qwen2" } else { "llama" }.into(),
        seed: 0,
        overwrite: true,
    };
    create(&options).unwrap();
    let json = match base {
        Base::Gpt2 | Base::Qwen2 => return,
        Base::SentencePiece => sentencepiece(&contents(texts)),
        Base::Unigram => unigram(&contents(texts)[..UNIGRAM_TEXTS]),
    };
    std::fs::write(out.join("tokenizer.json"), json.to_string()).unwrap();
}

fn contents(texts: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(texts).unwrap();
    text.lines().flat_map(|line| forms::parse(line).unwrap().into_texts()).collect()
}

fn special(tokens: &[String]) -> Vec<AddedToken> {
    ["<unk>", "<s>", "</s>"]
        .into_iter()
        .chain(tokens.iter().map(String::as_str))
        .map(|token| AddedToken::from(token, true).normalized(false))
        .collect()
}

/// Trains on words. Returns the tokenizer without its pre-tokenizer, and with only its first three added tokens.
fn trained(mut tokenizer: Tokenizer, mut trainer: TrainerWrapper, texts: &[String]) -> Value {
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
    tokenizer.train(&mut trainer, texts.iter()).unwrap();
    let mut json: Value = serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap();
    json["added_tokens"].as_array_mut().unwrap().truncate(3);
    json["pre_tokenizer"] = Value::Null;
    json
}

fn sentencepiece(texts: &[String]) -> Value {
    let bytes: Vec<String> = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>")).collect();
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY)
        .special_tokens(special(&bytes))
        .show_progress(false)
        .build();
    let mut json = trained(Tokenizer::new(BPE::default()), trainer.into(), texts);
    for option in ["byte_fallback", "fuse_unk"] {
        json["model"][option] = true.into();
    }
    json["model"]["unk_token"] = "<unk>".into();
    json
}

fn unigram(texts: &[String]) -> Value {
    let trainer = UnigramTrainer::builder()
        .vocab_size(UNIGRAM_VOCABULARY)
        .special_tokens(special(&[]))
        .unk_token(Some("<unk>".into()))
        .show_progress(false)
        .build()
        .unwrap();
    trained(Tokenizer::new(Unigram::default()), trainer.into(), texts)
}
