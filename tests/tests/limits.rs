//! System limits and very long texts: one clear error.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::process::{Command, Output, Stdio};

use dyad_tests::{Workspace, pair, pair_lines, processes, text};

/// Runs the launcher under a `ulimit`.
fn limited(workspace: &Workspace, limit: &str, args: &[&str]) -> Output {
    let plain = workspace.launcher(1, args);
    let mut command = Command::new("sh");
    command
        .current_dir(workspace.path("."))
        .arg("-c")
        .arg(format!("ulimit {limit} && exec \"$@\""))
        .arg("sh");
    command.arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null());
    processes::die_with_me(&mut command);
    command.output().unwrap()
}

fn error_of(output: &Output) -> String {
    let said = text(output);
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    errors[0].to_owned()
}

/// The limit also sends SIGXFSZ, which would kill the trainer and cause a restart.
#[test]
fn a_file_size_limit_is_an_error_and_not_retried() {
    let workspace = Workspace::with_model(16, "max_steps = 2\n");
    let output = limited(&workspace, "-f 64", &["--max-restarts", "3"]);
    let error = error_of(&output);
    assert!(output.status.code() == Some(1) && error.contains("File too large"), "{error}");
    assert!(!text(&output).contains("restart "), "{}", text(&output));
}

#[test]
fn too_few_open_files_are_an_error_with_a_hint() {
    let workspace = Workspace::empty();
    let output = limited(&workspace, "-n 6", &[]);
    let error = error_of(&output);
    assert!(
        output.status.code() == Some(1) && error.contains("more files cannot be opened: Too many open files"),
        "{error}"
    );
    assert!(text(&output).contains("hint: raise the limit of open files"), "{}", text(&output));
}

#[test]
fn a_very_long_error_is_shortened() {
    let workspace = Workspace::with_model(8, "");
    let long = "x".repeat(3 << 20);
    workspace.write("pairs.jsonl", &format!("{}{{\"input\": {{\"{long}\": 1}}}}\n", pair_lines(2)));
    for format in ["text", "json"] {
        let output = workspace.launch(1, &["--log-format", format]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{}", said.len());
        assert!(said.contains("line 3: input: unknown field `xxx") && said.len() < 20_000, "{}", said.len());
    }
}

#[test]
fn a_very_long_template_error_is_reported() {
    let workspace = Workspace::with_model(8, "");
    let path = workspace.path("model/tokenizer_config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let template = config["chat_template"].as_str().unwrap().to_owned();
    let raise = "{% if 'EVIL' in messages[0].content %}{{ raise_exception('bad: ' + messages[0].content) }}{% endif %}";
    config["chat_template"] = format!("{raise}{template}").into();
    std::fs::write(&path, config.to_string()).unwrap();
    let evil = pair(&format!("EVIL {}", "x".repeat(3 << 20)), "good", "bad");
    workspace.write("pairs.jsonl", &format!("{}{evil}\n", pair_lines(2)));
    let output = workspace.launch(1, &[]);
    let error = error_of(&output);
    assert!(error.contains("the chat template refuses a conversation: bad: EVIL xxx"), "{}", error.len());
    assert!(output.status.code() == Some(2) && error.len() < 6000, "{}", error.len());
}
