//! Commands that start an agent on a host: with ssh, or with srun in a Slurm allocation. Pure, except for a folder of sockets.

use std::path::{Path, PathBuf};

use dyad_proto::Fault;

use crate::hosts::hostfile::Host;

/// How to run commands on the hosts.
#[derive(Debug)]
pub enum Transport {
    /// The system's ssh.
    Ssh(Ssh),
    /// `srun` inside an allocation.
    Srun,
}

/// The ssh command and its folder of shared connections.
#[derive(Debug)]
pub struct Ssh {
    command: Vec<String>,
    /// Used only by this run; removed at its end.
    sockets: Sockets,
    /// Keep connections open for 15 s, for several commands in a row.
    persist: bool,
}

impl Ssh {
    /// `command` is the user's ssh command line, split at spaces.
    pub fn new(command: &str, persist: bool) -> Result<Self, Fault> {
        let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if command.is_empty() {
            return Err(Fault::input("--ssh is empty").hint("leave it out for the system's ssh"));
        }
        Ok(Self { command, sockets: Sockets::new()?, persist })
    }
}

/// A temporary folder with mode 0700 for ssh's control sockets.
#[derive(Debug)]
struct Sockets(PathBuf);

impl Sockets {
    fn new() -> Result<Self, Fault> {
        use std::os::unix::fs::DirBuilderExt;
        // A short path: a socket's path has at most 107 bytes, and ssh needs 58 of them.
        let since = crate::agent::machine::clock() * 1e6;
        let path = PathBuf::from(format!("/tmp/dyad-{}-{:x}", std::process::id(), since as u64 & 0xff_ffff));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| Fault::failed(format!("cannot make {}: {error}", path.display())))?;
        Ok(Self(path))
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Transport {
    /// Local command that runs the shell command `remote` on the host.
    #[must_use]
    pub fn command(&self, host: &Host, remote: &str) -> Vec<String> {
        match self {
            Self::Ssh(ssh) => ssh.command(host, remote),
            Self::Srun => srun(host, remote),
        }
    }

    /// Name in messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ssh(_) => "ssh",
            Self::Srun => "srun",
        }
    }
}

impl Ssh {
    fn command(&self, host: &Host, remote: &str) -> Vec<String> {
        let mut words = self.command.clone();
        let sockets = self.sockets.0.join("%C");
        let persist = if self.persist { "15" } else { "no" };
        for option in [
            // Never prompt: a prompt would wait for ever.
            "BatchMode=yes".to_owned(),
            "ConnectTimeout=10".to_owned(),
            "ServerAliveInterval=5".to_owned(),
            "ServerAliveCountMax=3".to_owned(),
            "ControlMaster=auto".to_owned(),
            format!("ControlPath={}", sockets.display()),
            format!("ControlPersist={persist}"),
        ] {
            words.extend(["-o".to_owned(), option]);
        }
        words.extend(host.port.iter().flat_map(|port| ["-p".to_owned(), port.to_string()]));
        words.extend(host.user.iter().flat_map(|user| ["-l".to_owned(), user.clone()]));
        // No terminal: the agent uses standard input and output.
        words.extend(["-T".to_owned(), "--".to_owned(), host.address.clone(), remote.to_owned()]);
        words
    }
}

fn srun(host: &Host, remote: &str) -> Vec<String> {
    let list = format!("--nodelist={}", host.address);
    // One agent per node. --overlap: it shares the node with the batch step. --kill-on-bad-exit=0: the launcher handles failures.
    let flags = [
        "srun",
        "--nodes=1",
        "--ntasks=1",
        &list,
        "--overlap",
        "--kill-on-bad-exit=0",
        "--cpu-bind=none",
        "--export=ALL",
    ];
    let shell = ["--unbuffered", "sh", "-c", remote];
    flags.into_iter().chain(shell).map(str::to_owned).collect()
}

/// Shell command that starts the agent from a folder of binaries; `silence` in seconds.
#[must_use]
pub fn agent_line(folder: &Path, silence: u64) -> String {
    let program = folder.join("launcher");
    format!("exec {} agent --silence {silence}", quoted(&program.to_string_lossy()))
}

/// Quotes text as one word for a POSIX shell.
#[must_use]
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_never_prompts_and_gets_user_port_and_options() {
        let transport = Transport::Ssh(Ssh::new("ssh -F /etc/my config", false).unwrap());
        let host = Host { user: Some("ann".into()), port: Some(2222), ..Host::named("worker-1") };
        let words = transport.command(&host, "exec 'x'");
        assert_eq!(words[..4], ["ssh", "-F", "/etc/my", "config"]);
        let line = words.join(" ");
        assert!(line.contains("-o BatchMode=yes") && line.contains("-o ControlMaster=auto"), "{line}");
        assert!(!line.contains("StrictHostKeyChecking"), "the user's choice");
        assert!(line.ends_with("-p 2222 -l ann -T -- worker-1 exec 'x'"), "{line}");
        let Transport::Ssh(ssh) = &transport else { unreachable!() };
        let folder = ssh.sockets.0.clone();
        assert!(folder.is_dir());
        drop(transport);
        assert!(!folder.exists());
        assert!(Ssh::new(" ", false).is_err());
    }

    #[test]
    fn srun_starts_one_agent_on_the_node() {
        let words = Transport::Srun.command(&Host::named("n3"), "exec x");
        assert_eq!(words[0], "srun");
        for flag in ["--nodelist=n3", "--ntasks=1", "--overlap", "--kill-on-bad-exit=0"] {
            assert!(words.iter().any(|word| word == flag), "{flag}");
        }
        assert_eq!(words[words.len() - 3..], ["sh", "-c", "exec x"]);
    }

    #[test]
    fn paths_are_quoted_for_the_shell() {
        assert_eq!(agent_line(Path::new("/a b/it's"), 5), r"exec '/a b/it'\''s/launcher' agent --silence 5");
    }
}
