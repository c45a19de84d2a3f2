//! Wrong input: one error line that names it, one hint, the documented exit status, and no step done.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use dyad_tests::refusal::{invalid, invalid_at_once, refused};
use dyad_tests::{BASE, Workspace, pair, pair_lines, text};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;

/// Returns a valid workspace whose second pair is replaced by `line`.
fn with_line(line: &str) -> Workspace {
    let workspace = Workspace::with_model(4, "");
    let lines = pair_lines(4);
    let mut lines: Vec<&str> = lines.lines().collect();
    lines[1] = line;
    workspace.write("pairs.jsonl", &(lines.join("\n") + "\n"));
    workspace
}

fn bad_line(line: &str, message: &[&str]) {
    let message = [&["pairs.jsonl line 2"], message].concat();
    invalid(&with_line(line), &[], &message, "");
}

#[test]
fn a_missing_config_file() {
    let workspace = Workspace::empty();
    invalid_at_once(&workspace, &[], &["run.toml", "No such file"], "--config");
}

#[test]
fn a_missing_training_file() {
    let workspace = Workspace::with_model(4, "");
    for key in ["training_file", "validation_file"] {
        let message = [&format!("cannot read {key} nowhere.jsonl"), "No such file"];
        invalid_at_once(&workspace, &["--set", &format!("{key}=nowhere.jsonl")], &message, "relative to");
    }
}

#[test]
fn a_line_that_is_not_json() {
    bad_line("{\"input\": {", &["not valid JSON", "column"]);
}

#[test]
fn a_role_that_does_not_exist() {
    let mut line = pair("a", "b", "c");
    line["input"]["messages"][0]["role"] = json!("narrator");
    bad_line(&line.to_string(), &["input.messages[0].role", "narrator", "user"]);
}

#[test]
fn an_output_with_another_role_than_assistant() {
    let mut line = pair("a", "b", "c");
    line["preferred_output"][0]["role"] = json!("user");
    bad_line(&line.to_string(), &["preferred_output[0].role", "assistant"]);
}

#[test]
fn an_empty_output() {
    bad_line(&pair("a", "  ", "c").to_string(), &["preferred_output[0].content", "empty"]);
}

#[test]
fn a_conversation_that_ends_with_the_assistant() {
    let mut line = pair("a", "b", "c");
    line["input"]["messages"].as_array_mut().unwrap().push(json!({ "role": "assistant", "content": "d" }));
    bad_line(&line.to_string(), &["input.messages[1].role"]);
}

#[test]
fn an_empty_training_file() {
    let workspace = Workspace::with_model(4, "");
    workspace.write("pairs.jsonl", "\n\n");
    invalid(&workspace, &[], &["pairs.jsonl", "holds no records"], "preferred_output");
}

#[test]
fn an_unknown_config_key() {
    let workspace = Workspace::with_model(4, "learning_rat = 1e-4\n");
    let message = ["run.toml line 8", "unknown config key `learning_rat`"];
    invalid_at_once(&workspace, &[], &message, "`learning_rate`");
    workspace.write("run.toml", BASE);
    invalid_at_once(&workspace, &["--set", "dpo_bta=1"], &["--set dpo_bta=1"], "`dpo_beta`");
}

#[test]
fn a_config_value_of_the_wrong_type_or_range() {
    let workspace = Workspace::with_model(4, "n_epochs = \"many\"\n");
    let refuse =
        |args: &[&str], message: &[&str]| invalid_at_once(&workspace, args, message, "docs/config.md");
    refuse(&[], &["run.toml line 8", "`n_epochs`", "string \"many\"", "expected a whole number"]);
    workspace.write("run.toml", BASE);
    refuse(&["--set", "dpo_beta=big"], &["--set dpo_beta=big: ", "string \"big\"", "expected a number"]);
    refuse(&["--set", "warmup_ratio=2"], &["`warmup_ratio`", "between 0 and 1", "found 2"]);
    refuse(&["--set", "zero_stage=7"], &["`zero_stage`", "0, 1, 2 or 3", "found 7"]);
    refuse(&["--set", "optim=sgd"], &["--set optim=sgd: ", "sgd", "`adamw` or `adamw_8bit`"]);
    refuse(&["--set", "activation_checkpointing=most"], &["--set activation_checkpointing=most: ", "most"]);
}

#[test]
fn offload_reference_without_a_reference_model() {
    let workspace = Workspace::with_model(4, "offload_reference = true\nlora = true\n");
    let refuse = |args: &[&str], message: &[&str]| {
        invalid_at_once(&workspace, args, message, "remove offload_reference");
    };
    refuse(&[], &["offload_reference is set", "the base model itself"]);
    refuse(&["--set", "lora=false", "--set", "reference_logps=precompute"], &["frees the reference model"]);
    refuse(&["--set", "training_method=sft"], &["supervised fine-tuning has no reference model"]);
}

#[test]
fn evaluations_without_a_validation_file() {
    let workspace = Workspace::with_model(4, "n_evals = 2\n");
    invalid_at_once(&workspace, &[], &["n_evals is set", "validation_file is not"], "validation_file");
}

/// Rewrites a safetensors file: `change` returns the new shape of each tensor, or `None` to remove it.
fn rewrite(path: &Path, change: impl Fn(&str, Vec<usize>) -> Option<Vec<usize>>) {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut kept: HashMap<String, TensorView<'_>> = HashMap::new();
    for (name, view) in tensors.tensors() {
        if let Some(shape) = change(&name, view.shape().to_vec()) {
            kept.insert(name, TensorView::new(view.dtype(), shape, view.data()).unwrap());
        }
    }
    safetensors::serialize_to_file(kept, None, path).unwrap();
}

#[test]
fn a_missing_tensor() {
    let workspace = Workspace::with_model(4, "");
    let missing = "model.layers.1.mlp.up_proj.weight";
    rewrite(&workspace.path("model/model.safetensors"), |name, shape| (name != missing).then_some(shape));
    invalid(&workspace, &[], &["missing tensor", missing], "incomplete");
}

#[test]
fn a_tensor_of_the_wrong_shape() {
    let workspace = Workspace::with_model(4, "");
    rewrite(&workspace.path("model/model.safetensors"), |name, mut shape| {
        if name == "model.layers.0.self_attn.q_proj.weight" {
            shape = vec![shape[0] / 2, shape[1] * 2];
        }
        Some(shape)
    });
    let message = ["model.layers.0.self_attn.q_proj.weight", "has shape [16, 64], expected [32, 32]"];
    invalid(&workspace, &[], &message, "config.json");
}

#[test]
fn a_weights_file_that_was_cut_short() {
    let workspace = Workspace::with_model(4, "");
    let path = workspace.path("model/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    invalid(&workspace, &[], &["model.safetensors is not a valid safetensors file"], "fetch the file again");
}

#[test]
fn a_model_folder_with_a_missing_file() {
    let workspace = Workspace::with_model(4, "");
    let without = |name: &str, message: &str, hint: &str| {
        let (path, aside) = (workspace.path("model").join(name), workspace.path("aside"));
        fs::rename(&path, &aside).unwrap();
        invalid(&workspace, &[], &[message], hint);
        fs::rename(&aside, &path).unwrap();
    };
    without("config.json", "model", "Hugging Face model folder");
    without("tokenizer.json", "no tokenizer.json in", "save_pretrained");
    without("tokenizer_config.json", "has no chat template", "chat_template.jinja");
    without("model.safetensors", "no weights in", "model.safetensors");
}

#[test]
fn a_model_that_does_not_exist() {
    let workspace = Workspace::with_model(4, "");
    invalid(&workspace, &["--set", "model=./nowhere"], &["no model folder", "nowhere"], "hub id");
}

#[test]
fn a_model_family_that_is_not_supported() {
    let workspace = Workspace::with_model(4, "");
    let path = workspace.path("model/config.json");
    let config = fs::read_to_string(&path).unwrap().replace("\"llama\"", "\"mamba\"");
    fs::write(&path, config).unwrap();
    invalid(&workspace, &[], &["model_type \"mamba\" is not supported"], "llama, qwen2");
}

#[test]
fn an_adapter_without_lora_and_modules_that_do_not_exist() {
    let workspace = Workspace::with_model(8, "lora_r = 2\n");
    workspace.train(1, "adapter", &["--set", "lora=true"]);
    invalid(
        &workspace,
        &["--set", "from_checkpoint=adapter/final"],
        &["is an adapter, but lora is false"],
        "lora = true",
    );
    let modules = ["--set", "lora=true", "--set", "lora_trainable_modules=query"];
    invalid(&workspace, &modules, &["\"query\" matches no linear layer"], "q_proj");
    let list = ["--set", "lora=true", "--set", "lora_trainable_modules=q_proj;v_proj"];
    invalid(&workspace, &list, &["`lora_trainable_modules`", "q_proj;v_proj"], "\"q_proj,v_proj\"");
}

#[test]
fn keys_of_adapters_without_an_effect_or_against_each_other() {
    let workspace = Workspace::with_model(4, "lora = true\nlora_r = 2\n");
    let refused = [
        (
            "rank_pattern={ q_prj = 4 }",
            "rank_pattern: \"q_prj\" matches no layer that gets an adapter",
            "end of a layer's name",
        ),
        ("rank_pattern={ q_proj = 0 }", "rank_pattern holds 0", ""),
        ("exclude_modules=[\"q_prj\"]", "exclude_modules: \"q_prj\" matches no module", "q_proj"),
        (
            "modules_to_save=[\"lm_hed\"]",
            "modules_to_save: \"lm_hed\" matches no module",
            "did you mean \"lm_head\"?",
        ),
        ("modules_to_save=[\"mlp\"]", "training model.layers.0.mlp is not supported", "linear layers"),
        ("layers_to_transform=[0]", "layers_to_transform cannot be used", "list the names"),
        ("init_lora_weights=pissa", "init_lora_weights = \"pissa\" is not supported", "convert it"),
        ("init_lora_weights=eva", "init_lora_weights = \"eva\" is not supported", "gaussian"),
        ("use_qlora=true", "unknown config key `use_qlora`", "leave it out"),
        ("target_parameters=[\"a\"]", "unknown config key `target_parameters`", "experts"),
    ];
    for (key, message, hint) in refused {
        invalid(&workspace, &["--set", key], &[message], hint);
    }
    let both = ["--set", "lora_bias=true", "--set", "use_dora=true"];
    invalid(&workspace, &both, &["lora_bias cannot be used with use_dora"], "PEFT refuses");
    let merged = ["--set", "lora_bias=true", "--set", "merge_adapter=true"];
    invalid(&workspace, &merged, &["merge_adapter is set, but model.layers.0."], "remove merge_adapter");
    invalid(
        &workspace,
        &["--set", "lora=false", "--set", "use_dora=true"],
        &["use_dora is set but lora is not"],
        "",
    );
}

#[test]
fn generation_takes_an_adapter_by_the_same_rules() {
    let workspace = Workspace::with_model(8, "lora = true\nlora_r = 2\nmax_steps = 1\n");
    let layers = "lora_trainable_modules=model.layers.1.self_attn.q_proj";
    workspace.train(1, "adapter", &["--set", layers]);
    let config = workspace.path("adapter/final/adapter_config.json");
    let written = fs::read_to_string(&config).unwrap();
    assert!(written.contains("\"model.layers.1.self_attn.q_proj\""), "{written}");
    let generate = || {
        let mut command = std::process::Command::new(dyad_tests::binary("trainer"));
        command.current_dir(workspace.path(".")).args(["generate", "--model", "adapter/final"]);
        command.args(["--pairs", "pairs.jsonl", "--limit", "1", "--max-new-tokens", "2"]).output().unwrap()
    };
    let answered = generate();
    assert!(answered.status.success(), "{}", text(&answered));
    fs::write(&config, written.replace("\"use_dora\": false", "\"use_qalora\": true")).unwrap();
    let refused = generate();
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("use_qalora = true is not supported"), "{}", text(&refused));
}

#[test]
fn a_port_that_is_taken() {
    let workspace = Workspace::with_model(4, "");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let refused = refused(&workspace, &["--listen", &address]);
    assert_eq!(refused.status, 3);
    assert!(refused.message.contains(&address) && refused.message.contains("in use"), "{}", refused.message);
    assert!(refused.hint.contains("--listen"), "{}", refused.hint);
    invalid(&workspace, &["--listen", "127.0.0.1:99999"], &["127.0.0.1:99999", "invalid port"], "--listen");
}

#[test]
fn gpus_that_are_not_there() {
    let workspace = Workspace::with_model(4, "");
    if Path::new("/proc/driver/nvidia/gpus").exists() {
        invalid_at_once(
            &workspace,
            &["--gpus-per-node", "1000"],
            &["1000 GPUs are asked for"],
            "--gpus-per-node",
        );
    } else {
        invalid_at_once(&workspace, &["--gpus-per-node", "1"], &["no CUDA device"], "--gpus-per-node 0");
    }
}

#[test]
fn an_output_folder_that_cannot_be_written() {
    let workspace = Workspace::with_model(4, "");
    // Not even root can create a folder below a file.
    invalid(&workspace, &["--set", "output_dir=pairs.jsonl/out"], &["cannot write output_dir"], "write");
}

#[test]
fn an_output_folder_that_holds_a_run() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    workspace.train(1, "earlier", &[]);
    let before = contents(&workspace.path("earlier"));
    let args = ["--set", "output_dir=earlier", "--set", "learning_rate=0.5"];
    invalid(&workspace, &args, &["earlier", "already holds a run"], "--resume continues it, --overwrite");
    assert!(
        before.len() > 8 && contents(&workspace.path("earlier")) == before,
        "the earlier run was touched"
    );
}

/// Returns every file below a folder, with its bytes.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(contents(&path));
        } else {
            files.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    files
}

/// A run refused before its first step needs no `--overwrite` afterwards; correcting the input is enough.
#[test]
fn a_refused_run_does_not_stand_in_the_way_of_the_next() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    invalid(&workspace, &["--set", "model=./modle"], &["no model folder at ./modle"], "config.json");
    invalid(&workspace, &["--set", "max_seq_length=3"], &["8 pairs are too long"], "max_seq_length");
    assert_eq!(workspace.train(1, "out", &[]).len(), 1);
}

#[test]
fn nothing_to_resume() {
    let workspace = Workspace::with_model(4, "");
    invalid(&workspace, &["--resume"], &["out", "checkpoint"], "--resume");
}

#[test]
fn pairs_that_are_all_too_long() {
    let workspace = Workspace::with_model(4, "");
    invalid(
        &workspace,
        &["--set", "max_seq_length=3"],
        &["no pair of", "4 pairs are too long"],
        "max_seq_length",
    );
}

#[test]
fn pairs_that_are_dropped_or_cut_are_counted() {
    let workspace = Workspace::with_model(12, "max_steps = 1\nmax_seq_length = 30\n");
    let output = workspace.launch(1, &[]);
    assert!(output.status.success(), "{}", text(&output));
    let counts = "12 pairs, 1 step per epoch, 1 step, 5 cut at max_seq_length, 7 dropped: prompt fills";
    assert!(text(&output).contains(counts), "{}", text(&output));
}

#[test]
fn a_dry_run_starts_nothing() {
    let workspace = Workspace::with_model(20, "n_epochs = 2\n");
    let output = workspace.launch(2, &["--dry-run"]);
    assert!(output.status.success(), "{}", text(&output));
    for part in ["rank 1  node1-cpu  device cpu", "20 pairs", "at most 6 steps", "* learning_rate = 0.01"] {
        assert!(text(&output).contains(part), "no {part:?} in {}", text(&output));
    }
    assert!(!workspace.path("out").exists());
}

#[test]
fn a_dry_run_checks_every_line() {
    invalid(
        &with_line("{}"),
        &["--dry-run"],
        &["pairs.jsonl line 2", "input: missing"],
        "`preferred_output`",
    );
}

#[test]
fn a_run_folder_given_as_model_is_refused_with_a_hint_to_its_model() {
    let workspace = Workspace::with_model(4, "max_steps = 1\n");
    workspace.train(1, "first", &[]);
    invalid(&workspace, &["--set", "model=first"], &["first holds no config.json"], "/first/final");
}

#[test]
fn an_unknown_command_is_refused_with_a_suggestion() {
    for (word, hint) in [("run.toml", "--config run.toml"), ("generate", "`trainer generate`")] {
        let output = std::process::Command::new(dyad_tests::binary("launcher")).arg(word).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("hint: ") && said.contains(hint), "{said}");
    }
}
