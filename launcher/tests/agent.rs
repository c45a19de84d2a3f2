//! Tests of the agent alone; the test plays the launcher.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use dyad_proto::RunConfig;
use launcher::agent::facts::Examine;
use launcher::agent::protocol::{Answer, Question, Reply, Request, decode, encode};

/// On a broken machine `nvidia-smi` may hang. The agent must still answer pings, or it would count as lost.
#[test]
fn an_agent_that_waits_for_a_driver_still_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (pairs, slow, sick) =
        (dir.path().join("pairs.jsonl"), dir.path().join("slow"), dir.path().join("sick"));
    std::fs::write(&pairs, "").unwrap();
    assert!(Command::new("mkfifo").arg(&slow).status().unwrap().success());
    let script =
        format!("#!/bin/sh\n[ -e {} ] && cat {} >/dev/null\nexit 1\n", sick.display(), slow.display());
    let program = dir.path().join("nvidia-smi");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let text = |name: &str| dir.path().join(name).display().to_string();
    let config = RunConfig {
        model: text("model"),
        training_file: text("pairs.jsonl").into(),
        output_dir: text("out"),
        ..RunConfig::default()
    };
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut agent = Command::new(env!("CARGO_BIN_EXE_launcher"));
    agent.arg("agent").env("PATH", path).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut agent = agent.spawn().unwrap();
    let mut stdin = agent.stdin.take().unwrap();
    let mut replies = BufReader::new(agent.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| decode::<Reply>(&line));
    assert!(matches!(replies.next(), Some(Reply::Hello(_))));
    std::fs::write(&sick, "").unwrap();
    let question = Question::Examine(Examine { config_json: Some(config.to_json().unwrap()) });
    let requests = encode(&Request::Ask { ask: 1, question }) + &encode(&Request::Ping);
    stdin.write_all(requests.as_bytes()).unwrap();
    assert!(matches!(replies.next(), Some(Reply::Pong)));
    // Each write waits until the fake driver reads the pipe, and lets it end.
    std::thread::spawn(move || {
        loop {
            let _ = std::fs::write(&slow, "");
        }
    });
    match replies.next() {
        Some(Reply::Answer { ask: 1, answer: Answer::Examined(facts) }) => {
            assert_eq!(facts.pairs, Some(Ok(text("pairs.jsonl"))));
        }
        other => panic!("{other:?}"),
    }
    drop(stdin);
    assert!(agent.wait().unwrap().success());
}

/// The port for the reachability test must not stay open for the whole run.
#[test]
fn the_test_port_is_closed_again() {
    let mut agent = Command::new(env!("CARGO_BIN_EXE_launcher"));
    let mut agent = agent.arg("agent").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = agent.stdin.take().unwrap();
    let mut replies = BufReader::new(agent.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| decode::<Reply>(&line));
    assert!(matches!(replies.next(), Some(Reply::Hello(_))));
    stdin.write_all(encode(&Request::Ask { ask: 1, question: Question::Listen }).as_bytes()).unwrap();
    let port = match replies.next() {
        Some(Reply::Answer { ask: 1, answer: Answer::Listening(port) }) => port,
        other => panic!("{other:?}"),
    };
    let connects = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    assert!(connects());
    stdin.write_all(encode(&Request::Ask { ask: 2, question: Question::StopListening }).as_bytes()).unwrap();
    assert!(matches!(replies.next(), Some(Reply::Answer { ask: 2, answer: Answer::Done })));
    assert!(!connects());
    drop(stdin);
    assert!(agent.wait().unwrap().success());
}
