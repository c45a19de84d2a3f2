//! Metrics and status of a run over HTTP, with a real coordinator process and scripted trainers.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use dyad_coordinator::observe::endpoint::MOST;
use dyad_proto::ErrorCode;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{GpuReading, Heartbeat, Phase};
use support::{Coordinator, Workspace, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Makes an HTTP request; returns status line, headers and body.
async fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// The answer of `/metrics` without the label `run`, whose value is different in every test run.
async fn scrape(address: &str) -> String {
    let answer = get(address, "/metrics").await;
    let Some((before, rest)) = answer.split_once("run=\"") else { return answer };
    let run = format!("run=\"{}\"", rest.split('"').next().unwrap());
    assert!(before.contains("\ndyad_coordinator_done "), "{answer}");
    answer.replace(&format!("{{{run}}}"), "").replace(&format!("{run},"), "")
}

/// Trains with one trainer to the end of the run; returns once the coordinator serves only scrapers.
async fn train(coordinator: &Coordinator) {
    coordinator.join("node0-cpu", 0).await.run().await;
    let closed = async { while TcpStream::connect(&coordinator.address).await.is_ok() {} };
    soon("the coordinator's own port to close", closed).await;
}

fn signal(coordinator: &Coordinator, name: &str) {
    let kill = std::process::Command::new("kill").args([name, &coordinator.pid().to_string()]).status();
    assert!(kill.unwrap().success());
}

#[tokio::test]
async fn metrics_are_served_from_the_start() {
    let work = Workspace::new(9, 0, "shuffle = false");
    let args = ["--world-size", "2", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", "0"];
    let coordinator = work.start(&args).await;
    let address = coordinator.metrics.clone().unwrap();
    let early = scrape(&address).await;
    assert!(early.contains(" 200 OK") && early.contains("application/openmetrics-text"), "{early}");
    assert!(early.contains("\ndyad_trainers 0\n") && early.contains("\ndyad_world_size 2\n"), "{early}");
    assert!(!early.contains("\ndyad_loss "), "nothing is known of a loss yet");
    assert!(early.ends_with("# EOF\n"));

    let mut first = coordinator.join("node0-cpu", 0).await;
    let mut second = coordinator.join("node1-cpu", 1).await;
    tokio::join!(first.train_until(1), second.train_until(1));
    coordinator.recorded(1).await;
    first.heartbeat(Phase::Training, 1);
    // Watchers get a row before the metrics count it.
    let counted = async {
        loop {
            let text = scrape(&address).await;
            if text.contains("\ndyad_steps_total 1\n") {
                return text;
            }
        }
    };
    let text = soon("the step to be counted", counted).await;
    for line in [
        "dyad_trainers 2",
        "dyad_step 1.0",
        "dyad_steps_total 1",
        "dyad_pairs_total 4",
        "dyad_planned_steps 2.0",
    ] {
        assert!(text.contains(&format!("\n{line}\n")), "no {line} in {text}");
    }
    assert!(text.contains("\ndyad_heartbeat_age_seconds{rank=\"1\"} "), "{text}");
    // Rank 0 takes 0.5 s, rank 1 takes 1 s: the step counts as long as its slowest rank.
    assert!(text.contains("\ndyad_step_duration_seconds_sum 1.0\n"), "{text}");
    drop((first, second));
    assert_eq!(coordinator.end().await.status, Some(1));
}

#[tokio::test]
async fn status_is_served_as_json() {
    let work = Workspace::new(9, 0, "shuffle = false");
    let args = ["--world-size", "1", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", "3600"];
    let coordinator = work.start(&args).await;
    let address = coordinator.metrics.clone().unwrap();
    let status = async || {
        let answer = get(&address, "/status").await;
        assert!(answer.contains(" 200 OK") && answer.contains("application/json"), "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str::<serde_json::Value>(body).unwrap()
    };
    assert_eq!(status().await["step"], serde_json::Value::Null);
    let mut trainer = coordinator.join("node0-cpu", 0).await;
    trainer.train_until(1).await;
    coordinator.recorded(1).await;
    let now = status().await;
    assert_eq!(
        (&now["phase"], &now["step"], &now["total_steps"]),
        (&"training".into(), &1.into(), &2.into())
    );
    assert_eq!(now["world_size"], 1);
    assert!(now["metrics"]["loss"].is_f64(), "{now}");
    drop(trainer);
    let failed = async {
        loop {
            let now = status().await;
            if now["phase"] == "failed" {
                return now;
            }
        }
    };
    let failed = soon("the end to be told", failed).await;
    assert_eq!(failed["error_code"], "ERROR_CODE_FAILED", "{failed}");
}

#[tokio::test]
async fn a_metrics_port_that_is_taken_is_named_with_its_flag() {
    let work = Workspace::new(9, 0, "");
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = work.run_alone(&["--world-size", "1", "--metrics-listen", &address]).await;
    assert_eq!(ended.status, Some(3));
    assert!(
        ended.report().contains(&address) && ended.report().contains("--metrics-listen"),
        "{}",
        ended.stderr
    );
}

/// Idle connections neither keep a scraper out nor pile up.
#[tokio::test]
async fn the_metrics_port_closes_idle_connections_for_new_ones() {
    let work = Workspace::new(9, 0, "");
    let coordinator = work.start(&["--world-size", "1", "--metrics-listen", "127.0.0.1:0"]).await;
    let address = coordinator.metrics.clone().unwrap();
    let mut idle = Vec::new();
    for _ in 0..3 * MOST {
        idle.push(TcpStream::connect(&address).await.unwrap());
    }
    assert!(soon("a scrape", scrape(&address)).await.contains(" 200 OK"));
    let mut byte = [0];
    for stream in &mut idle[..2 * MOST] {
        let closed = soon("an idle connection to be closed", stream.read(&mut byte)).await;
        assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    }
}

/// The last scrape must show the end of the run, whenever the scraper comes.
#[tokio::test]
async fn metrics_are_served_until_the_end_of_the_run_is_scraped() {
    let work = Workspace::new(9, 0, "");
    let args = ["--world-size", "1", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", "3600"];
    let coordinator = work.start(&args).await;
    let address = coordinator.metrics.clone().unwrap();
    let early = scrape(&address).await;
    let said = |text: &str, lines: [&str; 3]| {
        for line in lines {
            assert!(text.contains(&format!("\n{line}\n")), "no {line} in {text}");
        }
    };
    let running =
        ["dyad_coordinator_done 0", "dyad_coordinator_failed 0", "dyad_run_state{state=\"running\"} 1"];
    said(&early, running);
    train(&coordinator).await;
    // A launcher sends SIGQUIT to the coordinator of a failed run; it must not end the wait for the last scrape.
    signal(&coordinator, "-QUIT");
    let late = scrape(&address).await;
    let complete =
        ["dyad_coordinator_done 1", "dyad_coordinator_failed 0", "dyad_run_state{state=\"complete\"} 1"];
    said(&late, complete);
    assert!(late.contains("\ndyad_step 2.0\n"), "{late}");
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

/// The metrics were never scraped, or linger is 0: if the coordinator waited for an hour, the test would time out.
#[tokio::test]
async fn there_is_no_wait_for_a_scrape_without_earlier_scrapes_or_with_linger_0() {
    for (scraped, linger) in [(false, "3600"), (true, "0")] {
        let work = Workspace::new(9, 0, "");
        let args = ["--world-size", "1", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", linger];
        let coordinator = work.start(&args).await;
        if scraped {
            scrape(&coordinator.metrics.clone().unwrap()).await;
        }
        train(&coordinator).await;
        assert_eq!(coordinator.end().await.status, Some(0), "{scraped} {linger}");
    }
}

#[tokio::test]
async fn a_signal_ends_the_wait_for_a_last_scrape_and_the_folder_is_free_before() {
    let work = Workspace::new(9, 0, "");
    let args = ["--world-size", "1", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", "3600"];
    let coordinator = work.start(&args).await;
    let metrics = coordinator.metrics.clone().unwrap();
    scrape(&metrics).await;
    train(&coordinator).await;
    // The next run can take the folder meanwhile.
    let next = work.start(&["--world-size", "1", "--overwrite"]).await;
    signal(&next, "-INT");
    assert_eq!(next.end().await.status, Some(130));
    let pid = coordinator.pid().to_string();
    let ended = coordinator.end();
    let insisting = async {
        // Repeated, because the first signal may come before the coordinator watches for it.
        loop {
            let _ = std::process::Command::new("kill").args(["-TERM", &pid]).status();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let ended = tokio::select! {
        ended = ended => ended,
        () = insisting => unreachable!(),
    };
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
}

#[tokio::test]
async fn a_run_that_failed_says_so_in_the_last_scrape() {
    let work = Workspace::new(9, 0, "");
    let args = ["--world-size", "1", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", "3600"];
    let coordinator = work.start(&args).await;
    let address = coordinator.metrics.clone().unwrap();
    scrape(&address).await;
    let trainer = coordinator.join("node0-cpu", 0).await;
    trainer.fail(ErrorCode::Failed, "out of luck");
    let told = async {
        loop {
            let text = scrape(&address).await;
            if text.contains("\ndyad_coordinator_done 1\n") {
                return text;
            }
        }
    };
    let text = soon("the end of the run", told).await;
    drop(trainer);
    for line in [
        "dyad_coordinator_failed 1",
        "dyad_run_state{state=\"failed\"} 1",
        "dyad_failures_total{reason=\"failed\"} 1",
    ] {
        assert!(text.contains(&format!("\n{line}\n")), "no {line} in {text}");
    }
    assert_eq!(coordinator.end().await.status, Some(1));
}

/// NVML readings in heartbeats appear as metrics, with the names that the dashboard uses. A rank without a reading has no values.
#[tokio::test]
async fn gpu_readings_of_heartbeats_are_metrics_with_the_dashboards_names() {
    let work = Workspace::new(9, 0, "");
    let args = ["--world-size", "2", "--metrics-listen", "127.0.0.1:0", "--metrics-linger", "0"];
    let coordinator = work.start(&args).await;
    let address = coordinator.metrics.clone().unwrap();
    let mut first = coordinator.join("node0-gpu0", 0).await;
    let mut second = coordinator.join("node1-cpu", 1).await;
    tokio::join!(first.train_until(1), second.train_until(1));
    let gpu = Some(GpuReading {
        gpu: "GPU-5a1b".into(),
        memory_used_bytes: Some(3 << 30),
        memory_total_bytes: Some(80 << 30),
        utilization_ratio: Some(0.97),
        power_watts: Some(612.5),
    });
    first.send(Up::Heartbeat(Heartbeat { gpu, ..Heartbeat::default() }));
    second.heartbeat(Phase::Training, 1);
    let shown = async {
        loop {
            let text = scrape(&address).await;
            if text.contains("\ndyad_gpu_power_watts{") {
                return text;
            }
        }
    };
    let text = soon("the reading", shown).await;
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("dyad_gpu_")).collect();
    let labels = "{rank=\"0\",gpu=\"GPU-5a1b\"}";
    let expected = [
        format!("dyad_gpu_memory_used_bytes{labels} {}.0", 3_u64 << 30),
        format!("dyad_gpu_memory_total_bytes{labels} {}.0", 80_u64 << 30),
        format!("dyad_gpu_utilization_ratio{labels} 0.97"),
        format!("dyad_gpu_power_watts{labels} 612.5"),
    ];
    assert_eq!(lines, expected);

    let dashboard = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/observability/grafana/dashboards/dyad-performance.json"
    );
    let dashboard = std::fs::read_to_string(dashboard).unwrap();
    let asked: std::collections::BTreeSet<&str> = dashboard
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("dyad_gpu_"))
        .collect();
    assert_eq!(asked.len(), expected.len());
    assert!(asked.iter().all(|name| text.contains(&format!("\n{name}{{"))), "{asked:?}");

    first.heartbeat(Phase::Training, 1);
    let gone = async { while scrape(&address).await.contains("\ndyad_gpu_") {} };
    soon("the end of the readings", gone).await;
    drop((first, second));
    assert_eq!(coordinator.end().await.status, Some(1));
}
