//! Data formats: hosted, TRL's messages and plain text.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_tests::refusal::invalid;
use dyad_tests::{CURVE, Workspace, assert_same_curve, text};
use serde_json::{Value, json};

fn workspace(lines: &[Value]) -> Workspace {
    let workspace = Workspace::with_model(16, "max_steps = 2\nshuffle = false\n");
    workspace.write("trl.jsonl", &lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    workspace
}

fn said(role: &str, text: &str) -> Value {
    json!({ "role": role, "content": text })
}

/// Returns question, preferred and other answer of each pair of a workspace.
fn contents(workspace: &Workspace) -> Vec<[String; 3]> {
    let content = |value: &Value| value[0]["content"].as_str().unwrap().to_owned();
    let rows = workspace.rows("pairs.jsonl");
    rows.iter()
        .map(|row| {
            let prompt = content(&row["input"]["messages"]);
            [prompt, content(&row["preferred_output"]), content(&row["non_preferred_output"])]
        })
        .collect()
}

const TRL: [&str; 2] = ["--set", "training_file=trl.jsonl"];

#[test]
fn trl_messages_train_like_the_same_pairs_in_the_hosted_format() {
    let hosted = Workspace::with_model(16, "max_steps = 2\nshuffle = false\n");
    let expected = hosted.train(1, "out", &[]);
    let pairs = contents(&hosted);
    let explicit = pairs.iter().map(|[prompt, chosen, rejected]| {
        json!({ "prompt": [said("user", prompt)], "chosen": [said("assistant", chosen)],
                "rejected": [said("assistant", rejected)], "score_chosen": 9.5, "source": "x", "tools": null })
    });
    let implicit = pairs.iter().map(|[prompt, chosen, rejected]| {
        json!({ "chosen": [said("user", prompt), said("assistant", chosen)],
                "rejected": [said("user", prompt), said("assistant", rejected)] })
    });
    for (lines, extra) in [(explicit.collect::<Vec<_>>(), true), (implicit.collect(), false)] {
        let workspace = workspace(&lines);
        let output = workspace.launch(1, &TRL);
        let shown = text(&output);
        assert!(output.status.success(), "{shown}");
        assert_same_curve(&expected, &workspace.rows("out/metrics.jsonl"), &CURVE, 0.0);
        let passed_over = "training_file has columns that are not read: score_chosen, source";
        assert_eq!(shown.contains(passed_over), extra, "{shown}");
        assert!(!shown.contains("no chat template"), "{shown}");
    }
}

#[test]
fn plain_text_is_trained_without_a_template_and_says_so() {
    let line = json!({ "prompt": "The sky is", "chosen": " blue.", "rejected": " green and square." });
    let workspace = workspace(&vec![line; 8]);
    for args in [&TRL[..], &[&TRL[..], &["--dry-run", "--set", "output_dir=none"]].concat()] {
        let output = workspace.launch(1, args);
        let shown = text(&output);
        assert!(output.status.success(), "{shown}");
        assert_eq!(shown.matches("no chat template is applied").count(), 1, "{shown}");
    }
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 2);
}

#[test]
fn plain_text_needs_a_tokenizer_with_an_end_of_sequence_token() {
    let line = json!({ "prompt": "The sky is", "chosen": " blue.", "rejected": " green." });
    let workspace = workspace(&[line]);
    let path = workspace.path("model/tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["eos_token"] = Value::Null;
    std::fs::write(&path, config.to_string()).unwrap();
    invalid(
        &workspace,
        &TRL,
        &["trl.jsonl line 1", "the tokenizer has no eos_token"],
        "tokenizer_config.json",
    );
}

#[test]
fn lines_of_two_formats_in_one_file_are_refused() {
    let trl = json!({ "prompt": "a", "chosen": "b", "rejected": "c" });
    let workspace = workspace(&[]);
    let hosted = std::fs::read_to_string(workspace.path("pairs.jsonl")).unwrap();
    workspace.write("trl.jsonl", &format!("{hosted}{trl}\n"));
    invalid(
        &workspace,
        &TRL,
        &["trl.jsonl line 17", "input: missing"],
        "all lines of a file have the same fields",
    );
}

#[test]
fn pairs_of_any_format_serve_as_prompts_for_generating() {
    let line = json!({ "prompt": "The sky is", "chosen": " blue.", "rejected": " green." });
    let workspace = workspace(&[line]);
    let mut command = std::process::Command::new(dyad_tests::binary("trainer"));
    command.current_dir(workspace.path(".")).args(["generate", "--model", "model", "--pairs", "trl.jsonl"]);
    let output = command.args(["--max-new-tokens", "1"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("The sky is"), "{}", text(&output));
}

/// ChatML that reads tools, tool calls and reasoning, as Qwen's do.
const TOOLS: &str = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}\
{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{{ m.content or '' }}{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}\
<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A folder with a file of `tests/forms` and a model that was made for it.
fn with_form(name: &str, config: &str) -> Workspace {
    let workspace = Workspace::empty();
    let file = dyad_tests::root().join("tests/forms").join(name).with_extension("jsonl");
    std::fs::copy(file, workspace.path("pairs.jsonl")).unwrap();
    workspace.new_model("model", &[]);
    workspace.write("model/chat_template.jinja", TOOLS);
    workspace.write("run.toml", &format!("{}max_steps = 2\nshuffle = false\n{config}", dyad_tests::BASE));
    workspace
}

#[test]
fn every_form_trains_and_is_said_at_the_start() {
    let sft = "training_method = \"sft\"\n";
    let cases = [
        ("hosted", "", "`input`, `preferred_output` and `non_preferred_output` (hosted API form)"),
        ("hosted_tools", "", "(hosted API form)"),
        ("hosted_tools", "assistant_only_loss = false\n", "(hosted API form)"),
        ("preference", "", "`prompt`, `chosen` and `rejected` (TRL form)"),
        ("implicit", "", "(TRL form)"),
        ("ultrafeedback", "", "not read: messages, prompt_id, score_chosen, score_rejected"),
        ("hh", "", "(TRL form) as plain text"),
        ("preference", sft, "(TRL form)"),
        ("messages", sft, "`messages` (conversation form)"),
        ("messages_tools", sft, "(conversation form)"),
        ("messages", "training_method = \"sft\"\ntrain_on_inputs = true\n", "(conversation form)"),
        ("prompt_completion", sft, "`prompt` and `completion` (single answers form)"),
        ("prompt_completion_text", sft, "(single answers form) as plain text"),
        ("text", sft, "`text` (text form) as plain text"),
        (
            "unpaired",
            "training_method = \"sft\"\ndataset_format = \"prompt_completion\"\n",
            "not read: label",
        ),
    ];
    for (name, config, said) in cases {
        let workspace = with_form(name, config);
        let output = workspace.launch(1, &[]);
        let shown = text(&output);
        assert!(output.status.success() && shown.contains(said), "{name}: {shown}");
        assert_eq!(workspace.rows("out/metrics.jsonl").len(), 2, "{name}");
        assert!(!shown.contains("does not read"), "{name}: {shown}");
    }
}

#[test]
fn a_form_that_the_objective_cannot_use_is_refused() {
    for (name, config, message) in [
        ("messages", "", "holds answers without a rejected one (`messages`: conversation form)"),
        ("unpaired", "training_method = \"sft\"\n", "holds labelled answers"),
    ] {
        let workspace = with_form(name, config);
        invalid(&workspace, &[], &["pairs.jsonl ", message], "dataset_format");
    }
}

#[test]
fn pairs_of_weight_0_are_left_out_and_counted() {
    let workspace = with_form("hosted", "");
    let shown = text(&workspace.launch(1, &[]));
    assert!(shown.contains("4 pairs") && shown.contains("1 dropped: weight 0"), "{shown}");
}

/// The run goes on, as transformers does, and says once what the model will not see.
#[test]
fn what_the_template_does_not_read_is_said() {
    let workspace = with_form("hosted_tools", "");
    workspace.write(
        "model/chat_template.jinja",
        &TOOLS.replace("reasoning_content", "nothing").replace("tools", "nothing"),
    );
    let shown = text(&workspace.launch(1, &[]));
    for field in ["reasoning", "tools"] {
        assert_eq!(shown.matches(&format!("the chat template does not read {field}:")).count(), 1, "{shown}");
    }
    assert!(!shown.contains("does not read tool_calls"), "{shown}");
}

/// Tokens that are not trained have no loss: the answer to an untrained message is the only one that counts.
#[test]
fn a_message_of_weight_0_is_context_only() {
    let turns = |first: &str, weight: u8| {
        json!({ "messages": [said("user", "One?"), json!({ "role": "assistant", "content": first, "weight": weight }),
                             said("user", "Two?"), said("assistant", "Three.")] })
    };
    let lines = |weight| vec![turns("Yes, one.", weight); 8];
    let single = json!({ "prompt": [said("user", "One?"), said("assistant", "Yes, one."), said("user", "Two?")],
                         "completion": [said("assistant", "Three.")] });
    let sft = "training_method=sft";
    let curve = |lines: Vec<Value>| {
        let workspace = workspace(&lines);
        workspace.train(2, "out", &[&TRL[..], &["--set", sft]].concat())
    };
    let (context, both, alone) = (curve(lines(0)), curve(lines(1)), curve(vec![single; 8]));
    assert_same_curve(&context, &alone, &["loss", "grad_norm"], 1e-5);
    assert_ne!(both[0]["loss"], alone[0]["loss"]);
}
