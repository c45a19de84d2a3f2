//! Whole runs over mutual TLS: the same numbers, secrets that only the owner can read, and refused clients.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use dyad_proto::security::token::JoinToken;
use dyad_tests::processes::{Process, children, interrupt, outcome};
use dyad_tests::{CURVE, Workspace, assert_same_curve, binary, text};
use launcher::security::{Material, RunSecrets, TLS_DIR};

/// The sums of the two ranks are bit-identical with and without TLS.
#[test]
fn tls_changes_no_number_of_a_run() {
    let workspace = Workspace::with_model(16, "max_steps = 4\n");
    let plain = workspace.train(2, "plain", &["--tls", "off"]);
    let secured = workspace.train(2, "secured", &["--tls", "on"]);
    assert_eq!(secured.len(), 4);
    assert_same_curve(&plain, &secured, &CURVE, 0.0);
}

/// One certificate of the user's own for every role.
#[test]
fn a_run_uses_the_certificates_it_is_given() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let make = |args: &str| {
        let words = args.split_whitespace();
        let output = Command::new("openssl").args(words).current_dir(workspace.path(".")).output().unwrap();
        assert!(output.status.success(), "{args}: {}", text(&output));
    };
    // The same commands as in docs/security.md.
    std::fs::create_dir(workspace.path("tls")).unwrap();
    let curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    make(&format!("req -x509 {curve} -keyout ca-key.pem -out tls/ca.pem -days 30 -subj /CN=dyad"));
    make(&format!("req {curve} -keyout tls/key.pem -out request.pem -subj /CN=dyad"));
    workspace.write(
        "extensions",
        "subjectAltName=DNS:coordinator.dyad,DNS:trainer.dyad,DNS:launcher.dyad\n\
         extendedKeyUsage=serverAuth,clientAuth\n",
    );
    make(
        "x509 -req -in request.pem -CA tls/ca.pem -CAkey ca-key.pem -CAcreateserial -days 30 \
         -extfile extensions -out tls/cert.pem",
    );
    let token = JoinToken::new([9; 32], SystemTime::now() + Duration::from_secs(3600));
    workspace.write("tls/join-token", token.text());
    let output = workspace.launcher(2, &[]).env(TLS_DIR, workspace.path("tls")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(workspace.rows("out/metrics.jsonl").len(), 1);
}

/// A long run over TLS that has done a step.
struct Secured {
    workspace: Workspace,
    launcher: Child,
    processes: Vec<Process>,
    /// Folder of the processes' keys.
    folder: PathBuf,
}

impl Secured {
    fn start() -> Self {
        let workspace = Workspace::with_model(16, "");
        std::fs::create_dir(workspace.path("tmp")).unwrap();
        let mut command = workspace.launcher(2, &["--set", "max_steps=100000", "--tls", "on"]);
        command.env("TMPDIR", workspace.path("tmp")).stderr(Stdio::piped()).stdout(Stdio::null());
        let launcher = command.spawn().unwrap();
        workspace.wait_for_a_step();
        let processes = children(&launcher);
        let is_ours = |path: &PathBuf| path.to_string_lossy().contains("dyad-tls-");
        let mut entries =
            std::fs::read_dir(workspace.path("tmp")).unwrap().map(|entry| entry.unwrap().path());
        let folder = entries.find(is_ours).unwrap();
        Self { workspace, launcher, processes, folder }
    }

    fn address(&self) -> String {
        let trainer =
            self.processes.iter().find(|process| process.command.contains("--launch-index")).unwrap();
        let mut words = trainer.command.split(' ');
        words.find(|word| *word == "--coordinator").unwrap();
        words.next().unwrap().to_owned()
    }

    /// Starts one more trainer that tries to join, and returns its output.
    fn knock(&self, address: &str, tls_dir: Option<&Path>) -> Output {
        let mut command = Command::new(binary("trainer"));
        command.args(["run", "--coordinator", address, "--name", "node9-cpu", "--launch-index", "9"]);
        command.env_remove(TLS_DIR);
        if let Some(dir) = tls_dir {
            command.env(TLS_DIR, dir);
        }
        command.output().unwrap()
    }

    /// Sends SIGINT to the launcher. Returns its status and stderr.
    fn stop(&mut self) -> (Option<i32>, String) {
        interrupt(self.launcher.id() as i32);
        outcome(&mut self.launcher)
    }
}

#[test]
fn secrets_are_in_files_only_the_owner_reads_and_are_removed_with_the_run() {
    let mut run = Secured::start();
    assert!(run.address().starts_with("https://"));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&run.folder), 0o700);
    let mut secrets = Vec::new();
    for name in ["coordinator", "node0-cpu", "node1-cpu"] {
        let dir = run.folder.join(name);
        assert_eq!(
            (mode(&dir), mode(&dir.join("key.pem")), mode(&dir.join("join-token"))),
            (0o700, 0o600, 0o600)
        );
        let Material { key_pem, join_token, .. } = Material::load(&dir).unwrap();
        secrets.extend([join_token, key_pem.lines().nth(1).unwrap().to_owned()]);
    }
    let hides = |what: &str, text: &[u8]| {
        let text = String::from_utf8_lossy(text);
        assert!(!text.is_empty(), "{what}");
        assert!(secrets.iter().all(|secret| !text.contains(secret)), "{what} holds a secret");
    };
    for process in &run.processes {
        for place in ["cmdline", "environ"] {
            let path = format!("/proc/{}/{place}", process.pid);
            hides(&path, &std::fs::read(&path).unwrap());
        }
    }
    let (status, error) = run.stop();
    assert_eq!(status, Some(130), "{error}");
    for name in ["coordinator", "node0-cpu", "node1-cpu"] {
        let path = run.workspace.path(&format!("out/logs/{name}.log"));
        hides(name, &std::fs::read(path).unwrap());
    }
    hides("run.json", &std::fs::read(run.workspace.path("out/run.json")).unwrap());
    assert!(!run.folder.exists(), "the keys are left behind");
}

#[test]
fn a_refused_trainer_says_why_and_the_run_goes_on() {
    let mut run = Secured::start();
    let address = run.address();
    let plain = address.replace("https", "http");
    let own = Material::load(&run.folder.join("node0-cpu")).unwrap();
    let hour = Duration::from_secs(3600);
    let other = RunSecrets::new(hour).unwrap().trainer("node9-cpu").unwrap();
    let old = JoinToken::new([1; 32], SystemTime::now() - hour).text().to_owned();
    let folder = |name: &str, material: &Material| {
        let dir = run.workspace.path(name);
        material.write(&dir).unwrap();
        dir
    };
    let foreign = Material { ca_pem: own.ca_pem.clone(), ..other.clone() };
    let cases = [
        (&address, None, 2, "asks for TLS, but there is no certificate to show"),
        (&plain, None, 2, "it asks for TLS"),
        (&address, Some(folder("other", &other)), 2, "the coordinator's certificate is of another authority"),
        (
            &address,
            Some(folder("foreign", &foreign)),
            2,
            "this process's certificate is of another authority",
        ),
        (
            &address,
            Some(folder("old", &Material { join_token: old, ..own })),
            2,
            "the join token is not this run's",
        ),
        (&address, Some(run.workspace.path("nowhere")), 2, "nowhere/join-token"),
    ];
    for (address, dir, status, expected) in cases {
        let output = run.knock(address, dir.as_deref());
        let said = text(&output);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains(expected) && said.contains("\nhint: "), "expected {expected:?}: {said}");
        assert_eq!(said.matches("error: ").count(), 1, "{said}");
    }
    assert_eq!(children(&run.launcher).len(), 3);
    let (status, error) = run.stop();
    assert_eq!(status, Some(130), "{error}");
    let log = std::fs::read_to_string(run.workspace.path("out/logs/coordinator.log")).unwrap();
    for reason in ["speaks plain text", "of another authority", "not this run's"] {
        assert!(log.lines().any(|line| line.contains("refused") && line.contains(reason)), "{reason}: {log}");
    }
}
