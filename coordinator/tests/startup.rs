//! Errors before a trainer connects: one line of error, one hint, an exit status, and no announced port.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::Write;
use std::net::TcpListener;

use support::{Ended, Workspace};
use tokio::io::{AsyncBufReadExt, BufReader};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const ALONE: [&str; 2] = ["--world-size", "1"];

/// Asserts that the coordinator ended with this status and message, and never announced a port.
fn assert_refused(ended: &Ended, status: i32, expected: &str) {
    assert_eq!((ended.status, ended.stdout.as_str()), (Some(status), ""), "{}", ended.stderr);
    let report = ended.report();
    assert!(report.lines().next().unwrap_or("").contains(expected), "{}", ended.stderr);
    assert!(report.contains("\n\nhint: "), "{}", ended.stderr);
}

/// Whether the output folder holds nothing but the lock of its owner, or does not exist.
fn nothing_made(work: &Workspace) -> bool {
    let entries = std::fs::read_dir(work.path("out")).into_iter().flatten().flatten();
    entries.into_iter().all(|entry| entry.file_name() == ".dyad-lock")
}

#[tokio::test]
async fn bad_lines_are_counted_and_the_first_is_shown() {
    let work = Workspace::new(3, 2, "n_evals = 1");
    let good = std::fs::read_to_string(work.path("valid.jsonl")).unwrap();
    let bad = good.replacen("\"role\":\"user\"", "\"role\":\"human\"", 1);
    std::fs::write(work.path("valid.jsonl"), format!("{good}{bad}not json\n")).unwrap();
    let ended = work.run_alone(&ALONE).await;
    let expected = "valid.jsonl line 3: input.messages[0].role: unknown role \"human\" \
                    (expected one of system, user, assistant, tool) (the first of 2 bad lines)";
    assert_refused(&ended, 2, expected);
    assert!(nothing_made(&work), "nothing is made before the data is known to be good");
}

#[tokio::test]
async fn missing_data_file_is_named() {
    let work = Workspace::new(3, 0, "");
    std::fs::remove_file(work.path("train.jsonl")).unwrap();
    assert_refused(&work.run_alone(&ALONE).await, 2, "cannot read training_file /");
}

#[tokio::test]
async fn unknown_config_key_is_named() {
    let work = Workspace::new(3, 0, "learning_rat = 1.0");
    let ended = work.run_alone(&ALONE).await;
    assert_refused(&ended, 2, "run.toml line 5: unknown config key `learning_rat`");
    assert!(ended.report().ends_with("hint: did you mean `learning_rate`?\n"), "{}", ended.stderr);
}

#[tokio::test]
async fn earlier_run_is_kept_unless_overwritten() {
    let work = Workspace::new(3, 0, "");
    std::fs::create_dir(work.path("out")).unwrap();
    std::fs::write(work.path("out/metrics.jsonl"), "{\"step\":1}\n").unwrap();
    assert_refused(&work.run_alone(&ALONE).await, 2, "already holds a run (metrics.jsonl)");
    let ended = work.run_alone(&["--world-size", "1", "--resume"]).await;
    assert_refused(&ended, 2, "holds no checkpoint to resume from");
    assert_eq!(work.rows("metrics.jsonl").len(), 1);

    let coordinator = work.start(&["--world-size", "1", "--overwrite"]).await;
    coordinator.join("a", 0).await.run().await;
    assert_eq!(coordinator.end().await.status, Some(0));
    assert_eq!(work.rows("metrics.jsonl").len(), 1);
    assert_eq!(work.rows("metrics.jsonl")[0]["num_tokens"], 120);
}

#[tokio::test]
async fn output_folder_that_cannot_be_made_is_named() {
    let work = Workspace::new(3, 0, "");
    std::fs::write(work.path("out"), "a file").unwrap();
    assert_refused(&work.run_alone(&ALONE).await, 2, "cannot write output_dir /");
}

/// The earlier run must survive: nothing may be removed for a run that cannot start.
#[tokio::test]
async fn taken_port_is_named_and_nothing_is_overwritten() {
    let work = Workspace::new(3, 0, "");
    std::fs::create_dir_all(work.path("out/final")).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = work.run_alone(&["--world-size", "1", "--overwrite", "--listen", &address]).await;
    assert_refused(&ended, 3, &format!("error: cannot listen on {address}: address already in use"));
    assert!(work.path("out/final").exists());
}

/// Writes a training file of 400 MiB, so that the test can act while the coordinator reads it.
fn much_data(work: &Workspace) -> std::path::PathBuf {
    let path = work.path("train.jsonl");
    let pairs = std::fs::read(&path).unwrap();
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    for _ in 0..(400 << 20) / pairs.len() {
        file.write_all(&pairs).unwrap();
    }
    file.into_inner().unwrap();
    path
}

/// Waits until the process has the file open.
async fn opened(pid: u32, path: &std::path::Path) {
    let opened = || {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file == path)
    };
    let until = async {
        while !opened() {
            tokio::task::yield_now().await;
        }
    };
    support::soon("the data to be read", until).await;
}

#[tokio::test]
async fn a_signal_while_the_data_is_read_stops_the_coordinator() {
    let work = Workspace::new(3, 0, "");
    let data = much_data(&work);
    for (signal, status) in [("TERM", "stopped  by SIGTERM"), ("INT", "stopped  by SIGINT")] {
        let child = work.command(&ALONE).spawn().unwrap();
        let pid = child.id().unwrap();
        opened(pid, &data).await;
        let kill =
            std::process::Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status();
        assert!(kill.unwrap().success());
        let ended = Ended::of(child).await;
        assert_eq!((ended.status, ended.stdout.as_str()), (Some(130), ""), "{}", ended.stderr);
        assert_eq!(ended.report(), format!("{status}\n"));
    }
    assert!(nothing_made(&work));
}

#[tokio::test]
async fn health_checks_report_when_the_coordinator_serves() {
    let work = Workspace::new(3, 0, "");
    much_data(&work);
    let mut command = work.command(&["--world-size", "1", "--health-listen", "127.0.0.1:0"]);
    let mut child = command.spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("health checks address=") {
        line.clear();
        assert!(support::soon("the port of the probes", log.read_line(&mut line)).await.unwrap() > 0);
    }
    let address = line.rsplit("address=").next().unwrap().trim().trim_matches('"');
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut probe = HealthClient::new(endpoint.connect().await.unwrap());
    let mut status = async |service: &str| {
        let answer = probe.check(HealthCheckRequest { service: service.into() }).await;
        answer.map(|answer| answer.into_inner().status()).map_err(|status| status.code())
    };
    assert_eq!(status("").await, Ok(ServingStatus::NotServing));
    assert_eq!(status("dyad.v1.Coordinator").await, Ok(ServingStatus::NotServing));
    assert_eq!(status("another").await, Err(tonic::Code::NotFound));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut announced = String::new();
    support::soon("the coordinator to listen", stdout.read_line(&mut announced)).await.unwrap();
    let serving = async { while status("").await != Ok(ServingStatus::Serving) {} };
    support::soon("the coordinator to serve", serving).await;
    assert_eq!(status("dyad.v1.Coordinator").await, Ok(ServingStatus::Serving));
    // The coordinator's own port answers health checks too.
    let announced: serde_json::Value = serde_json::from_str(&announced).unwrap();
    let url = format!("http://{}", announced["listening"].as_str().unwrap());
    let endpoint = Endpoint::from_shared(url).unwrap();
    let mut probe = HealthClient::new(endpoint.connect().await.unwrap());
    let answer = probe.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
}

#[tokio::test]
async fn help_explains_every_flag_and_exit_status() {
    let ended = Workspace::new(1, 0, "").run_alone(&["--help"]).await;
    assert_eq!(ended.status, Some(0));
    for word in [
        "--world-size",
        "--listen",
        "--resume",
        "--overwrite",
        "--join-timeout-seconds",
        "--tls-dir",
        "--token-file",
        "--insecure",
        "--health-listen",
        "Exit status",
        "130",
    ] {
        assert!(ended.stdout.contains(word), "{word}");
    }
}

/// With JSON logs, every line on standard error must be JSON, the final error too.
#[tokio::test]
async fn the_final_error_is_json_with_json_logs() {
    let work = Workspace::new(3, 0, "learning_rat = 1.0");
    let ended = work.run_alone(&["--world-size", "1", "--log-format", "json"]).await;
    assert_eq!(ended.status, Some(2));
    let lines: Vec<serde_json::Value> =
        ended.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!((&last["level"], &last["target"]), (&"ERROR".into(), &"coordinator".into()));
    let said = &last["fields"];
    assert!(said["message"].as_str().unwrap().ends_with("unknown config key `learning_rat`"), "{said}");
    assert_eq!(said["hint"], "did you mean `learning_rate`?");
    assert_eq!(said["exit_status"], 2);
}
