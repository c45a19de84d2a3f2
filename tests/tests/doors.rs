//! Exposure to other machines and users: no socket reachable from another machine, no access without the token, no link followed, no
//! control characters printed.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot set itself up has failed; a skipped test prints why"
)]

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};

use dyad_proto::security::client::Access;
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::{TrainerMessage, WatchRunRequest};
use dyad_tests::processes::{children, die_with_me, interrupt, outcome, wait_for};
use dyad_tests::{Workspace, text};

/// Two machines on one wire, as network namespaces. Dropping this removes them.
struct Neighbours {
    home: String,
    other: String,
}

/// Address of the machine that runs the training.
const HOME: &str = "10.79.0.1";

impl Neighbours {
    /// Creates the namespaces; without root prints a message and returns `None`.
    fn new() -> Option<Self> {
        if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
            println!("skipped: network namespaces need root");
            return None;
        }
        let name = |end: &str| format!("dyd{}{end}", std::process::id());
        let neighbours = Self { home: name("h"), other: name("o") };
        let Self { home, other } = &neighbours;
        for space in [home, other] {
            ip(&["netns", "add", space]);
            ip(&["-n", space, "link", "set", "lo", "up"]);
        }
        ip(&["-n", home, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", other]);
        for (space, address) in [(home, HOME), (other, "10.79.0.2")] {
            ip(&["-n", space, "addr", "add", &format!("{address}/24"), "dev", "wire"]);
            ip(&["-n", space, "link", "set", "wire", "up"]);
        }
        Some(neighbours)
    }

    fn inside(space: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", space]).arg(program).stdin(Stdio::null());
        die_with_me(&mut command);
        command
    }

    /// Returns addresses (hex, as in `/proc/net/tcp`) and ports of the listening sockets at home.
    fn listeners(&self) -> Vec<(String, u16)> {
        let output =
            Self::inside(&self.home, "cat").args(["/proc/net/tcp", "/proc/net/tcp6"]).output().unwrap();
        let listening = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = words.get(1)?.rsplit_once(':')?;
            (words.get(3) == Some(&"0A"))
                .then(|| (address.to_owned(), u16::from_str_radix(port, 16).unwrap()))
        };
        String::from_utf8(output.stdout).unwrap().lines().filter_map(listening).collect()
    }

    /// Returns whether a connection is accepted within a second.
    fn reaches(space: &str, address: &str, port: u16) -> bool {
        let connect = format!("exec 3<>/dev/tcp/{address}/{port}");
        let mut command = Self::inside(space, "timeout");
        command.args(["1", "bash", "-c", &connect]).stderr(Stdio::null()).status().unwrap().success()
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        for space in [&self.home, &self.other] {
            let _ = Command::new("ip").args(["netns", "del", space]).status();
        }
    }
}

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().unwrap();
    assert!(output.status.success(), "ip {words:?}: {}", text(&output));
}

/// Starts a long run. Returns it once it has done a step.
fn long_run(workspace: &Workspace, mut command: Command) -> Child {
    command.stderr(Stdio::piped()).stdout(Stdio::null());
    let launcher = command.spawn().unwrap();
    workspace.wait_for_a_step();
    launcher
}

fn stop(mut launcher: Child) {
    interrupt(launcher.id() as i32);
    let (status, said) = outcome(&mut launcher);
    assert_eq!(status, Some(130), "{said}");
}

#[test]
fn sockets_of_a_run_on_one_machine_are_not_reachable_from_another() {
    let Some(neighbours) = Neighbours::new() else { return };
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    let launcher = workspace.launcher(2, &[]);
    let mut command = Neighbours::inside(&neighbours.home, launcher.get_program());
    command.args(launcher.get_args()).current_dir(workspace.path("."));
    let launcher = long_run(&workspace, command);

    let listeners = neighbours.listeners();
    // One of the coordinator and two of each rank; there is no rendezvous store.
    assert_eq!(listeners.len(), 5, "{listeners:?}");
    let mut answering = 0;
    for (address, port) in listeners {
        assert_eq!(address, "0100007F", "port {port} is open beyond the loopback device");
        assert!(!Neighbours::reaches(&neighbours.other, HOME, port), "port {port} is reached from outside");
        answering += usize::from(Neighbours::reaches(&neighbours.home, "127.0.0.1", port));
    }
    // Once connected, ranks accept no further connection, not even from this machine.
    assert_eq!(answering, 1);
    stop(launcher);
}

/// Every user of the machine can find the port.
#[test]
fn a_run_refuses_clients_without_its_token_and_never_shows_it() {
    let workspace = Workspace::with_model(16, "max_steps = 100000\n");
    std::fs::create_dir(workspace.path("tmp")).unwrap();
    let mut command = workspace.launcher(2, &[]);
    command.env("TMPDIR", workspace.path("tmp"));
    let launcher = long_run(&workspace, command);
    let processes = children(&launcher);
    let trainer = processes.iter().find(|process| process.command.contains("--launch-index")).unwrap();
    let address = trainer.command.split(' ').skip_while(|word| *word != "--coordinator").nth(1).unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let channel = Access::new(address, None, None).unwrap().endpoint().unwrap().connect().await.unwrap();
        let mut client = CoordinatorClient::new(channel);
        let refused = client.train(tokio_stream::pending::<TrainerMessage>()).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (tonic::Code::Unauthenticated, "no join token"));
        let refused = client.watch_run(WatchRunRequest {}).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (tonic::Code::Unauthenticated, "no join token"));
    });

    let folder = std::fs::read_dir(workspace.path("tmp")).unwrap().next().unwrap().unwrap().path();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let file = folder.join("node1-cpu/join-token");
    assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
    let token = std::fs::read_to_string(&file).unwrap();
    let secret = token.split('.').next().unwrap();
    for process in &processes {
        let environment = std::fs::read(format!("/proc/{}/environ", process.pid)).unwrap();
        let environment = String::from_utf8_lossy(&environment);
        assert!(environment.contains("DYAD_TOKEN_FILE=") || !process.command.contains("--launch-index"));
        assert!(!process.command.contains(secret) && !environment.contains(secret), "{}", process.command);
    }
    stop(launcher);
    for log in std::fs::read_dir(workspace.path("out/logs")).unwrap() {
        let log = std::fs::read_to_string(log.unwrap().path()).unwrap();
        assert!(!log.contains(secret));
    }
    wait_for("the token to go with the run", || (!folder.exists()).then_some(()));
}

/// Another user with write access to the folder may plant links there.
#[test]
fn links_in_the_output_folder_are_refused_and_not_followed() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::fs::create_dir_all(workspace.path("victim/dir")).unwrap();
    workspace.write("victim/file", "precious");
    for (name, target) in [
        ("metrics.jsonl", "victim/file"),
        ("eval_metrics.jsonl", "victim/file"),
        ("run.json", "victim/file"),
        ("metrics.svg", "victim/file"),
        ("logs/coordinator.log", "victim/file"),
        ("logs/node0-cpu.log", "victim/nowhere"),
        ("logs", "victim/dir"),
        ("tb", "victim/dir"),
        ("profile", "victim/dir"),
        ("checkpoint-1", "victim/dir"),
        (".tmp-final", "victim/dir"),
    ] {
        let link = workspace.path("out").join(name);
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(workspace.path(target), &link).unwrap();
        for flag in [&[][..], &["--overwrite"]] {
            let output = workspace.launch(1, flag);
            let said = text(&output);
            if name == "logs/coordinator.log" {
                // The link is moved aside as the log of an earlier run.
                assert!(output.status.success(), "{name}: {said}");
                break;
            }
            assert_eq!(output.status.code(), Some(2), "{name}: {said}");
            let why = said.contains("link") || said.contains("which Dyad did not write");
            assert!(said.contains(name) && why, "{name}: {said}");
        }
        std::fs::remove_dir_all(workspace.path("out")).unwrap();
    }
    // A file written by rename replaces the link itself.
    std::fs::create_dir(workspace.path("out")).unwrap();
    for name in [".dyad-write-test", ".run.json.part", ".metrics.jsonl.part"] {
        symlink(workspace.path("victim/file"), workspace.path("out").join(name)).unwrap();
    }
    let output = workspace.launch(1, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(std::fs::read_to_string(workspace.path("victim/file")).unwrap(), "precious");
    assert_eq!(std::fs::read_dir(workspace.path("victim/dir")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(workspace.path("victim")).unwrap().count(), 2);
}

/// Such text comes from file names, the configuration and the data.
#[test]
fn untrusted_text_cannot_start_a_line_or_move_the_cursor() {
    const EVIL: &str = "\u{1b}[2J\u{1b}]0;title\u{7}\u{202e}\nerror: made up";
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let quoted = serde_json::to_string(EVIL).unwrap().replace("\\u001b", "\\u001B");
    let pair = format!("{{\"input\":{{\"messages\":[{{\"role\":{quoted},\"content\":\"x\"}}]}}}}\n");
    workspace.write("evil.jsonl", &pair);
    for setting in [
        format!("training_file={EVIL}"),
        format!("model={EVIL}"),
        format!("{EVIL}=1"),
        format!("training_method={EVIL}"),
        format!("output_dir={EVIL}"),
        "training_file=evil.jsonl".to_owned(),
    ] {
        let output = workspace.launch(1, &["--set", &setting, "--overwrite"]);
        let said = text(&output);
        assert_ne!(output.status.code(), Some(0), "{setting:?}");
        let errors = said.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(errors, 1, "{setting:?}: {said:?}");
        assert!(!said.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{setting:?}: {said:?}");
    }
}
