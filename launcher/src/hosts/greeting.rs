//! Start of a connection: the agent's greeting, or why there is none.

use std::process::Stdio;

use dyad_proto::Fault;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::agent::machine::Hello;
use crate::agent::protocol::{Reply, decode};
use crate::hosts::hostfile::Host;
use crate::hosts::transport::Transport;
use crate::process::os::die_with_me;

/// Starts ssh or srun with a shell command for the host.
pub(super) fn start(host: &Host, transport: &Transport, line: &str) -> Result<Child, Fault> {
    let words = transport.command(host, line);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    die_with_me(&mut command);
    command.spawn().map_err(|error| {
        Fault::unavailable(format!("cannot start {}: {error}", words[0]))
            .hint(format!("{} is needed to reach other hosts", transport.name()))
    })
}

/// Reads the agent's greeting; `None` if the output ends before it.
pub(super) async fn hello(lines: &mut Lines<BufReader<ChildStdout>>) -> Option<Hello> {
    // Skip output of login scripts.
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(Reply::Hello(hello)) = decode(&line) {
            return Some(*hello);
        }
    }
    None
}

/// Reads standard error to its end; returns the last ten lines.
pub(super) async fn last_words(stream: Option<ChildStderr>) -> Vec<String> {
    let mut words = Vec::new();
    let Some(stream) = stream else { return words };
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if words.len() == 10 {
            words.remove(0);
        }
        words.push(line.trim().to_owned());
    }
    words
}

/// The error for a missing greeting, from exit status and standard error of ssh or srun.
pub(super) fn unreachable(
    host: &Host,
    transport: &Transport,
    status: Option<i32>,
    words: &[String],
) -> Fault {
    let said = words.iter().rev().find(|line| !line.is_empty()).cloned().unwrap_or_default();
    match status {
        Some(126 | 127) => Fault::unavailable(format!("host {host} has no launcher at this machine's path: {said}"))
            .hint("install Dyad there under the same path, or copy it with --push"),
        _ if said.is_empty() => Fault::unavailable(format!("host {host}: {} ended at once", transport.name())),
        _ => Fault::unavailable(format!("host {host} cannot be reached over {}: {said}", transport.name())).hint(
            "ssh must get there without a question: a key, a known host key; `launcher doctor` looks at all hosts",
        ),
    }
}

/// Fails if the host has another version of Dyad.
pub(super) fn same_version(host: &Host, hello: &Hello) -> Result<(), Fault> {
    let ours = env!("CARGO_PKG_VERSION");
    if hello.version == ours {
        return Ok(());
    }
    Err(Fault::input(format!("host {host} has Dyad {}, this machine {ours}", hello.version))
        .hint("install one version everywhere, or copy this one with --push"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh() -> Transport {
        Transport::Ssh(crate::hosts::transport::Ssh::new("sh -c", false).unwrap())
    }

    #[test]
    fn the_last_line_of_ssh_is_the_reason() {
        let host = Host::named("b");
        let words =
            ["Warning: something".to_owned(), "b: Permission denied (publickey).".to_owned(), String::new()];
        let fault = unreachable(&host, &ssh(), Some(255), &words);
        assert_eq!(fault.message, "host b cannot be reached over ssh: b: Permission denied (publickey).");
        assert_eq!(fault.code.exit_status(), 3);
        let fault = unreachable(&host, &ssh(), Some(127), &["sh: 1: exec: /x/launcher: not found".into()]);
        assert!(fault.hint.contains("--push"), "{fault}");
    }

    #[test]
    fn another_version_is_refused() {
        let hello = Hello { version: "0.0.1".into(), ..Hello::default() };
        assert!(
            same_version(&Host::named("b"), &hello).unwrap_err().message.contains("host b has Dyad 0.0.1")
        );
    }
}
