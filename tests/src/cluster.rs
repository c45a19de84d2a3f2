//! Hosts on one machine: network namespaces on a bridge, each with its own address and sshd. Needs root.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::binary;
use crate::processes::{Process, die_with_me};

/// Names of the hosts.
pub const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// Four hosts. Runs are launched from a fifth namespace, that of the bridge.
#[derive(Debug)]
pub struct Cluster {
    dir: tempfile::TempDir,
    prefix: String,
    daemons: Vec<Child>,
}

impl Cluster {
    /// Creates the namespaces, the ssh keys and configuration, and starts the daemons.
    pub fn start() -> Self {
        need_root();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("dy{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut cluster = Self { dir: tempfile::tempdir().unwrap(), prefix, daemons: Vec::new() };
        cluster.network();
        cluster.keys();
        cluster.daemons = (0..NAMES.len()).map(|index| cluster.daemon(index)).collect();
        cluster
    }

    fn space(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn network(&self) {
        let hub = self.space("hub");
        ip(&["netns", "add", &hub]);
        ip(&["-n", &hub, "link", "set", "lo", "up"]);
        ip(&["-n", &hub, "link", "add", "hub", "type", "bridge"]);
        ip(&["-n", &hub, "addr", "add", "10.78.0.254/24", "dev", "hub"]);
        ip(&["-n", &hub, "link", "set", "hub", "up"]);
        for (index, name) in NAMES.iter().enumerate() {
            let (space, port) = (self.space(name), format!("port{index}"));
            ip(&["netns", "add", &space]);
            ip(&["-n", &space, "link", "set", "lo", "up"]);
            ip(&["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space]);
            ip(&["-n", &hub, "link", "set", &port, "master", "hub", "up"]);
            ip(&["-n", &space, "addr", "add", &format!("{}/24", address(index)), "dev", "eth0"]);
            ip(&["-n", &space, "link", "set", "eth0", "up"]);
        }
    }

    fn keys(&self) {
        let key = |name: &str| {
            run(Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(self.path(name)));
            std::fs::read_to_string(self.path(&format!("{name}.pub"))).unwrap()
        };
        self.write("authorized_keys", &key("user"));
        let mut config = String::new();
        let mut known = String::new();
        for (index, name) in NAMES.iter().enumerate() {
            config += &format!("Host {name}\n  HostName {}\n", address(index));
            known += &format!("{} {}", address(index), key(&format!("host-{name}")));
        }
        let dir = self.dir.path().display();
        config += &format!(
            "Host *\n  User root\n  IdentityFile {dir}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {dir}/known_hosts\n  \
             GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n"
        );
        self.write("ssh_config", &config);
        self.write("known_hosts", &known);
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Starts an sshd with its own accounts and home folder in a namespace. Returns once it listens.
    fn daemon(&self, index: usize) -> Child {
        let (name, dir) = (NAMES[index], self.dir.path().display().to_string());
        std::fs::create_dir(self.path(&format!("home-{name}"))).unwrap();
        let accounts = std::fs::read_to_string("/etc/passwd").unwrap();
        let others = accounts.lines().filter(|line| !line.starts_with("root:") && !line.starts_with("sshd:"));
        let own = [
            format!("root:x:0:0:root:{dir}/home-{name}:/bin/sh"),
            "sshd:x:65500:65534::/run/sshd:/usr/sbin/nologin".into(),
        ];
        let accounts: Vec<String> = own.into_iter().chain(others.map(str::to_owned)).collect();
        self.write(&format!("passwd-{name}"), &(accounts.join("\n") + "\n"));
        let config = format!(
            "Port 22\nListenAddress {}\nHostKey {dir}/host-{name}\nAuthorizedKeysFile {dir}/authorized_keys\nStrictModes no\n\
             UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nPidFile none\nUseDNS no\n",
            address(index)
        );
        self.write(&format!("sshd-{name}"), &config);
        let (sshd, libraries) = sshd();
        // These mounts are visible only in this namespace.
        let script = format!(
            "mount --bind {dir}/passwd-{name} /etc/passwd && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && \
             exec {} -D -e -f {dir}/sshd-{name}",
            sshd.display()
        );
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(name), "sh", "-c", &script]);
        command.env("LD_LIBRARY_PATH", libraries).stdin(Stdio::null()).stderr(Stdio::piped());
        die_with_me(&mut command);
        let mut daemon = command.spawn().unwrap();
        let mut lines = BufReader::new(daemon.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let listens = lines.by_ref().find(|line| {
            said.push(line.clone());
            line.contains("Server listening")
        });
        assert!(listens.is_some(), "sshd did not start: {}", said.join("; "));
        // Drain the pipe, so that sshd never blocks on a full one.
        std::thread::spawn(move || lines.for_each(drop));
        daemon
    }

    /// Writes a hostfile of all hosts and returns its path.
    pub fn hostfile(&self) -> PathBuf {
        self.write("hosts", "# four hosts\na slots=1\nb slots=1\nc slots=1\nd slots=1\n");
        self.path("hosts")
    }

    /// Returns the command of a launcher in the bridge's namespace.
    pub fn launcher(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space("hub")]).arg(binary("launcher")).args(args);
        command.stdin(Stdio::null()).env("DYAD_SSH", format!("ssh -F {}", self.path("ssh_config").display()));
        command
    }

    /// Sets the link of a host `up` or `down`.
    pub fn link(&self, name: &str, state: &str) {
        let index = NAMES.iter().position(|known| *known == name).unwrap();
        ip(&["-n", &self.space("hub"), "link", "set", &format!("port{index}"), state]);
    }

    /// Returns Dyad's processes, ssh clients of agents included, in all namespaces with the namespace's name.
    pub fn processes(&self) -> Vec<(String, Process)> {
        let mut found = Vec::new();
        for name in NAMES.iter().copied().chain(["hub"]) {
            let output = Command::new("ip").args(["netns", "pids", &self.space(name)]).output().unwrap();
            for pid in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let command = String::from_utf8_lossy(&command).replace('\0', " ");
                let programs = ["launcher ", "launcher' ", "trainer ", "coordinator "];
                if programs.iter().any(|program| command.contains(program)) {
                    found.push((name.to_owned(), Process { pid: pid.parse().unwrap(), command }));
                }
            }
        }
        found
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for name in NAMES.iter().copied().chain(["hub"]) {
            let space = self.space(name);
            let pids = Command::new("ip").args(["netns", "pids", &space]).output();
            let pids =
                pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            // There are processes only after a failed test, or ssh sessions of a link that was cut.
            for pid in pids.split_whitespace() {
                let _ = Command::new("kill").args(["-9", pid]).status();
            }
            let _ = Command::new("ip").args(["netns", "del", &space]).status();
        }
    }
}

/// Panics without root: a skipped test would look like a passed one.
fn need_root() {
    let root =
        std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    assert!(root, "network namespaces need root: run the tests as root");
}

fn address(index: usize) -> String {
    format!("10.78.0.{}", index + 1)
}

/// Returns the system's sshd, or the one from `tests/install-tools.sh`, and the folder of its libraries.
fn sshd() -> (PathBuf, PathBuf) {
    let own = binary("launcher").parent().and_then(Path::parent).unwrap().join("openssh");
    let candidates = [
        (PathBuf::from("/usr/sbin/sshd"), PathBuf::new()),
        (own.join("usr/sbin/sshd"), own.join("usr/lib/x86_64-linux-gnu")),
    ];
    let found = candidates.into_iter().find(|(sshd, _)| sshd.is_file());
    found.expect("no sshd: run tests/install-tools.sh, as `make test` does")
}

fn ip(words: &[&str]) {
    run(Command::new("ip").args(words));
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    if !output.status.success() {
        let _ = std::io::stderr().write_all(&output.stderr);
        panic!("{command:?} failed");
    }
}
