//! Tests how the launcher handles failures of its children. Scripts replace coordinator and trainer, because real ones rarely fail this
//! way.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    /// A folder with a run.toml that passes all checks, and these scripts as coordinator and trainer.
    fn new(coordinator: &str, trainer: &str) -> Self {
        let stage = Self { dir: tempfile::tempdir().unwrap() };
        for (name, text) in [("coordinator", coordinator), ("trainer", trainer)] {
            let path = stage.path(name);
            std::fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        std::fs::create_dir(stage.path("model")).unwrap();
        std::fs::write(stage.path("model/config.json"), "{}").unwrap();
        std::fs::write(stage.path("pairs.jsonl"), PAIR).unwrap();
        let config = "model = \"model\"\ntraining_file = \"pairs.jsonl\"\noutput_dir = \"out\"\n";
        std::fs::write(stage.path("run.toml"), config).unwrap();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn launcher(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
        command.current_dir(self.dir.path()).env("DYAD_BIN_DIR", self.dir.path()).env_remove("DYAD_TLS_DIR");
        command.args(["--nodes", "1", "--gpus-per-node", "0", "--config", "run.toml"]);
        command
    }

    /// Runs the launcher with `--max-restarts`. Returns the number of starts of the coordinator, and standard error.
    fn starts(&self, most: &str) -> (usize, String) {
        let output = self.launcher().args(["--max-restarts", most]).output().unwrap();
        let starts = std::fs::read_to_string(self.path("starts")).unwrap_or_default();
        (starts.lines().count(), stderr(&output))
    }

    /// Runs the launcher, which must fail with this status, one error and one hint that contain these words.
    fn refused(&self, status: i32, error: &str, hint: &str) {
        let output = self.launcher().args(["--max-restarts", "0"]).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{text}");
        for (mark, words) in [("error: ", error), ("hint: ", hint)] {
            let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(mark)).collect();
            assert!(lines.len() == 1 && lines[0].contains(words), "expected {mark}{words} in: {text}");
            assert_eq!(text.matches(words).count(), 1, "{text}");
        }
    }
}

/// A trainer whose `check` accepts every run.
const CHECKED: &str = r#"[ "$1" = check ] && { cat > /dev/null; echo '{"model": {"model_type": "llama", "layers": 2, "hidden": 64, "query": 64,
    "key": 64, "ffn": 128, "vocab": 512, "tied": false, "max_position_embeddings": 256}, "trainable": 7, "to_download": [],
    "max_seq_length": 256, "pairs": {"pairs": 1, "longest": 9, "truncated": 0, "dropped": 0, "prompt": 4, "chosen": 5, "rejected": 5, "notes": []}}'; exit; }"#;

const PAIR: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}
"#;

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_coordinator_that_refuses_is_quoted_once() {
    let stage = Stage::new(
        "echo 'error: pairs.jsonl line 1: bad' >&2; echo >&2; echo 'hint: mend it' >&2; exit 2",
        "touch started",
    );
    stage.refused(2, "pairs.jsonl line 1: bad", "mend it");
    assert!(!stage.path("started").exists(), "a trainer was started for nothing");
    let log = std::fs::read_to_string(stage.path("out/logs/coordinator.log")).unwrap();
    assert!(log.contains("error: pairs.jsonl line 1: bad"), "{log}");
}

#[test]
fn a_coordinator_that_dies_before_it_listens_is_named() {
    Stage::new("kill -9 $$", "exit 0").refused(
        1,
        "coordinator died: killed by signal 9",
        "out/logs/coordinator.log",
    );
    Stage::new("kill -ILL $$", "exit 0").refused(
        1,
        "coordinator died: killed by signal 4",
        "coordinator.log",
    );
    Stage::new("exit 77", "exit 0").refused(1, "coordinator died: exit status 77", "coordinator.log");
}

#[test]
fn a_coordinator_without_announcement_is_reported() {
    Stage::new("exit 0", "exit 0").refused(1, "did not say where it listens", "coordinator.log");
    let elsewhere = "echo '{\"port\": 1}'; exit 0";
    Stage::new(elsewhere, "exit 0").refused(1, "did not say where it listens", "coordinator.log");
}

#[test]
fn dead_processes_are_restarted_and_reported_errors_are_not() {
    let dies = "echo >> starts; kill -9 $$";
    let (starts, text) = Stage::new(dies, "exit 0").starts("1");
    assert_eq!(starts, 2, "{text}");
    assert!(text.contains("restart  1 of 1: coordinator died: killed by signal 9"), "{text}");
    assert!(text.contains("(after 1 restart)"), "{text}");
    let (starts, text) = Stage::new(dies, "exit 0").starts("9");
    assert_eq!(starts, 3, "{text}");
    assert!(text.contains("(the same failure at step 0 for the 3rd time, after 2 restarts)"), "{text}");
    assert_eq!(Stage::new(dies, "exit 0").starts("0").0, 1);
    for says in
        ["echo 'error: bad' >&2; exit 2", "echo 'error: No space left on device' >&2; exit 1", "exit 77"]
    {
        let (starts, text) = Stage::new(&format!("echo >> starts; {says}"), "exit 0").starts("3");
        assert_eq!(starts, 1, "{text}");
    }
}

/// The launcher fails to connect, but the error must be the coordinator's end, not the connection.
#[test]
fn a_coordinator_that_dies_once_it_listens_is_named() {
    let stage = Stage::new("echo '{\"listening\": \"127.0.0.1:1\"}'; exit 77", "exit 0");
    stage.refused(1, "coordinator died: exit status 77", "coordinator.log");
}

#[test]
fn the_error_of_a_missing_program_has_its_path() {
    for name in ["coordinator", "trainer"] {
        let stage = Stage::new("touch started", "touch started");
        std::fs::remove_file(stage.path(name)).unwrap();
        stage.refused(
            1,
            &format!("no program {}", stage.path(name).display()),
            "DYAD_BIN_DIR names the folder",
        );
        assert!(!stage.path("started").exists() && !stage.path("out").exists(), "{name}");
    }
}

#[test]
fn a_dry_run_prints_the_processes_and_starts_nothing() {
    let stage = Stage::new("touch started", &format!("{CHECKED}; touch started"));
    let output = stage.launcher().arg("--dry-run").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let threads = std::thread::available_parallelism().unwrap();
    let trainer = format!("rank 0  node0-cpu  device cpu  threads {threads}");
    for part in [
        "1 coordinator and 1 trainer on",
        trainer.as_str(),
        "1 pair, at most 1 step per epoch",
        "training_file = ",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(text.contains("\nTLS between them is off: no other machine reaches"), "{text}");
    let output = stage.launcher().args(["--dry-run", "--listen", "0.0.0.0:0"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\nTLS between them is on: other machines can reach"), "{text}");
    assert!(!stage.path("started").exists() && !stage.path("out").exists());
}

/// A dry run with this `CUDA_VISIBLE_DEVICES`.
fn dry_run_with(visible: &str, args: &[&str]) -> Output {
    let stage = Stage::new("exit 0", CHECKED);
    let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
    command
        .current_dir(stage.dir.path())
        .env("DYAD_BIN_DIR", stage.dir.path())
        .env("CUDA_VISIBLE_DEVICES", visible);
    command.args(["--config", "run.toml", "--dry-run"]).args(args).output().unwrap()
}

#[test]
fn missing_visible_devices_are_refused_unless_zero_gpus_are_wanted() {
    // No machine has this many GPUs.
    let output = dry_run_with("9999", &["--nodes", "2"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("error: CUDA_VISIBLE_DEVICES=9999") && text.contains("--gpus-per-node 0"),
        "{text}"
    );
    let on_cpu = dry_run_with("9999", &["--nodes", "2", "--gpus-per-node", "0"]);
    assert!(on_cpu.status.success(), "{}", stderr(&on_cpu));
}

#[test]
fn a_run_says_why_it_computes_on_the_cpu() {
    for visible in ["", "-1", "NoDevFiles"] {
        let output = dry_run_with(visible, &["--nodes", "2"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains("2 trainers on the CPU: no GPU is visible"),
            "{visible:?}: {text}{}",
            stderr(&output)
        );
        assert_eq!(text.matches("device cpu").count(), 2, "{text}");
    }
}

/// A process that writes its pid to the file `pid`, ignores SIGTERM and SIGINT, and never ends.
const STUBBORN: &str = "trap '' TERM INT; mkfifo never; exec 3<>never; echo $$ > pid; echo ' WARN ready' >&2
while :; do read -r -u 3; done";

fn is_running(pid: &Path) -> bool {
    let pid = std::fs::read_to_string(pid).unwrap();
    Path::new("/proc").join(pid.trim()).exists()
}

fn interrupt(launcher: &std::process::Child) {
    let status = Command::new("kill").args(["-INT", &launcher.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_second_ctrl_c_ends_processes_that_ignore_the_first() {
    let stage = Stage::new(STUBBORN, "exit 0");
    let mut launcher = stage.launcher().stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("ready")));
    interrupt(&launcher);
    assert!(lines.any(|line| line.contains("Ctrl-C again")));
    assert!(is_running(&stage.path("pid")));
    interrupt(&launcher);
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line == "stopping at once"), "{rest:?}");
    assert!(rest.iter().any(|line| line == "stopped  at once, without another checkpoint"), "{rest:?}");
    assert_eq!(launcher.wait().unwrap().code(), Some(130));
    assert!(!is_running(&stage.path("pid")));
}

/// The coordinator ignores the signal: the end of the grace period acts like a second Ctrl-C.
#[test]
fn one_ctrl_c_is_enough_for_processes_that_ignore_it() {
    let stage = Stage::new(STUBBORN, "exit 0");
    let mut launcher = stage.launcher().args(["--grace-period", "1"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(launcher.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("ready")));
    interrupt(&launcher);
    let rest: Vec<String> = lines.collect();
    let waiting =
        "waiting up to 1 s for the coordinator and its trainers; press Ctrl-C again to stop at once";
    assert!(rest.iter().any(|line| line.ends_with(waiting)), "{rest:?}");
    assert!(
        rest.iter().any(|line| line == "stopped  by SIGINT: the run had not ended 1 s later, and was killed"),
        "{rest:?}"
    );
    assert!(
        rest.iter().any(|line| line.starts_with("hint: ") && line.contains("--grace-period")),
        "{rest:?}"
    );
    assert_eq!(launcher.wait().unwrap().code(), Some(130));
    assert!(!is_running(&stage.path("pid")));
}

/// With a scheduler's trace, the parent of the processes' spans is the launcher's span, not the scheduler's.
#[test]
fn processes_get_the_launchers_span_as_parent() {
    let stage = Stage::new("echo \"error: under $TRACEPARENT\" >&2; exit 2", "exit 0");
    let (trace, outer) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let mut launcher = stage.launcher();
    launcher.env("TRACEPARENT", format!("00-{trace}-{outer}-01"));
    launcher.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
    let text = stderr(&launcher.output().unwrap());
    let told = text.lines().find_map(|line| line.strip_prefix("error: under ")).unwrap_or_default();
    assert!(told.starts_with(&format!("00-{trace}-")) && !told.contains(outer), "{text}");
}

/// Endless lines, and one endless line: neither memory nor log grows without limit, and the error after them is still reported.
#[test]
fn output_of_a_flooding_process_is_limited_and_its_error_is_reported() {
    const SCRIPT: &str = "(yes '2026-01-01T00:00:00Z  WARN the same again and again' | head -c 60000000
head -c 60000000 /dev/zero | tr '\\0' x; echo; echo 'error: after the flood'; echo 'hint: it is over') >&2; exit 2";
    let stage = Stage::new(SCRIPT, "exit 0");
    let output = stage.launcher().output().unwrap();
    let text = stderr(&output);
    let shown: String = text.chars().take(2000).collect();
    assert_eq!(output.status.code(), Some(2), "{shown}");
    assert!(text.contains("error: after the flood") && text.contains("hint: it is over"), "{shown}");
    assert!(text.len() < 1 << 20, "{} bytes were shown", text.len());
    assert!(text.contains("left out here: "), "{shown}");
    let log = std::fs::read_to_string(stage.path("out/logs/coordinator.log")).unwrap();
    // The burst of 16 MiB and a minute of the permitted rate, for slow machines.
    assert!(log.len() < 32 << 20, "{} bytes were written", log.len());
    assert!(log.contains("[left out here: ") && log.contains(" lines of "), "no count in the log");
    assert!(most_memory_of_children() < 300 << 20, "{} bytes of memory", most_memory_of_children());
}

/// Peak memory in bytes of any process that this test has started and waited for.
#[expect(unsafe_code, reason = "getrusage")]
fn most_memory_of_children() -> i64 {
    // SAFETY: zeroes are valid for the struct, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    usage.ru_maxrss * 1024
}
