//! Compares the template engine with transformers on a corpus; `tests/parity/templates.py` writes the expected texts.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use dyad_data::rendered::Chat;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::pairs::{Message, Role};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates")
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_str(&std::fs::read_to_string(corpus().join(name)).unwrap()).unwrap()
}

/// A tokenizer with an empty vocabulary and the special tokens of the corpus.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, json: serde_json::Value| {
        std::fs::write(dir.path().join(name), json.to_string()).unwrap()
    };
    write(
        "tokenizer.json",
        serde_json::json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}),
    );
    write(
        "tokenizer_config.json",
        serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {"image_token": "<img>"}}),
    );
    dir
}

fn now() -> chrono::NaiveDateTime {
    "2026-03-07T21:05:09".parse().unwrap()
}

/// Renders each conversation, with and without the generation prompt.
fn rendered(dir: &Path, template: &str, conversations: &[Vec<Message>]) -> Vec<Result<String, String>> {
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
    let tokenizer = ChatTokenizer::load(dir, dir, now());
    let render = |messages: &Vec<Message>, prompt| match &tokenizer {
        Ok(tokenizer) => tokenizer.render(messages, prompt).map_err(|fault| fault.message),
        Err(fault) => Err(fault.message.clone()),
    };
    conversations.iter().flat_map(|messages| [render(messages, true), render(messages, false)]).collect()
}

/// Every template gives the same text as in transformers, fails if it fails there, or is refused with an error that names the
/// unsupported construct. `refused.json` lists the refused templates, so that a new one is noticed.
#[test]
fn templates_render_as_in_transformers_or_are_refused_by_name() {
    let dir = folder();
    let expected: BTreeMap<String, Vec<Option<String>>> = read("expected.json");
    let conversations: Vec<Vec<Message>> = read("conversations.json");
    let (mut wrong, mut refused) = (Vec::new(), BTreeSet::new());
    for (template, texts) in &expected {
        for (text, ours) in texts.iter().zip(rendered(dir.path(), template, &conversations)) {
            match (text, ours) {
                (Some(text), Ok(ours)) if *text == ours => {}
                (None, Err(message)) if !message.contains("not supported") => {}
                (Some(_), Err(message)) if message.contains("not supported") && message.contains("line ") => {
                    refused.insert(template.clone());
                }
                (None, Err(message)) if message.contains("line ") => {}
                (text, ours) => wrong.push(format!("{template}\n  right {text:?}\n  here  {ours:?}")),
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), expected.len(), wrong.join("\n"));
    assert_eq!(refused, read("refused.json"));
}

fn with_template(dir: &Path, template: &str) -> ChatTokenizer {
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
    ChatTokenizer::load(dir, dir, now()).unwrap()
}

#[test]
fn generation_blocks_give_their_ranges() {
    let dir = folder();
    let template = "{% for m in messages %}é{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}";
    let tokenizer = with_template(dir.path(), template);
    let messages = [
        serde_json::json!({"role": "user", "content": "x"}),
        serde_json::json!({"role": "assistant", "content": "yes 🙂"}),
        serde_json::json!({"role": "assistant", "content": ""}),
    ];
    let rendered = tokenizer.render_marked(&Chat::of(&messages)).unwrap();
    assert_eq!(rendered.text, "ééyes 🙂é");
    assert_eq!(rendered.generated, [4..12, 14..14]);
    assert!(tokenizer.marks_generation(false));
    assert!(!with_template(dir.path(), "{{ messages }}").marks_generation(false));
}

/// transformers counts from the text that has left all macros, so it marks another part.
#[test]
fn a_generation_block_without_a_known_place_is_refused_only_if_its_range_is_asked_for() {
    let dir = folder();
    let messages = [serde_json::json!({"role": "user", "content": "x"})];
    let block = "{% generation %}a{% endgeneration %}";
    for around in [
        format!("{{% macro f() %}}-{block}{{% endmacro %}}{{{{ f() }}}}"),
        format!("{{% set s %}}-{block}{{% endset %}}{{{{ s }}}}"),
        format!("{{% filter trim %}}-{block}{{% endfilter %}}"),
        format!("{{% for m in messages recursive %}}-{block}{{% endfor %}}"),
        format!("{{% generation %}}-{block}{{% endgeneration %}}"),
    ] {
        let tokenizer = with_template(dir.path(), &around);
        assert_eq!(tokenizer.render_chat(&Chat::of(&messages)).unwrap(), "-a", "{around}");
        let refusal = tokenizer.render_marked(&Chat::of(&messages)).unwrap_err().message;
        assert!(refusal.contains("line 1: the place of a generation block"), "{refusal}");
    }
}

#[test]
fn a_conversation_for_a_template_has_the_fields_that_transformers_gives() {
    let dir = folder();
    let tokenizer = with_template(dir.path(), "{{ messages }}|{{ tools }}|{{ own }}|{{ bos_token }}");
    let messages = [serde_json::json!({"role": "assistant", "reasoning": "r", "content": null, "n": 1.0})];
    let own = serde_json::json!({"own": {"b": [1, true, null], "a": "é"}, "bos_token": "B"});
    let chat = Chat { variables: own.as_object(), ..Chat::of(&messages) };
    assert_eq!(
        tokenizer.render_chat(&chat).unwrap(),
        "[{'thinking': 'r', 'role': 'assistant', 'reasoning': 'r', 'n': 1.0, 'reasoning_content': 'r'}]|None|{'b': [1, True, None], 'a': 'é'}|B"
    );
    let refused = |chat: &Chat<'_>| tokenizer.render_chat(chat).unwrap_err().message;
    let tools = serde_json::json!({"name": "x"});
    assert_eq!(refused(&Chat { tools: Some(&tools), ..chat }), "tools: expected a list of objects");
    let own = serde_json::json!({"tokenize": false});
    assert!(refused(&Chat { variables: own.as_object(), ..chat }).starts_with("tokenize cannot be set"));
    assert!(refused(&Chat { messages: &[], ..chat }).starts_with("a conversation without messages"));
    let large = serde_json::json!({"own": u64::MAX});
    assert!(
        refused(&Chat { variables: large.as_object(), ..chat }).contains("beyond 64 bits, is not supported")
    );
}

/// As in transformers, conversations with tools have a template of their own if the tokenizer has one for them.
#[test]
fn conversations_with_tools_take_the_template_for_tools() {
    let dir = folder();
    let others = dir.path().join("additional_chat_templates");
    std::fs::create_dir(&others).unwrap();
    std::fs::write(others.join("tool_use.jinja"), "tools{% generation %}{% endgeneration %}").unwrap();
    let tokenizer = with_template(dir.path(), "plain");
    let messages = [serde_json::json!({"role": "user", "content": "x"})];
    let none = serde_json::json!([]);
    let chat = Chat::of(&messages);
    assert_eq!(tokenizer.render_chat(&chat).unwrap(), "plain");
    assert_eq!(tokenizer.render_chat(&Chat { tools: Some(&none), ..chat }).unwrap(), "tools");
    assert_eq!((tokenizer.marks_generation(false), tokenizer.marks_generation(true)), (false, true));
}

/// Very deep nesting is an error that names the construct and never overflows the stack. jinja2 refuses most of these templates too.
#[test]
fn deep_nesting_is_refused_without_a_stack_overflow() {
    let many =
        |start: &str, part: &str, end: &str, count: usize| format!("{start}{}{end}", part.repeat(count));
    let grown = |start: &str, pass: &str| {
        format!("{{% set ns = namespace({start}) %}}{{% for i in range(60000) %}}{pass}{{% endfor %}}done")
    };
    let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(30_000), ")".repeat(30_000));
    let lists = format!("{{{{ {}{} }}}}", "[".repeat(30_000), "]".repeat(30_000));
    let conditions = format!("{}1{}", "{% if true %}".repeat(30_000), "{% endif %}".repeat(30_000));
    let templates = [
        many("{{ 1", "+1", " }}", 50_000),
        many("{{ 1", " and 1", " }}", 50_000),
        many("{{ ", "not ", "1 }}", 50_000),
        many("{{ ", "-", "1 }}", 50_000),
        many("{{ 1", "|trim", " }}", 50_000),
        many("{{ a", ".b", " }}", 50_000),
        format!("{{{{ {}a{} }}}}", "a(".repeat(30_000), ")".repeat(30_000)),
        many("{{ ", "1 if 0 else ", "1 }}", 50_000),
        format!("{{% set {}a{} = 1 %}}", "(".repeat(30_000), ")".repeat(30_000)),
        brackets,
        lists,
        conditions,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro f(x=f()) %}{% endmacro %}{{ f() }}".to_owned(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned(),
        // Values that grow by one level in every iteration.
        grown("x=[]", "{% set ns.x = [ns.x] %}"),
        grown("x={}", "{% set ns.x = {'a': ns.x} %}"),
        grown("x=()", "{% set ns.x = (ns.x, ns.x) %}"),
        grown("x=1", "{% set ns.x = namespace(x=ns.x) %}"),
        grown(
            "x=namespace()",
            "{% set tail = ns.x %}{% set tail.next = namespace() %}{% set ns.x = tail.next %}",
        ),
    ];
    let dir = folder();
    let conversations = [vec![Message::new(Role::User, "x")]];
    for template in templates {
        let ours = rendered(dir.path(), &template, &conversations);
        let refused = |result: &Result<String, String>| {
            result.as_ref().is_err_and(|message| message.contains("within each other is not supported"))
        };
        assert!(ours.iter().all(refused), "{}: {ours:?}", &template[..40.min(template.len())]);
    }
}
