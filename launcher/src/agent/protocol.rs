//! Messages between launcher and node agent: one JSON value per line, over the agent's standard input and output.

use dyad_proto::security::Proof;
use dyad_proto::wire::Failure;
use serde::{Deserialize, Serialize};

use crate::agent::facts::{Examine, MachineFacts};
use crate::agent::machine::Hello;

/// A message from the launcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Start a program of Dyad.
    Start(StartProgram),
    /// Send a signal to a started process.
    Signal {
        /// Id of the process.
        process: u64,
        /// Number of the signal.
        signal: i32,
    },
    /// A request with one answer.
    Ask {
        /// Id, repeated in the answer.
        ask: u64,
        /// The request.
        question: Question,
    },
    /// A sign of life; the agent answers with [`Reply::Pong`].
    Ping,
}

/// A program to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartProgram {
    /// Id of the process in later messages.
    pub process: u64,
    /// `coordinator` or `trainer`, from the agent's own folder.
    pub program: String,
    /// Arguments.
    pub args: Vec<String>,
    /// Environment variables in addition to the agent's own.
    pub env: Vec<(String, String)>,
    /// Cores to pin the process to; empty for all.
    pub cores: Vec<usize>,
}

/// A request that the agent answers once.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Check the files that the configuration names. On the coordinator's host, also write the configuration into the output folder.
    Prepare(Prepare),
    /// Write a process's credentials into a private folder, which the agent removes when it ends.
    Keep {
        /// Name of the process.
        process: String,
        /// Its credentials.
        proof: Proof,
    },
    /// Open a port on all addresses, until [`Question::StopListening`].
    Listen,
    /// Close that port.
    StopListening,
    /// Try to connect to each address.
    Reach {
        /// `host:port`.
        addresses: Vec<String>,
    },
    /// Collect the facts for `launcher doctor`.
    Examine(Examine),
}

/// How to check a host before a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepare {
    /// The checked configuration.
    pub config_json: String,
    /// The coordinator runs on this host, so check the pairs and take the output folder.
    pub coordinator: bool,
    /// Fail if the output folder holds an earlier run.
    pub fresh: bool,
}

/// A message from the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The first message: version and resources of the host.
    Hello(Box<Hello>),
    /// A line that a process wrote.
    Line {
        /// Id of the process.
        process: u64,
        /// From standard output, not standard error.
        stdout: bool,
        /// The line without its newline.
        text: String,
    },
    /// A process has ended. All its lines came before this message.
    Ended {
        /// Id of the process.
        process: u64,
        /// Status as wait(2) returns it.
        status: i32,
    },
    /// A process could not be started.
    Unstarted {
        /// Id of the process.
        process: u64,
        /// The error.
        trouble: Failure,
    },
    /// Answer to a [`Request::Ask`].
    Answer {
        /// Id of the request.
        ask: u64,
        /// The answer.
        answer: Answer,
    },
    /// Answers a ping.
    Pong,
}

/// Result of a [`Question`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Success without a value.
    Done,
    /// Path of the written file or folder.
    Written(String),
    /// The opened port.
    Listening(u16),
    /// For each address the error, or `None` if it was reached.
    Reached(Vec<Option<String>>),
    /// Facts for `launcher doctor`.
    Examined(Box<MachineFacts>),
    /// The request failed.
    Failed(Failure),
}

/// A message as one line, with its newline.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> String {
    // Cannot fail: all map keys in these types are strings.
    serde_json::to_string(message).unwrap_or_default() + "\n"
}

/// Parses a line; `None` if it is no message, for example output of a login script.
#[must_use]
pub fn decode<T: for<'a> Deserialize<'a>>(line: &str) -> Option<T> {
    serde_json::from_str(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_single_lines_and_decode_to_the_same_value() {
        let start = StartProgram {
            process: 7,
            program: "trainer".into(),
            args: vec!["--name".into(), "a\nb \"c\"".into()],
            env: vec![("OTEL_SERVICE_NAME".into(), "dyad=1\n".into())],
            cores: vec![0, 3],
        };
        let line = encode(&Request::Start(start.clone()));
        assert_eq!(line.matches('\n').count(), 1);
        assert!(matches!(decode(&line), Some(Request::Start(came)) if came == start));
        for noise in ["", "Welcome to node a", "{}", "{\"start\":3}", "null"] {
            assert!(decode::<Request>(noise).is_none() && decode::<Reply>(noise).is_none(), "{noise}");
        }
    }
}
