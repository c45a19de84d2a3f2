//! Compares the quick encoder with the plain pipeline, and tokenised pairs with a plain version of TRL's rule.

use std::path::Path;

use dyad_proto::pairs::{Content, Conversation, Example, Message, Role};
use proptest::prelude::*;
use serde_json::json;
use tokenizers::Tokenizer;

use super::words::WORDS;
use super::*;
use crate::new_model::{NewModelOptions, create};
use crate::tokenize::tokenize;
use crate::tokenizer::ChatTokenizer;
use crate::truncation::Rule;

const LINE: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi there, how's the weather in 2024? It's fine, it's fine."}]},"preferred_output":[{"role":"assistant","content":"Hello there, the weather is fine!"}],"non_preferred_output":[{"role":"assistant","content":"No, it isn't 1234."}]}"#;

const TEMPLATES: [&str; 5] = [
    // ChatML.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    // Trims the content, and starts with a token of the configuration.
    "{{ eos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>\n\n{{ m['content'] | trim }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}",
    // No added token at all.
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    // The prompt alone starts and ends differently from the prompt in a full text.
    "{% if messages[-1].role == 'assistant' %}<|im_start|>{% endif %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %} <think>{% endif %}",
    // Iterates over the keys of a message.
    "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }}<|im_end|>{% endfor %}{{ m | tojson }}{% endfor %}",
];

/// Text that mixes words, spaces, special tokens and parts of them.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => prop::sample::select(vec![
            "Hello", " there", "'s", "'LL", "don't", " the", " weather", "x", "É", "e\u{301}", "東京", "🙂", "ﬁ",
            "1", "23456", " 7", "\u{a0}", "  ", " ", "\t", "\n", "\r\n", "\n\n ", "!", "...", " (", "_", "²", "\u{0}",
        ]).prop_map(str::to_owned),
        2 => prop::sample::select(vec![
            "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "<|", "end|>", "<|im_end|", "|>", "assistant\n",
        ]).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

fn pair() -> impl Strategy<Value = Conversation> {
    let role = prop::sample::select(vec![Role::System, Role::User, Role::Tool, Role::Assistant]);
    let turns = proptest::collection::vec((role, text()), 1..4);
    let answer = |content: String| vec![Message::new(Role::Assistant, content)];
    (turns, text(), text(), text()).prop_map(move |(turns, start, chosen, rejected)| Conversation {
        prompt: turns.into_iter().map(|(role, content)| Message::new(role, content)).collect(),
        chosen: answer(format!("{start}{chosen}")),
        rejected: answer(format!("{start}{rejected}")),
        ..Conversation::default()
    })
}

/// Model folders of the families; the last splits digits in groups of three, has no normaliser and has overlapping added tokens.
fn folders(dir: &Path) -> Vec<std::path::PathBuf> {
    let texts = dir.join("pairs.jsonl");
    std::fs::write(&texts, LINE).unwrap();
    let folder = |(name, model_type): (&str, &str)| {
        let out = dir.join(name);
        let options = NewModelOptions {
            out: out.clone(),
            texts: texts.clone(),
            vocab_size: 340,
            hidden_size: 4,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            intermediate_size: 4,
            max_positions: 64,
            model_type: model_type.into(),
            seed: 1,
            overwrite: false,
        };
        create(&options).unwrap();
        out
    };
    let folders: Vec<_> = [("gpt2", "llama"), ("qwen2", "qwen2"), ("llama3", "qwen2")].map(folder).into();
    let path = folders[2].join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["normalizer"] = serde_json::Value::Null;
    json["model"]["ignore_merges"] = true.into();
    let split = &mut json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
    *split = split.as_str().unwrap().replace(r"|\p{N}|", r"|\p{N}{1,3}|").into();
    let mut longer = json["added_tokens"][2].clone();
    (longer["id"], longer["content"]) = (1000.into(), "<|im_end|>\n\n".into());
    json["added_tokens"].as_array_mut().unwrap().push(longer);
    std::fs::write(&path, json.to_string()).unwrap();
    // As a qwen2 folder it would get the class's own split instead of this one.
    std::fs::write(folders[2].join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    folders
}

/// TRL's rule without reuse; `rendering` only renders the texts.
fn by_the_rule(tokenizer: &Tokenizer, rendering: &ChatTokenizer, pair: &Conversation) -> [Vec<u32>; 3] {
    let encode = |answer: Option<&[Message]>| {
        let text = match answer {
            None => rendering.render_prompt(pair),
            Some(answer) => rendering.render(&[&pair.prompt, answer].concat(), false),
        };
        tokenizer.encode(text.unwrap(), false).unwrap().get_ids().to_vec()
    };
    let (prompt, chosen, rejected) = (encode(None), encode(Some(&pair.chosen)), encode(Some(&pair.rejected)));
    let common = |full: &[u32]| prompt.iter().zip(full).take_while(|(a, b)| a == b).count();
    let shared = common(&chosen).min(common(&rejected));
    [prompt[..shared].to_vec(), chosen[shared..].to_vec(), rejected[shared..].to_vec()]
}

#[test]
fn pairs_follow_trls_rule_for_every_family_and_template() {
    let dir = tempfile::tempdir().unwrap();
    let cases: Vec<_> = folders(dir.path())
        .into_iter()
        .flat_map(|folder| TEMPLATES.map(|template| (folder.clone(), template)))
        .map(|(folder, source)| {
            std::fs::write(folder.join("chat_template.jinja"), source).unwrap();
            let plain = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
            assert!(QuickEncoder::of(&plain).is_some(), "{} is not quick", folder.display());
            (ChatTokenizer::load(&folder, &folder, chrono::NaiveDateTime::default()).unwrap(), plain)
        })
        .collect();
    let rule = Rule {
        max_len: 1 << 20,
        preferred_only: false,
        embedding_rows: u32::MAX,
        train_on_inputs: false,
        assistant_only: true,
    };
    proptest!(ProptestConfig::with_cases(300), |(pair in pair())| {
        for (quick, plain) in &cases {
            let [prompt, chosen, rejected] = by_the_rule(plain, quick, &pair);
            let (_, found) = tokenize(quick, &Example::new(Content::Conversation(pair.clone())), rule).unwrap();
            prop_assert_eq!((found.prompt, found.chosen, found.rejected), (prompt, chosen, rejected));
        }
    });
}

#[test]
fn a_full_word_cache_is_cleared() {
    let mut words = Words::default();
    for at in 0..WORDS as u32 + 10 {
        let mut ids = Vec::new();
        words.append(&at.to_string(), &mut ids, || Ok(vec![at])).unwrap();
        assert_eq!(ids, [at]);
    }
    assert_eq!(words.places.len(), 10);
}

#[test]
fn tokenizers_with_unknown_parts_get_no_quick_encoder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = folders(dir.path()).swap_remove(1);
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let quick = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = json.clone();
        change(&mut json);
        QuickEncoder::of(&json.to_string().parse().unwrap()).is_some()
    };
    assert!(quick(&|_| {}));
    assert!(!quick(&|json| json["added_tokens"][1]["lstrip"] = true.into()));
    assert!(!quick(&|json| json["added_tokens"][1]["single_word"] = true.into()));
    assert!(!quick(&|json| json["model"]["dropout"] = 0.1.into()));
    assert!(
        !quick(&|json| json["pre_tokenizer"]["pretokenizers"][0] = json!({ "type": "BertPreTokenizer" }))
    );
    assert!(!quick(&|json| json["pre_tokenizer"]["pretokenizers"][0]["pattern"] = json!({ "String": "a" })));
    assert!(!quick(&|json| json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into()));
    assert!(!quick(&|json| json["pre_tokenizer"] = serde_json::Value::Null));
}

mod families;
