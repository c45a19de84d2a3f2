//! A model named by its hub id: downloaded once over the hub's own protocol, then found in the cache without a network.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;

use dyad_tests::{Workspace, text};

/// Serves one model folder as `org/tiny`, as the hub does: a listing, and files by byte range.
fn serve(model: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let model = model.clone();
            std::thread::spawn(move || answer(&stream, &model));
        }
    });
    address
}

fn answer(mut stream: &TcpStream, model: &Path) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: Vec<String> =
        lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let path = request.split_whitespace().nth(1).unwrap_or_default();
    let (status, extra, body) = if path == "/api/models/org/tiny/revision/main" {
        let names = std::fs::read_dir(model).unwrap().map(|entry| entry.unwrap().file_name());
        let files: Vec<_> =
            names.map(|name| serde_json::json!({ "rfilename": name.to_string_lossy() })).collect();
        (
            "200 OK",
            String::new(),
            serde_json::json!({ "siblings": files, "sha": "c0ffee" }).to_string().into_bytes(),
        )
    } else {
        let name = path.strip_prefix("/org/tiny/resolve/main/").unwrap_or("none");
        match std::fs::read(model.join(name)) {
            Ok(bytes) => part(name, &headers, &bytes),
            Err(_) => ("404 Not Found", String::new(), Vec::new()),
        }
    };
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn part(name: &str, headers: &[String], bytes: &[u8]) -> (&'static str, String, Vec<u8>) {
    let marks = format!("ETag: \"{name}\"\r\nX-Repo-Commit: c0ffee\r\nAccept-Ranges: bytes\r\n");
    let range = headers.iter().find_map(|line| line.strip_prefix("range: bytes="));
    let Some((first, last)) = range.and_then(|range| range.split_once('-')) else {
        return ("200 OK", marks, bytes.to_vec());
    };
    let first: usize = first.parse().unwrap();
    let last = last.parse().map_or(bytes.len() - 1, |last: usize| last.min(bytes.len() - 1));
    let range = format!("Content-Range: bytes {first}-{last}/{}\r\n", bytes.len());
    ("206 Partial Content", marks + &range, bytes[first..=last].to_vec())
}

fn launch(workspace: &Workspace, environment: &[(&str, &str)]) -> Output {
    let mut command = workspace.launcher(2, &["--set", "model=org/tiny", "--overwrite"]);
    command.env("HF_HOME", workspace.path("cache")).env_remove("HF_TOKEN").envs(environment.iter().copied());
    command.output().unwrap()
}

#[test]
fn a_hub_id_is_downloaded_once_and_then_found_offline() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::fs::rename(workspace.path("model"), workspace.path("served")).unwrap();
    let address = serve(workspace.path("served"));

    let offline = launch(&workspace, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.status.code(), Some(3), "{}", text(&offline));
    assert!(text(&offline).contains("org/tiny is not in the Hugging Face cache"), "{}", text(&offline));

    let first = launch(&workspace, &[("HF_ENDPOINT", &address)]);
    assert!(first.status.success(), "{}", text(&first));
    assert!(workspace.path("out/final/tokenizer.json").exists());

    let again = launch(&workspace, &[("HF_HUB_OFFLINE", "1")]);
    assert!(again.status.success(), "{}", text(&again));
}

#[test]
fn a_hub_that_does_not_have_the_model_says_so() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let address = serve(workspace.path("model"));
    let mut command = workspace.launcher(1, &["--set", "model=org/other"]);
    let output =
        command.env("HF_HOME", workspace.path("cache")).env("HF_ENDPOINT", address).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("error: ") && text(&output).contains("org/other"), "{}", text(&output));
}
