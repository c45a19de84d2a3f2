//! How an agent is started on a host: over the system's ssh, or as a step of a Slurm allocation. Pure, but for one folder.

use std::path::{Path, PathBuf};

use dyad_proto::Fault;

use crate::hosts::hostfile::Host;

/// The way to the hosts.
#[derive(Debug)]
pub enum Transport {
    /// The system's ssh.
    Ssh(Ssh),
    /// `srun` inside an allocation.
    Srun,
}

/// ssh, and where its connections are shared.
#[derive(Debug)]
pub struct Ssh {
    command: Vec<String>,
    /// Of this run alone; goes with the run.
    sockets: Sockets,
    /// Connections stay open for a while, because several follow.
    persist: bool,
}

impl Ssh {
    /// With the user's command line for ssh.
    pub fn new(command: &str, persist: bool) -> Result<Self, Fault> {
        let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if command.is_empty() {
            return Err(Fault::input("--ssh is empty").hint("leave it out for the system's ssh"));
        }
        Ok(Self { command, sockets: Sockets::new()?, persist })
    }
}

/// A folder that only this user can look into.
#[derive(Debug)]
struct Sockets(PathBuf);

impl Sockets {
    fn new() -> Result<Self, Fault> {
        use std::os::unix::fs::DirBuilderExt;
        // Short: a socket's path has at most 107 bytes, 58 of which ssh needs itself.
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
    /// What to run here so that `remote`, a line for the shell there, runs on the host.
    #[must_use]
    pub fn command(&self, host: &Host, remote: &str) -> Vec<String> {
        match self {
            Self::Ssh(ssh) => ssh.command(host, remote),
            Self::Srun => srun(host, remote),
        }
    }

    /// In messages.
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
            // A question would wait for ever: keys alone.
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
        // No terminal: input and output are the agent's.
        words.extend(["-T".to_owned(), "--".to_owned(), host.address.clone(), remote.to_owned()]);
        words
    }
}

fn srun(host: &Host, remote: &str) -> Vec<String> {
    let list = format!("--nodelist={}", host.address);
    // One agent a node, beside the batch step's own use of it; one that ends badly is ours to judge.
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

/// The line that starts the agent from a folder of binaries.
#[must_use]
pub fn agent_line(folder: &Path, silence: u64) -> String {
    let program = folder.join("launcher");
    format!("exec {} agent --silence {silence}", quoted(&program.to_string_lossy()))
}

/// One word for a POSIX shell.
#[must_use]
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_never_asks_and_takes_user_port_and_options() {
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
    fn paths_survive_the_shell() {
        assert_eq!(agent_line(Path::new("/a b/it's"), 5), r"exec '/a b/it'\''s/launcher' agent --silence 5");
    }
}
