//! Refusals at the port and their messages; the run goes on after each of them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::SystemTime;

use dyad_proto::security::client::Access;
use dyad_proto::security::token::JoinToken;
use dyad_proto::security::{Material, Proof, SERVER_NAME};
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{Hello, TrainerMessage, WatchRunRequest};
use dyad_proto::{ErrorCode, Fault, MAX_REPORT_BYTES};
use support::authority::Authority;
use support::{Coordinator, Ended, Workspace, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const ALONE: [&str; 2] = ["--world-size", "1"];
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A coordinator that waits for one trainer of its authority.
async fn secured(work: &Workspace, authority: &Authority) -> Coordinator {
    let material = |name| authority.material(name);
    let theirs = [&material("trainer.dyad"), &material("launcher.dyad")];
    work.start_secured(&ALONE, &material(SERVER_NAME), theirs).await
}

/// Makes a call with this material; the error is the refusal.
async fn knock(address: &str, material: Option<Material>, call: Call) -> Result<(), Fault> {
    let access = Access::with(&format!("http://{address}"), material.map(Proof::from))?;
    let refused = |error: &(dyn std::error::Error + 'static)| {
        access.refusal(error).unwrap_or_else(|| Fault::unavailable(format!("{error:?}")))
    };
    let channel =
        soon("a connection", access.endpoint()?.connect()).await.map_err(|error| refused(&error))?;
    let mut client = CoordinatorClient::new(channel);
    let status = match call {
        Call::Train => {
            let nothing = access.request(tokio_stream::pending::<TrainerMessage>())?;
            soon("an answer", client.train(nothing)).await.err()
        }
        Call::Watch => soon("an answer", client.watch_run(access.request(WatchRunRequest {})?)).await.err(),
    };
    status.map_or(Ok(()), |status| Err(refused(&status)))
}

#[derive(Clone, Copy)]
enum Call {
    Train,
    Watch,
}

/// Runs one trainer to the end of the run; returns the coordinator's log.
async fn completes(coordinator: Coordinator) -> String {
    coordinator.join("node0-cpu", 0).await.run().await;
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    ended.stderr
}

/// Asserts that one line of the log contains all these words.
fn assert_logged(log: &str, words: &[&str]) {
    let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(found, "no line with {words:?} in:\n{log}");
}

#[tokio::test]
async fn a_run_over_tls_completes_and_can_be_watched() {
    let (work, authority) = (Workspace::new(8, 0, ""), Authority::new());
    let coordinator = secured(&work, &authority).await;
    let events = coordinator.watch();
    let log = completes(coordinator).await;
    assert!(events.await.unwrap().len() > 3);
    assert!(!log.contains(" WARN "), "{log}");
    assert!(!log.contains(&authority.token.text()[..32]), "the token is in the log");
}

#[tokio::test]
async fn bad_certificates_are_refused_and_the_run_completes() {
    let (work, authority) = (Workspace::new(4, 0, ""), Authority::new());
    let coordinator = secured(&work, &authority).await;
    let own = authority.material("trainer.dyad");
    let other = Material { ca_pem: own.ca_pem.clone(), ..Authority::new().material("trainer.dyad") };
    let cases = [
        (other, "certificate is of another authority"),
        (authority.expired("trainer.dyad"), "certificate has expired"),
        // A client must not use a coordinator's certificate.
        (authority.material(SERVER_NAME), "refuses this process's certificate"),
    ];
    for (material, expected) in cases {
        let fault = knock(&coordinator.address, Some(material), Call::Train).await.unwrap_err();
        assert!(fault.message.contains(expected), "expected {expected:?}: {fault:?}");
        assert_eq!(fault.code, ErrorCode::InvalidInput);
        assert!(!fault.hint.is_empty());
    }
    let log = completes(coordinator).await;
    assert_logged(&log, &["WARN", "connection refused", "peer=127.0.0.1:", "of another authority"]);
    assert_logged(&log, &["WARN", "connection refused", "peer=127.0.0.1:", "xpired"]);
}

/// A trainer sends its token only to a coordinator with a certificate of its run.
#[tokio::test]
async fn a_trainer_refuses_the_coordinator_of_another_run() {
    let (work, authority) = (Workspace::new(4, 0, ""), Authority::new());
    let coordinator = secured(&work, &authority).await;
    let stranger = Authority::new().material("trainer.dyad");
    let fault = knock(&coordinator.address, Some(stranger), Call::Train).await.unwrap_err();
    assert!(fault.message.contains("the coordinator's certificate is of another authority"), "{fault:?}");
    completes(coordinator).await;
}

#[tokio::test]
async fn no_certificate_and_the_wrong_scheme_are_refused() {
    let (work, authority) = (Workspace::new(4, 0, ""), Authority::new());
    let coordinator = secured(&work, &authority).await;
    // Plain text.
    let fault = knock(&coordinator.address, None, Call::Train).await.unwrap_err();
    assert!(fault.message.contains("it asks for TLS"), "{fault:?}");
    // Over TLS, without a certificate.
    let ca = tonic::transport::Certificate::from_pem(authority.material("x").ca_pem);
    let tls = tonic::transport::ClientTlsConfig::new().ca_certificate(ca).domain_name(SERVER_NAME);
    let url = format!("https://{}", coordinator.address);
    let endpoint = tonic::transport::Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap();
    if let Ok(channel) = endpoint.connect().await {
        let nothing = tokio_stream::pending::<TrainerMessage>();
        let status = soon("an answer", CoordinatorClient::new(channel).train(nothing)).await.unwrap_err();
        let fault = coordinator.trainers.refusal(&status).unwrap();
        assert!(fault.message.contains("wants a certificate"), "{fault:?}");
    }
    let log = completes(coordinator).await;
    assert_logged(&log, &["WARN", "connection refused", "peer=", "speaks plain text, and this port TLS"]);
    assert_logged(&log, &["WARN", "connection refused", "peer=", "no certificates"]);
}

#[tokio::test]
async fn a_tls_client_is_told_of_a_plain_port() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&ALONE).await;
    let material = Authority::new().material("trainer.dyad");
    let fault = knock(&coordinator.address, Some(material), Call::Train).await.unwrap_err();
    assert!(fault.message.ends_with("it does not speak TLS"), "{fault:?}");
    assert!(fault.hint.contains("DYAD_TLS_DIR") && fault.code == ErrorCode::InvalidInput, "{fault:?}");
    let log = completes(coordinator).await;
    assert_logged(&log, &["WARN", "connection refused", "peer=", "speaks TLS, and this port plain text"]);
}

#[tokio::test]
async fn roles_and_tokens_are_checked_at_every_call() {
    let (work, authority) = (Workspace::new(4, 0, ""), Authority::new());
    let coordinator = secured(&work, &authority).await;
    let (trainer, launcher) = (authority.material("trainer.dyad"), authority.material("launcher.dyad"));
    let wrong = Material { join_token: Authority::new().token.text().to_owned(), ..trainer.clone() };
    let cases = [
        (launcher, Call::Train, "needs a certificate for trainer.dyad"),
        (trainer, Call::Watch, "needs a certificate for launcher.dyad"),
        (wrong, Call::Train, "the join token is not this run's"),
    ];
    for (material, call, expected) in cases {
        let fault = knock(&coordinator.address, Some(material), call).await.unwrap_err();
        assert!(fault.message.contains(expected), "{fault:?}");
        assert_eq!(fault.code, ErrorCode::InvalidInput);
    }
    // The right certificate, and no token at all.
    let channel = coordinator.trainers.endpoint().unwrap().connect().await.unwrap();
    let nothing = tokio_stream::pending::<TrainerMessage>();
    let status = CoordinatorClient::new(channel).train(nothing).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::Unauthenticated, "no join token"));
    let log = completes(coordinator).await;
    for reason in ["trainer.dyad", "launcher.dyad", "not this run's", "no join token"] {
        assert_logged(&log, &["WARN", "call refused", "peer=127.0.0.1:", reason]);
    }
}

#[tokio::test]
async fn an_expired_token_is_refused() {
    let (work, mut authority) = (Workspace::new(4, 0, ""), Authority::new());
    authority.token = JoinToken::new([3; 32], SystemTime::now());
    let own = authority.material(SERVER_NAME);
    let (trainer, launcher) = (authority.material("trainer.dyad"), authority.material("launcher.dyad"));
    let args = ["--world-size", "1", "--join-timeout-seconds", "1"];
    let coordinator = work.start_secured(&args, &own, [&trainer, &launcher]).await;
    let fault = knock(&coordinator.address, Some(trainer), Call::Train).await.unwrap_err();
    assert!(fault.message.contains("the join token has expired"), "{fault:?}");
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(3));
    assert_logged(&ended.stderr, &["WARN", "call refused", "the join token has expired"]);
}

#[tokio::test]
async fn noise_and_truncated_frames_are_refused() {
    let (secured_work, plain_work) = (Workspace::new(4, 0, ""), Workspace::new(4, 0, ""));
    let plain = plain_work.start(&ALONE).await;
    let tls = secured(&secured_work, &Authority::new()).await;
    // A SETTINGS frame that says it is longer than it is, and one that no peer may send.
    let truncated = [PREFACE, &[0, 0, 60, 4, 0, 0, 0, 0, 0, 1, 2, 3]].concat();
    let absurd = [PREFACE, &[0xff, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 9]].concat();
    let client_hello = [&[0x16, 3, 1, 0x40, 0], &[0xaa; 300][..]].concat();
    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for bytes in
        [&truncated, &absurd, &client_hello, &noise, &b"GET / HTTP/1.1\r\n\r\n".to_vec(), &vec![0; 2]]
    {
        for address in [&plain.address, &tls.address] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // The other side may have hung up already.
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let _ = soon("the connection to end", stream.read_to_end(&mut Vec::new())).await;
        }
    }
    let (plain, tls) = (completes(plain).await, completes(tls).await);
    assert_logged(&plain, &["WARN", "connection refused", "peer=", "without a call that could be read"]);
    assert_logged(&tls, &["WARN", "peer=", "speaks plain text, and this port TLS"]);
    for log in [plain, tls] {
        assert_logged(&log, &["WARN", "peer=", "neither TLS nor HTTP/2"]);
        assert_logged(&log, &["WARN", "peer=", "it said nothing"]);
    }
}

/// A port scan in a loop.
#[tokio::test]
async fn a_repeated_refusal_is_one_line_and_a_count() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&ALONE).await;
    for _ in 0..50 {
        let mut stream = TcpStream::connect(&coordinator.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let _ = stream.shutdown().await;
        let _ = soon("the connection to end", stream.read_to_end(&mut Vec::new())).await;
    }
    let log = completes(coordinator).await;
    let said = log.lines().filter(|line| line.contains("neither TLS nor HTTP/2")).collect::<Vec<_>>();
    assert_eq!(said.len(), 2, "{log}");
    assert!(said[0].contains("connection refused peer="), "{}", said[0]);
    assert!(said[1].contains("connection refused again") && said[1].ends_with("times=49"), "{}", said[1]);
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&ALONE).await;
    let hello = Hello { name: "x".repeat(MAX_REPORT_BYTES + 1), ..Hello::default() };
    let cause = coordinator.join_as(hello).await.aborted().await;
    assert!(cause.message.contains("cannot be read") && cause.message.contains("too large"), "{cause:?}");
    let log = completes(coordinator).await;
    assert_logged(&log, &["WARN", "message refused", "peer=", "length too large", "16777216"]);
}

/// An unreadable message of a member is that member's failure.
#[tokio::test]
async fn an_unreadable_message_of_a_member_fails_the_run_and_names_it() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&["--world-size", "2"]).await;
    let mut first = coordinator.join("node0-cpu", 0).await;
    let second = coordinator.join("node1-cpu", 1).await;
    while !matches!(first.receive().await, Some(dyad_proto::wire::coordinator_message::Body::Assignment(_))) {
    }
    second.send(Up::Hello(Hello { name: "x".repeat(MAX_REPORT_BYTES + 1), ..Hello::default() }));
    let cause = first.aborted().await;
    let expected = "trainer rank 1 (node1-cpu) broke the protocol: it sent a message that cannot be read: ";
    assert!(cause.message.starts_with(expected), "{cause:?}");
    drop((first, second));
    assert_eq!(coordinator.end().await.status, Some(1));
}

/// Later connections are served while others never finish their handshakes; those are closed after a while.
#[tokio::test]
async fn unfinished_handshakes_do_not_block_other_connections() {
    let (work, authority) = (Workspace::new(4, 0, ""), Authority::new());
    let material = |name| authority.material(name);
    let theirs = [&material("trainer.dyad"), &material("launcher.dyad")];
    let coordinator = work.start_secured(&["--world-size", "2"], &material(SERVER_NAME), theirs).await;
    // 2 * 2 + 64 handshakes have room.
    let mut idle = Vec::new();
    for index in 0..69 {
        let mut stream = TcpStream::connect(&coordinator.address).await.unwrap();
        stream.write_all(&[0x16, 3, 1][..index % 4]).await.unwrap();
        idle.push(stream);
    }
    let first = coordinator.join("node0-cpu", 0).await;
    let mut end = Vec::new();
    for stream in &mut idle {
        let _ = soon("an unfinished handshake to be cut", stream.read_to_end(&mut end)).await;
    }
    let second = coordinator.join("node1-cpu", 1).await;
    tokio::join!(first.run(), second.run());
    let ended = coordinator.end().await;
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_logged(&ended.stderr, &["connection refused", "no call of it was admitted before 68 others came"]);
    assert_logged(&ended.stderr, &["connection refused", "no handshake within 10 s"]);
}

#[tokio::test]
async fn open_connections_are_limited_and_places_become_free_again() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&ALONE).await;
    let watch = async || {
        let endpoint = coordinator.launchers.endpoint().unwrap();
        let mut client = CoordinatorClient::new(endpoint.connect().await.map_err(|error| error.to_string())?);
        let call = coordinator.launchers.request(WatchRunRequest {}).unwrap();
        let events = soon("an answer", client.watch_run(call)).await;
        events.map_err(|status| status.to_string())
    };
    let mut watchers = Vec::new();
    for _ in 0..66 {
        watchers.push(watch().await.unwrap());
    }
    watch().await.unwrap_err();
    drop(watchers);
    soon("a place to come free", async { while watch().await.is_err() {} }).await;
    let log = completes(coordinator).await;
    assert_logged(&log, &["WARN", "call refused", "peer=", "too many connections are open"]);
}

/// Another user of the machine can find the port, but does not know the token.
#[tokio::test]
async fn peers_without_the_token_can_neither_join_nor_watch_nor_block_the_run() {
    let work = Workspace::new(4, 0, "");
    let coordinator = work.start(&ALONE).await;
    let nowhere = format!("{}1", coordinator.address);
    // No token is published for this address, so none is sent.
    let stranger = Access::new(&format!("http://{nowhere}"), None, None).unwrap();
    let wrong = JoinToken::new([8; 32], SystemTime::now() + std::time::Duration::from_secs(60));
    let wrong = Some(Proof::Token(wrong.text().to_owned()));
    let liar = Access::with(&format!("http://{}", coordinator.address), wrong).unwrap();
    for (access, reason) in [(&stranger, "no join token"), (&liar, "the join token is not this run's")] {
        let channel = coordinator.trainers.endpoint().unwrap().connect().await.unwrap();
        let mut client = CoordinatorClient::new(channel);
        let train = access.request(tokio_stream::pending::<TrainerMessage>()).unwrap();
        let watch = access.request(WatchRunRequest {}).unwrap();
        let refusals = [client.train(train).await.unwrap_err(), client.watch_run(watch).await.unwrap_err()];
        for status in refusals {
            assert_eq!((status.code(), status.message()), (tonic::Code::Unauthenticated, reason));
            let fault = liar.refusal(&status).unwrap();
            assert!(fault.hint.contains("DYAD_TOKEN_FILE"), "{fault:?}");
        }
    }
    // More connections than there are places: half of them make a health check, half make no call.
    let mut strangers = Vec::new();
    for index in 0..90 {
        let endpoint = coordinator.trainers.endpoint().unwrap();
        let channel = endpoint.connect().await.unwrap();
        if index % 2 == 0 {
            let mut probe = tonic_health::pb::health_client::HealthClient::new(channel.clone());
            probe.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
        }
        strangers.push(channel);
    }
    let events = coordinator.watch();
    let log = completes(coordinator).await;
    assert!(events.await.unwrap().len() > 3);
    assert_logged(&log, &["WARN", "call refused", "peer=127.0.0.1:", "no join token"]);
    assert_logged(&log, &["WARN", "call refused", "peer=127.0.0.1:", "not this run's"]);
}

/// A process with the token file can take part. The token is neither in the arguments nor in the log.
#[tokio::test]
async fn the_token_file_gives_access() {
    let work = Workspace::new(4, 0, "");
    let token = JoinToken::lasting().unwrap();
    let proof = Proof::Token(token.text().to_owned());
    proof.write(&work.path("token")).unwrap();
    let file = work.path("token/join-token");
    let mut command = work.command(&ALONE);
    command.args(["--token-file", file.to_str().unwrap()]);
    let mut coordinator = work.start_as(command, None).await;
    // A given token is not published.
    let status = knock(&coordinator.address, None, Call::Train).await.unwrap_err();
    assert!(status.message.ends_with("no join token"), "{status:?}");
    coordinator.trainers = Access::with(&format!("http://{}", coordinator.address), Some(proof)).unwrap();
    let argv = std::fs::read_to_string(format!("/proc/{}/cmdline", coordinator.pid())).unwrap();
    assert!(argv.contains("token-file") && !argv.contains(&token.text()[..32]), "{argv}");
    let log = completes(coordinator).await;
    assert!(!log.contains(&token.text()[..32]), "the token is in the log");
}

#[tokio::test]
async fn plain_text_beyond_loopback_needs_insecure() {
    let work = Workspace::new(4, 0, "");
    let ended: Ended = work.run_alone(&["--world-size", "1", "--listen", "0.0.0.0:0"]).await;
    assert_eq!(ended.status, Some(2), "{}", ended.stderr);
    assert!(ended.report().starts_with("error: refusing to listen on 0.0.0.0:"), "{}", ended.stderr);
    assert!(
        ended.report().contains("--insecure") && ended.report().contains("DYAD_TLS_DIR"),
        "{}",
        ended.stderr
    );
    assert!(!work.path("out/metrics.jsonl").exists(), "nothing is begun");
    let coordinator = work.start(&["--world-size", "1", "--listen", "0.0.0.0:0", "--insecure"]).await;
    let log = completes(coordinator).await;
    assert_logged(&log, &["WARN", "anybody who reaches this port"]);
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_named() {
    let (work, authority) = (Workspace::new(4, 0, ""), Authority::new());
    let good = authority.material(SERVER_NAME);
    let other = authority.material(SERVER_NAME);
    let cases = [
        (Material { ca_pem: "none".into(), ..good.clone() }, "ca.pem holds no certificate"),
        (Material { cert_pem: String::new(), ..good.clone() }, "cert.pem holds no certificate"),
        (Material { key_pem: other.key_pem, ..good.clone() }, "cert.pem and key.pem: "),
        (Material { join_token: "secret".into(), ..good }, "join-token: not a join token"),
    ];
    for (index, (material, expected)) in cases.into_iter().enumerate() {
        let dir = work.path(&format!("tls{index}"));
        material.write(&dir).unwrap();
        let ended = work.run_alone(&["--world-size", "1", "--tls-dir", dir.to_str().unwrap()]).await;
        assert_eq!(ended.status, Some(2), "{}", ended.stderr);
        assert!(ended.report().contains(expected), "{}", ended.stderr);
        assert!(ended.report().contains("\n\nhint: "), "{}", ended.stderr);
    }
}
