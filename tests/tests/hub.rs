//! Models named by their hub id: downloaded once over the hub's protocol, then found in the cache without a network.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use dyad_tests::{Workspace, text};

/// Serves a model folder as `org/tiny` like the hub does: a listing, and files by byte range. Returns the address.
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
    let _ = stream.write_all(head.as_bytes());
    let slow = path.ends_with("model.safetensors") && body.len() > 1 && model.join("slow").exists();
    let pieces = if slow { 20 } else { 1 };
    for piece in body.chunks(body.len().div_ceil(pieces).max(1)) {
        if slow {
            // The test needs a slow download.
            std::thread::sleep(Duration::from_millis(500));
        }
        let _ = stream.write_all(piece);
    }
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

/// One trainer downloads the model, and the other waits for the download.
#[test]
fn a_slow_download_is_not_a_stall() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::fs::rename(workspace.path("model"), workspace.path("served")).unwrap();
    workspace.write("served/slow", "");
    let address = serve(workspace.path("served"));
    let mut command = workspace.launcher(2, &["--set", "model=org/tiny", "--stall-timeout", "4"]);
    command.env("HF_HOME", workspace.path("cache")).env_remove("HF_TOKEN").env("HF_ENDPOINT", address);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

/// Dyad uses the same variables as huggingface_hub.
#[test]
fn a_cached_model_is_found_by_every_variable_and_without_the_hub() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::fs::rename(workspace.path("model"), workspace.path("served")).unwrap();
    let address = serve(workspace.path("served"));
    let first = launch(&workspace, &[("HF_ENDPOINT", &address)]);
    assert!(first.status.success(), "{}", text(&first));
    let (home, hub) = (workspace.path("cache"), workspace.path("cache/hub"));
    let (home, hub) = (home.to_str().unwrap(), hub.to_str().unwrap());
    std::os::unix::fs::symlink(home, workspace.path("huggingface")).unwrap();
    let above = workspace.path(".");
    let nobody = ("HF_ENDPOINT", "http://127.0.0.1:9");
    for environment in [
        &[("HF_HOME", home), ("HF_HUB_OFFLINE", "YES"), nobody][..],
        &[("HF_HOME", home), ("TRANSFORMERS_OFFLINE", "1"), nobody],
        &[("HF_HUB_CACHE", hub), ("HF_HUB_OFFLINE", "1"), nobody],
        &[("XDG_CACHE_HOME", above.to_str().unwrap()), ("HF_HUB_OFFLINE", "on"), nobody],
        &[("HF_HOME", home), nobody],
    ] {
        let mut command = workspace.launcher(1, &["--set", "model=org/tiny", "--overwrite"]);
        for name in ["HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        let output = command.envs(environment.iter().copied()).output().unwrap();
        assert!(output.status.success(), "{environment:?}: {}", text(&output));
        let warned = text(&output).contains("the hub cannot be asked: the cached model is used");
        assert_eq!(
            warned,
            !environment.iter().any(|(name, _)| name.contains("OFFLINE")),
            "{}",
            text(&output)
        );
    }
    // An incomplete cache does not count as a model.
    let weights = workspace.path("cache/hub/models--org--tiny/snapshots/c0ffee/config.json");
    std::fs::remove_file(weights).unwrap();
    let output = launch(&workspace, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
}

/// Serves `reply(path)` for every request. Returns the address, and a channel of paths and `authorization` headers.
fn reply_with(
    reply: impl Fn(&str) -> (String, Vec<u8>) + Send + Sync + 'static,
) -> (String, std::sync::mpsc::Receiver<(String, Option<String>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (seen, requests) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
            let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let shown = headers.iter().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("authorization").then(|| value.to_owned())
            });
            let _ = seen.send((path.clone(), shown));
            let (head, body) = reply(&path);
            let head = format!("HTTP/1.1 {head}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    (address, requests)
}

/// File names from a hostile hub never lead outside the cache.
#[test]
fn a_hostile_hub_writes_nothing() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    std::fs::create_dir(workspace.path("victim")).unwrap();
    let victim = workspace.path("victim/planted");
    let up = "../".repeat(20);
    let out = format!("{up}{}", victim.display());
    let (absolute, deep) = (victim.display().to_string(), format!("model/{out}.safetensors"));
    let sha = "9".repeat(64);
    let usual = ("config.json", "c0ffee", "c0ffee", "tag", "is not used");
    for (file, commit, named, etag, expected) in [
        (usual.0, usual.1, usual.2, absolute.as_str(), "ETag"),
        (usual.0, usual.1, usual.2, out.as_str(), "ETag"),
        (deep.as_str(), usual.1, usual.2, usual.3, "no name of a file"),
        ("adapter_\u{1b}[2J", usual.1, usual.2, usual.3, "no name of a file"),
        (usual.0, out.as_str(), out.as_str(), usual.3, "no commit"),
        (usual.0, usual.1, out.as_str(), usual.3, "is of commit"),
        (usual.0, usual.1, usual.2, sha.as_str(), "SHA-256"),
    ] {
        let listing = serde_json::json!({ "siblings": [{ "rfilename": file }], "sha": commit }).to_string();
        let marks = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {named}\r\nContent-Range: bytes 0-1/2\r\n");
        let (address, _) = reply_with(move |path| match path.starts_with("/api/") {
            true => ("200 OK\r\n".into(), listing.clone().into_bytes()),
            false => (format!("206 Partial Content\r\n{marks}"), b"{}".to_vec()),
        });
        let output = launch(&workspace, &[("HF_ENDPOINT", &address)]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{etag} {file}: {said}");
        assert!(said.contains("the hub's answer is not used") && said.contains(expected), "{said}");
        assert!(!said.contains('\u{1b}'), "{said:?}");
        assert_eq!(std::fs::read_dir(workspace.path("victim")).unwrap().count(), 0, "{etag} {file}");
    }
}

/// The hub redirects downloads to other servers, which must not get the token.
#[test]
fn the_token_is_trimmed_and_only_sent_to_the_hub() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let (elsewhere, there) = reply_with(|_| ("404 Not Found\r\n".into(), Vec::new()));
    let location = format!("{elsewhere}/blob");
    let listing =
        serde_json::json!({ "siblings": [{ "rfilename": "config.json" }], "sha": "c0ffee" }).to_string();
    let (address, here) = reply_with(move |path| match path.starts_with("/api/") {
        true => ("200 OK\r\n".into(), listing.clone().into_bytes()),
        false => {
            let marks = "X-Linked-Etag: \"tag\"\r\nX-Linked-Size: 2\r\nX-Repo-Commit: c0ffee\r\n";
            (format!("302 Found\r\nLocation: {location}\r\n{marks}"), Vec::new())
        }
    });
    let output = launch(&workspace, &[("HF_ENDPOINT", &address), ("HF_TOKEN", " hf_abc\r\n")]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let (path, token) = there.try_recv().unwrap();
    assert_eq!((path.as_str(), token), ("/blob", None));
    let seen: Vec<_> = here.try_iter().collect();
    assert!(seen.len() >= 2, "{seen:?}");
    assert!(seen.iter().all(|(_, token)| token.as_deref() == Some("Bearer hf_abc")), "{seen:?}");
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
