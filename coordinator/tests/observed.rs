//! What a coordinator shows of a run to others: a real process, scripted trainers.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use dyad_coordinator::observe::endpoint::MOST;
use dyad_proto::wire::Phase;
use support::{Workspace, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_are_served_from_the_first_moment_on() {
    let work = Workspace::new(9, 0, "shuffle = false");
    let coordinator = work.start(&["--world-size", "2", "--metrics-listen", "127.0.0.1:0"]).await;
    let address = coordinator.metrics.clone().unwrap();
    let early = scrape(&address).await;
    assert!(early.contains(" 200 OK") && early.contains("application/openmetrics-text"), "{early}");
    assert!(early.contains("\ndyad_trainers 0\n") && early.contains("\ndyad_world_size 2\n"), "{early}");
    assert!(!early.contains("\ndyad_loss{"), "nothing is known of a loss yet");
    assert!(early.ends_with("# EOF\n"));

    let mut first = coordinator.join("node0-cpu", 0).await;
    let mut second = coordinator.join("node1-cpu", 1).await;
    tokio::join!(first.train_until(1), second.train_until(1));
    coordinator.recorded(1).await;
    first.heartbeat(Phase::Training, 1);
    // Watchers are told of a row before it is counted.
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
        "dyad_step{} 1.0",
        "dyad_steps_total 1",
        "dyad_pairs_total 4",
        "dyad_planned_steps 2.0",
    ] {
        assert!(text.contains(&format!("\n{line}\n")), "no {line} in {text}");
    }
    assert!(text.contains("\ndyad_heartbeat_age_seconds{rank=\"1\"} "), "{text}");
    // Half a second and a whole one: the step took what its slowest rank took.
    assert!(text.contains("\ndyad_step_duration_seconds_sum 1.0\n"), "{text}");
    drop((first, second));
    assert_eq!(coordinator.end().await.status, Some(1));
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

/// Strangers who hold connections and say nothing neither keep a scraper out nor pile up.
#[tokio::test]
async fn connections_that_say_nothing_make_way_at_the_metrics_port() {
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
