//! What launcher and node agent say to each other: one JSON value a line, over the agent's standard input and output.

use dyad_proto::security::Proof;
use dyad_proto::wire::Failure;
use serde::{Deserialize, Serialize};

use crate::agent::facts::{Examine, MachineFacts};
use crate::agent::machine::Hello;

/// From the launcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Start a program of Dyad.
    Start(StartProgram),
    /// Send a signal to a process that was started.
    Signal {
        /// Which.
        process: u64,
        /// Number of the signal.
        signal: i32,
    },
    /// Look something up, or do something once.
    Ask {
        /// Names the answer.
        ask: u64,
        /// What.
        question: Question,
    },
    /// A sign of life, to be answered.
    Ping,
}

/// A program to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartProgram {
    /// Names the process from then on.
    pub process: u64,
    /// `coordinator` or `trainer`, which lie beside the agent.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Set in its environment besides the agent's own.
    pub env: Vec<(String, String)>,
    /// Cores that it keeps to; empty for all.
    pub cores: Vec<usize>,
}

/// Something the agent answers once.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Check what the configuration names on this host, and write it into the output folder where the coordinator runs.
    Prepare(Prepare),
    /// Write what a process shows to the others into a folder for this user alone. It goes when the agent ends.
    Keep {
        /// Name of the process.
        process: String,
        /// What it shows.
        proof: Proof,
    },
    /// Open a port on all addresses until the agent is told to close it.
    Listen,
    /// Close that port.
    StopListening,
    /// Try to connect to each address.
    Reach {
        /// `host:port`.
        addresses: Vec<String>,
    },
    /// Everything that `launcher doctor` looks at.
    Examine(Examine),
}

/// What a host has to hold for a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepare {
    /// The checked configuration.
    pub config_json: String,
    /// The coordinator runs here: it reads the pairs and writes the output folder.
    pub coordinator: bool,
    /// An earlier run in the output folder is in the way.
    pub fresh: bool,
}

/// From the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// First of all: who and what this host is.
    Hello(Box<Hello>),
    /// A line of a process.
    Line {
        /// Whose.
        process: u64,
        /// From standard output, not standard error.
        stdout: bool,
        /// Without its end.
        text: String,
    },
    /// A process has ended; all its lines came before.
    Ended {
        /// Which.
        process: u64,
        /// As wait(2) has it.
        status: i32,
    },
    /// A process could not be started.
    Unstarted {
        /// Which.
        process: u64,
        /// Why.
        trouble: Failure,
    },
    /// To a question.
    Answer {
        /// Which.
        ask: u64,
        /// What was found.
        answer: Answer,
    },
    /// Answers a ping.
    Pong,
}

/// What the agent found.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// The path of what was written.
    Written(String),
    /// The port that was opened.
    Listening(u16),
    /// Whether each address could be reached, and what stood in the way.
    Reached(Vec<Option<String>>),
    /// Facts for `launcher doctor`.
    Examined(Box<MachineFacts>),
    /// It cannot be done.
    Failed(Failure),
}

/// One line, with its end.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> String {
    // Nothing here has keys that are no strings, which is all that serialisation could fail on.
    serde_json::to_string(message).unwrap_or_default() + "\n"
}

/// What a line says; `None` for anything else, such as what a login script prints.
#[must_use]
pub fn decode<T: for<'a> Deserialize<'a>>(line: &str) -> Option<T> {
    serde_json::from_str(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_single_lines_and_come_back_as_they_were() {
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
