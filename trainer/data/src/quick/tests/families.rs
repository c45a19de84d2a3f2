//! The quick encoder against the plain pipeline, for tokenizers of every family that it knows.

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer};

use super::super::joints::Joints;
use super::*;

const TEXTS: [&str; 6] = [
    "the weather is fine and the weather was fine, the cat sat on the mat",
    "there is 1 cat, there are 23 cats, there were 456 cats in 2024; don't they're it's",
    "naïve cafés of 東京 cost 5 €, naïve cafés of 東京都 cost 55 €",
    "fn main() {\n    let x = 1;\n\n    print(x);\n}\n    let y = 22;\n",
    "the the the cat cat cat (the cat) [the cat] -- the cat...",
    "Hello there. Hello there! Is it fine? It is fine.",
];

fn special(tokens: &[&str]) -> Vec<AddedToken> {
    tokens.iter().map(|token| AddedToken::from(*token, true)).collect()
}

fn to_json(tokenizer: &Tokenizer) -> Value {
    serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap()
}

/// A tokenizer as converted from SentencePiece: pieces with ▁, and 256 byte tokens. `across`: pieces may span several words.
fn sentencepiece(across: bool) -> Value {
    let bytes: Vec<String> = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>")).collect();
    let mut tokens = special(&["<unk>", "<s>", "</s>"]);
    tokens.extend(special(&bytes.iter().map(String::as_str).collect::<Vec<_>>()));
    let mut trainer: TrainerWrapper =
        BpeTrainerBuilder::new().vocab_size(460).special_tokens(tokens).show_progress(false).build().into();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, !across)));
    tokenizer.train(&mut trainer, TEXTS.iter()).unwrap();
    let mut json = to_json(&tokenizer);
    json["added_tokens"].as_array_mut().unwrap().truncate(3);
    for option in ["byte_fallback", "fuse_unk"] {
        json["model"][option] = true.into();
    }
    json["model"]["unk_token"] = "<unk>".into();
    json["pre_tokenizer"] = Value::Null;
    json
}

fn byte_level() -> Value {
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(400)
        .special_tokens(special(&["<unk>", "<s>", "</s>"]))
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.train(&mut trainer, TEXTS.iter()).unwrap();
    to_json(&tokenizer)
}

/// `None` if training fails: the crate's trainer iterates over hash maps, and some orders make it fail.
fn trained_unigram() -> Option<Tokenizer> {
    let mut trainer: TrainerWrapper = UnigramTrainer::builder()
        .vocab_size(150)
        .special_tokens(special(&["<unk>", "<s>", "</s>"]))
        .unk_token(Some("<unk>".into()))
        .show_progress(false)
        .build()
        .ok()?
        .into();
    let mut tokenizer = Tokenizer::new(Unigram::default());
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
    tokenizer.train(&mut trainer, TEXTS.iter()).ok()?;
    Some(tokenizer)
}

fn unigram(byte_fallback: bool) -> Value {
    let tokenizer = (0..10).find_map(|_| trained_unigram()).unwrap();
    let mut json = to_json(&tokenizer);
    json["model"]["byte_fallback"] = byte_fallback.into();
    if byte_fallback {
        let bytes = (0..=255).map(|byte: u8| json!([format!("<0x{byte:02X}>"), -20.0]));
        json["model"]["vocab"].as_array_mut().unwrap().extend(bytes);
    }
    json
}

fn metaspace(scheme: &str, split: bool) -> Value {
    json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split })
}

fn sequence(kind: &str, parts: Value) -> Value {
    json!({ "type": "Sequence", kind: parts })
}

fn split(pattern: Value, behavior: &str, invert: bool) -> Value {
    json!({ "type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert })
}

fn with(json: &Value, changes: &[(&str, Value)]) -> Value {
    let mut json = json.clone();
    for (at, value) in changes {
        *json.pointer_mut(at).unwrap() = value.clone();
    }
    json
}

fn sentencepiece_family() -> Vec<(String, Value)> {
    let (within, across) = (sentencepiece(false), sentencepiece(true));
    let prepend = json!({ "type": "Prepend", "prepend": "▁" });
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let llama2 = ("/normalizer", sequence("normalizers", json!([prepend, spaces])));
    let nfkc = ("/normalizer", json!({ "type": "NFKC" }));
    let mut family = Vec::new();
    for (name, base) in [("within", &within), ("across", &across)] {
        let mut add = |kind: &str, changes: &[(&str, Value)]| {
            family.push((format!("{name} words, {kind}"), with(base, changes)));
        };
        let plain = ("/model/byte_fallback", Value::Bool(false));
        add("Llama 2", std::slice::from_ref(&llama2));
        add("Llama 2 without bytes", &[llama2.clone(), plain.clone()]);
        add(
            "Llama 2 with each unknown by itself",
            &[llama2.clone(), plain, ("/model/fuse_unk", false.into())],
        );
        add("old Llama 2", &[llama2.clone(), ("/added_tokens/1/normalized", true.into())]);
        add("Mistral", &[("/pre_tokenizer", metaspace("first", false))]);
        add("first, composed", &[("/pre_tokenizer", metaspace("first", true)), nfkc.clone()]);
        add("always", &[("/pre_tokenizer", metaspace("always", true))]);
        add("never", &[("/pre_tokenizer", metaspace("never", true))]);
        let whole = ("/model/ignore_merges", Value::Bool(true));
        add("whole words first", &[("/pre_tokenizer", metaspace("always", true)), whole]);
        let gemma = split(json!({ "String": " " }), "MergedWithPrevious", false);
        add("Gemma", &[("/normalizer", spaces.clone()), ("/pre_tokenizer", gemma)]);
    }
    // Some byte tokens are missing: some unknown characters become bytes, others the unknown token.
    let (_, mut few) = family[0].clone();
    for byte in 0x80..0xC4_u8 {
        few["model"]["vocab"].as_object_mut().unwrap().remove(&format!("<0x{byte:02X}>"));
    }
    family.push(("Llama 2 with few bytes".into(), few));
    family
}

fn byte_family() -> Vec<(String, Value)> {
    let base = byte_level();
    let bytes = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let digits = |each: bool| json!({ "type": "Digits", "individual_digits": each });
    let isolated = |regex: &str| split(json!({ "Regex": regex }), "Isolated", false);
    let mut family = Vec::new();
    let mut add = |name: &str, parts: Value, changes: &[(&str, Value)]| {
        let parts = ("/pre_tokenizer", sequence("pretokenizers", parts));
        family.push((name.to_owned(), with(&with(&base, changes), &[parts])));
    };
    add("SmolLM", json!([digits(true), bytes(true)]), &[]);
    add("digits together", json!([digits(false), bytes(true)]), &[]);
    let punctuation = json!({ "type": "Punctuation", "behavior": "Contiguous" });
    add("Falcon's end", json!([bytes(true), punctuation, digits(false), isolated("[0-9][0-9][0-9]")]), &[]);
    let deepseek = json!([
        isolated("[\r\n]"),
        isolated("\\s?\\p{L}+"),
        isolated("\\s?\\p{P}+"),
        isolated("[一-龥ࠀ-一가-퟿]+"),
        digits(true),
        bytes(false),
    ]);
    let empty = ("/normalizer", sequence("normalizers", json!([])));
    add("DeepSeek", deepseek, &[empty, ("/added_tokens/1/normalized", true.into())]);
    for behavior in ["Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"] {
        for invert in [false, true] {
            let parts = json!([split(json!({ "Regex": "[a-e ]|\\d*" }), behavior, invert), bytes(true)]);
            add(&format!("{behavior}, inverted: {invert}"), parts, &[]);
        }
    }
    family
}

fn unigram_family() -> Vec<(String, Value)> {
    let words = sequence("pretokenizers", json!([{ "type": "WhitespaceSplit" }, metaspace("always", true)]));
    let nfkc = ("/normalizer", json!({ "type": "NFKC" }));
    let base = unigram(false);
    vec![
        ("T5".into(), with(&base, &[nfkc])),
        ("XLM-R".into(), with(&base, &[("/pre_tokenizer", words)])),
        ("unigram with bytes".into(), unigram(true)),
    ]
}

/// Words of the vocabularies, spaces at many positions, added tokens and parts of them, unknown characters.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => prop::sample::select(vec![
            "the", " the", " weather", "fine", " cat", "x", " ", "  ", "   ", "\n", "\n\n", "\t", "▁", "▁▁", "é", "ï", "e\u{301}", "東京",
            "都", "🙂", "ﬁ", "1", " 23", "456", "²", "½", ".", ",", "...", "!", " (", "'s", "\u{a0}", "\u{3000}", "\u{0}", "<0x0A>",
            "<0x", "<unk", "€", "ß", "ÿ", "\u{7f}", "\r\n",
        ]).prop_map(str::to_owned),
        2 => prop::sample::select(vec!["<s>", "</s>", "<unk>", "▁<s>", "<s", "s>", "</s", " <s> "]).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    proptest::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
}

#[test]
fn ids_equal_the_plain_pipeline_for_every_family() {
    let cases: Vec<(String, Tokenizer, QuickEncoder)> =
        [sentencepiece_family(), byte_family(), unigram_family()]
            .concat()
            .into_iter()
            .map(|(name, json)| {
                let plain: Tokenizer = json.to_string().parse().unwrap();
                let quick = QuickEncoder::of(&plain).unwrap_or_else(|| panic!("{name} is not quick"));
                (name, plain, quick)
            })
            .collect();
    proptest!(ProptestConfig::with_cases(400), |(start in text(), one in text(), other in text())| {
        for (name, plain, quick) in &cases {
            let one = quick.encode(plain, format!("{start}{one}"), None).unwrap();
            let expected = plain.encode_fast(one.text.as_str(), false).unwrap();
            prop_assert_eq!(&one.ids, expected.get_ids(), "{}: {:?}", name, one.text);
            let other = quick.encode(plain, format!("{start}{other}"), Some(&one)).unwrap();
            let expected = plain.encode_fast(other.text.as_str(), false).unwrap();
            prop_assert_eq!(&other.ids, expected.get_ids(), "{}: {:?} after {:?}", name, other.text, one.text);
        }
    });
}

fn joints(json: &Value) -> Option<Joints> {
    match json.to_string().parse::<Tokenizer>().unwrap().get_model() {
        ModelWrapper::BPE(bpe) => Joints::of(bpe),
        _ => None,
    }
}

fn words(json: &Value, text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut take = |word: &str| {
        words.push(word.to_owned());
        Ok(())
    };
    joints(json).unwrap().cut(text, &mut take).unwrap();
    words
}

#[test]
fn text_is_cut_before_spaces_unless_the_vocabulary_reaches_across_them() {
    let text = "▁the▁cat▁▁sat\n\n▁the";
    assert_eq!(words(&sentencepiece(false), text), ["▁the", "▁cat", "▁", "▁sat", "\n\n", "▁the"]);
    let across = words(&sentencepiece(true), text);
    assert!(across.iter().any(|word| word.contains("the▁cat")), "{across:?}");
}

#[test]
fn models_that_look_across_borders_have_no_joints() {
    let json = sentencepiece(false);
    let has = |changes: &[(&str, Value)]| joints(&with(&json, changes)).is_some();
    assert!(has(&[]));
    assert!(!has(&[("/model/ignore_merges", true.into())]));
    assert!(!has(&[("/model/end_of_word_suffix", "</w>".into())]));
    assert!(!has(&[("/model/byte_fallback", false.into()), ("/model/unk_token", Value::Null)]));
    // An entry with a byte token, one with the unknown token, and two entries with the same id.
    for token in ["<0x0A>a", "<unk>a"] {
        let mut json = json.clone();
        json["model"]["vocab"][token] = 5000.into();
        assert!(joints(&json).is_none(), "{token}");
    }
    let mut json = json.clone();
    json["model"]["vocab"]["zz"] = json["model"]["vocab"]["a"].clone();
    assert!(joints(&json).is_none());
}

#[test]
fn prepend_first_needs_a_known_start_of_the_text() {
    let json = with(&sentencepiece(false), &[("/pre_tokenizer", metaspace("first", true))]);
    let quick = |changes: &[(&str, Value)]| {
        QuickEncoder::of(&with(&json, changes).to_string().parse().unwrap()).is_some()
    };
    assert!(quick(&[]));
    assert!(!quick(&[("/normalizer", json!({ "type": "Strip", "strip_left": true, "strip_right": false }))]));
    let after = sequence("pretokenizers", json!([{ "type": "WhitespaceSplit" }, metaspace("first", true)]));
    assert!(!quick(&[("/pre_tokenizer", after)]));
}
