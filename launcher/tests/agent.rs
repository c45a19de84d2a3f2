//! The agent by itself, spoken to as a launcher does.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use dyad_proto::RunConfig;
use launcher::agent::protocol::{Answer, Examine, Question, Reply, Request, decode, encode};

/// Opening a pipe that nobody writes waits as a file system that hangs does. An agent that waited along would count as lost.
#[test]
fn an_agent_that_waits_for_a_file_still_answers() {
    let dir = tempfile::tempdir().unwrap();
    let pairs = dir.path().join("pairs.jsonl");
    assert!(Command::new("mkfifo").arg(&pairs).status().unwrap().success());
    let text = |name: &str| dir.path().join(name).display().to_string();
    let config = RunConfig {
        model: text("model"),
        training_file: text("pairs.jsonl"),
        output_dir: text("out"),
        ..RunConfig::default()
    };
    let mut agent = Command::new(env!("CARGO_BIN_EXE_launcher"));
    let mut agent = agent.arg("agent").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = agent.stdin.take().unwrap();
    let mut replies = BufReader::new(agent.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| decode::<Reply>(&line));
    let question = Question::Examine(Examine { config_json: Some(config.to_json().unwrap()) });
    let requests = encode(&Request::Ask { ask: 1, question }) + &encode(&Request::Ping);
    stdin.write_all(requests.as_bytes()).unwrap();
    assert!(matches!(replies.next(), Some(Reply::Hello(_))));
    assert!(matches!(replies.next(), Some(Reply::Pong)));
    std::fs::write(&pairs, "").unwrap();
    match replies.next() {
        Some(Reply::Answer { ask: 1, answer: Answer::Examined(facts) }) => {
            assert_eq!(facts.pairs, Some(Ok(text("pairs.jsonl"))));
        }
        other => panic!("{other:?}"),
    }
    drop(stdin);
    assert!(agent.wait().unwrap().success());
}
