//! Chat templates and tokenizers that models ship: Dyad writes the text of transformers, marks the same parts of it, gives the same ids, or
//! fails where transformers fails.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;

use dyad_data::rendered::{Chat, Rendered};
use dyad_data::tokenize::tokenize;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::Rule;
use dyad_proto::pairs::{Content, Example, Json, Message, MessageContent};
use dyad_tests::python::python;
use dyad_tests::{Workspace, root};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A conversation of `tests/parity/chats.py`.
#[derive(Debug, Deserialize)]
struct Conversation {
    name: String,
    messages: Vec<Value>,
    tools: Option<Value>,
    documents: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

impl Conversation {
    fn chat(&self, add_generation_prompt: bool) -> Chat<'_> {
        Chat {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            documents: self.documents.as_ref(),
            variables: self.chat_template_kwargs.as_ref(),
            add_generation_prompt,
        }
    }
}

impl Conversation {
    /// The pair whose preferred answer is the last message, if a record can hold everything of this conversation. Its other answer has
    /// this text.
    fn pair(&self, text: &str) -> Option<Example> {
        // TRL gives these to the template as the file has them. Records give arguments of calls as objects, text parts joined to templates
        // that cannot take them, and no empty list of calls.
        let otherwise = |message: &Value| {
            message.to_string().contains(r#""arguments":"{"#)
                || message["content"].is_array()
                || message["tool_calls"].as_array().is_some_and(Vec::is_empty)
        };
        if self.documents.is_some() || self.messages.iter().any(otherwise) {
            return None;
        }
        let message = |message: &Value| serde_json::from_value::<Message>(message.clone()).ok();
        let mut prompt = self.messages.iter().map(message).collect::<Option<Vec<_>>>()?;
        let chosen = prompt.pop()?;
        let rejected = Message { content: Some(MessageContent::Text(text.to_owned())), ..chosen.clone() };
        Some(Example::new(Content::Conversation(dyad_proto::pairs::Conversation {
            prompt,
            chosen: vec![chosen],
            rejected: vec![rejected],
            tools: self.tools.as_ref().map(Json::of),
            chat_template_kwargs: self.chat_template_kwargs.clone().map(|kwargs| Json::of(&kwargs.into())),
        })))
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Expected {
    /// The text, and the ranges of its generation blocks in characters.
    Text {
        text: String,
        generated: Vec<(usize, usize)>,
    },
    Error {
        error: String,
        raised: bool,
    },
}

#[derive(Debug, Deserialize)]
struct Corpus {
    chats: Vec<Conversation>,
    templates: BTreeMap<String, String>,
    texts: BTreeMap<String, Vec<Expected>>,
}

/// Runs a command of `tests/parity/real_tokenizers.py`, which writes `out`.
fn transformers(workspace: &Workspace, args: &[&str], out: &str) -> String {
    python("real_tokenizers.py", &[args, &[out]].concat(), workspace);
    fs::read_to_string(workspace.path(out)).unwrap()
}

/// Compares one conversation; returns what differs.
fn difference(tokenizer: &ChatTokenizer, chat: &Chat<'_>, expected: &Expected) -> Option<String> {
    let ours = tokenizer.render_marked(chat).map_err(|fault| fault.to_string());
    match (expected, ours) {
        (Expected::Text { text, generated }, Ok(ours)) => {
            let in_characters = |at: usize| ours.text[..at].chars().count();
            let ranges: Vec<_> =
                ours.generated.iter().map(|one| (in_characters(one.start), in_characters(one.end))).collect();
            (*text != ours.text || *generated != ranges)
                .then(|| format!("right {text:?} {generated:?}\n  here  {:?} {ranges:?}", ours.text))
        }
        (Expected::Error { error, raised }, Err(ours)) => {
            let first = error.lines().next().unwrap_or_default();
            let same = if *raised { ours.contains(first) } else { !ours.contains("not supported") };
            (!same).then(|| format!("right error {error:?}\n  here  error {ours:?}"))
        }
        (expected, ours) => Some(format!("right {expected:?}\n  here  {ours:?}")),
    }
}

#[test]
fn every_template_of_trl_renders_every_conversation_as_in_transformers() {
    let workspace = Workspace::empty();
    let corpus: Corpus =
        serde_json::from_str(&transformers(&workspace, &["templates"], "texts.json")).unwrap();
    let write = |name: &str, text: &str| fs::write(workspace.path(name), text).unwrap();
    let model =
        json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}});
    write("tokenizer.json", &model.to_string());
    write("tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": "</s>"}"#);
    let folder = workspace.path(".");
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for (name, source) in &corpus.templates {
        write("chat_template.jinja", source);
        let tokenizer = match ChatTokenizer::load(&folder, &folder, "2026-03-07T21:05:09".parse().unwrap()) {
            Ok(tokenizer) => tokenizer,
            Err(fault) => {
                wrong.push(format!("{name}: {fault}"));
                continue;
            }
        };
        let both = corpus.chats.iter().flat_map(|chat| [(chat, true), (chat, false)]);
        for ((chat, prompt), expected) in both.zip(&corpus.texts[name]) {
            compared += 1;
            if let Some(difference) = difference(&tokenizer, &chat.chat(prompt), expected) {
                wrong.push(format!("{name}, {} ({prompt}):\n  {difference}", chat.name));
            }
        }
    }
    assert!(compared > 10_000, "{compared}");
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// One of the tokenizers that `tests/tokenizers/install.sh` installs.
#[derive(Debug, Deserialize)]
struct RealTokenizer {
    chats: Vec<Conversation>,
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
    plain: Vec<Vec<u32>>,
    templates: BTreeMap<String, OfTemplate>,
}

/// Results per conversation; `None` where transformers fails.
#[derive(Debug, Deserialize)]
struct OfTemplate {
    source: String,
    ids: Vec<Option<Vec<u32>>>,
    masks: Vec<Option<Vec<u8>>>,
    pairs: Vec<Option<Split>>,
}

/// A pair as TRL splits it.
#[derive(Debug, Deserialize, PartialEq)]
struct Split {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

/// What differs between two lists of ids: their first differing place.
fn ids_differ(what: &str, right: &[u32], ours: &[u32]) -> Option<String> {
    let at = right.iter().zip(ours).take_while(|(a, b)| a == b).count();
    let near = |ids: &[u32]| ids[at.min(ids.len())..(at + 8).min(ids.len())].to_vec();
    (right != ours).then(|| format!("{what}: at {at} right {:?}, here {:?}", near(right), near(ours)))
}

fn check_tokenizer(name: &str, templates: &[&str]) {
    let installed = root().join(".tools/tokenizers").join(name);
    assert!(installed.is_dir(), "no tokenizers of models; run `make test`");
    let workspace = Workspace::empty();
    let args: Vec<&str> =
        ["tokens", installed.to_str().unwrap()].into_iter().chain(templates.iter().copied()).collect();
    let right: RealTokenizer = serde_json::from_str(&transformers(&workspace, &args, "tokens.json")).unwrap();
    let folder = workspace.path(name);
    fs::create_dir(&folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(installed.join(file), folder.join(file)).unwrap();
    }
    let mut wrong = Vec::new();
    for (at, (template, of)) in right.templates.iter().enumerate() {
        fs::write(folder.join("chat_template.jinja"), &of.source).unwrap();
        let tokenizer =
            ChatTokenizer::load(&folder, &folder, "2026-03-07T21:05:09".parse().unwrap()).unwrap();
        if at == 0 {
            assert!(tokenizer.is_quick(), "{name} has no quick encoder");
            wrong.extend(texts_differ(&tokenizer, &right));
        }
        wrong.extend(
            chats_differ(&tokenizer, &right.chats, of).into_iter().map(|what| format!("{template}, {what}")),
        );
    }
    assert!(wrong.is_empty(), "{} results differ:\n{}", wrong.len(), wrong.join("\n"));
}

fn texts_differ(tokenizer: &ChatTokenizer, right: &RealTokenizer) -> Vec<String> {
    let mut wrong = Vec::new();
    for (text, (ids, plain)) in right.texts.iter().zip(right.ids.iter().zip(&right.plain)) {
        let what = |way: &str| format!("{way} of {text:?}");
        wrong.extend(ids_differ(&what("quick ids"), ids, &tokenizer.encode(text).unwrap()));
        wrong.extend(ids_differ(&what("plain ids"), plain, &tokenizer.encode_plain(text).unwrap()));
        let marked =
            tokenizer.encode_marked(&Rendered { text: text.clone(), generated: Vec::new() }).unwrap();
        wrong.extend(ids_differ(&what("slow ids"), ids, &marked.ids));
    }
    wrong
}

fn chats_differ(tokenizer: &ChatTokenizer, chats: &[Conversation], right: &OfTemplate) -> Vec<String> {
    let mut wrong = Vec::new();
    let both = chats.iter().flat_map(|chat| [(chat, true), (chat, false)]);
    for ((chat, prompt), ids) in both.zip(&right.ids) {
        let ours = tokenizer.render_chat(&chat.chat(prompt)).map(|text| tokenizer.encode(&text).unwrap());
        match (ids, ours) {
            (Some(right), Ok(ours)) => wrong.extend(ids_differ(&chat.name, right, &ours)),
            (None, Err(_)) => {}
            (right, ours) => wrong.push(format!("{}: right {right:?}, here {ours:?}", chat.name)),
        }
    }
    for (chat, mask) in chats.iter().zip(&right.masks) {
        let ours = tokenizer.render_marked(&chat.chat(false)).and_then(|one| tokenizer.encode_marked(&one));
        if let (Some(right), Ok(ours)) = (mask, ours) {
            let ours: Vec<u8> = ours.generated.into_iter().map(u8::from).collect();
            if *right != ours {
                wrong.push(format!("mask of {}: right {right:?}, here {ours:?}", chat.name));
            }
        }
    }
    wrong.extend(pairs_differ(tokenizer, chats, &right.pairs));
    wrong
}

/// Compares pairs: the last message of a conversation is the preferred answer.
fn pairs_differ(tokenizer: &ChatTokenizer, chats: &[Conversation], right: &[Option<Split>]) -> Vec<String> {
    let rule = Rule {
        max_len: usize::MAX,
        preferred_only: false,
        embedding_rows: u32::MAX,
        train_on_inputs: false,
        assistant_only: true,
    };
    let (mut wrong, mut compared) = (Vec::new(), 0);
    for (chat, right) in chats.iter().zip(right) {
        let Some((pair, right)) = chat.pair("No idea, sorry.").zip(right.as_ref()) else { continue };
        let (_, made) = tokenize(tokenizer, &pair, rule).unwrap();
        let made = Split { prompt: made.prompt, chosen: made.chosen, rejected: made.rejected };
        compared += 1;
        if made != *right {
            wrong.push(format!("pair of {}: right {right:?}, here {made:?}", chat.name));
        }
    }
    assert!(compared > 15, "only {compared} pairs");
    wrong
}

#[test]
fn llama2_gives_the_ids_of_transformers() {
    check_tokenizer(
        "llama2",
        &[root().join("tests/bench/plane/llama2.jinja").to_str().unwrap(), "phi3_training"],
    );
}

#[test]
fn llama3_1_gives_the_ids_of_transformers() {
    check_tokenizer("llama3_1", &["own", "llama3_1", "llama3_training"]);
}

#[test]
fn qwen3_gives_the_ids_of_transformers() {
    check_tokenizer("qwen3", &["own", "qwen3_training", "qwen2_5_training"]);
}

#[test]
fn gemma3_gives_the_ids_of_transformers() {
    check_tokenizer("gemma3", &["own", "gemma3_training"]);
}

#[test]
fn gpt_oss_gives_the_ids_of_transformers() {
    check_tokenizer("gptoss", &["gptoss", "gptoss_training"]);
}

#[test]
fn deepseek_v3_gives_the_ids_of_transformers() {
    check_tokenizer("deepseek_v3", &["own", "deepseekv3_training"]);
}
