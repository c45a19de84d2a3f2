//! What is wrong before a trainer is there: one line of error, one hint, an exit status, and no port announced.

mod support;

use std::net::TcpListener;

use support::{Ended, Workspace};

const ALONE: [&str; 2] = ["--world-size", "1"];

/// Ended with this status and message, and never listened.
fn assert_refused(ended: &Ended, status: i32, expected: &str) {
    assert_eq!((ended.status, ended.stdout.as_str()), (Some(status), ""), "{}", ended.stderr);
    let report = ended.report();
    assert!(report.lines().next().unwrap_or("").contains(expected), "{}", ended.stderr);
    assert!(report.contains("\n\nhint: "), "{}", ended.stderr);
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
    assert!(!work.path("out").exists(), "nothing is made before the data is known to be good");
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
        "Exit status",
        "130",
    ] {
        assert!(ended.stdout.contains(word), "{word}");
    }
}
