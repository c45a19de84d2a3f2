//! HTTP client of the hub: lists a repository and downloads its files.
//!
//! - DAT-H1: the token is sent only to the hub's own addresses, over TLS or to this machine, even after redirects.
//! - DAT-H2: a body is read up to its announced length, and no further.
//! - DAT-H3: a slow download continues; a download below [`SLOWEST`] bytes per second is given up.

use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use dyad_proto::Fault;
use serde::Deserialize;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use crate::alive;

use super::names::{RepoKind, etag, is_plain_component};
use super::settings::Settings;

/// Timeout for the connection, the answer, and each read of a body: the same as in huggingface_hub.
const PATIENCE: Duration = Duration::from_secs(10);
const REDIRECTS: usize = 5;
/// A download is given up after this many breaks in a row without a new byte.
const RETRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// A download with fewer bytes per second than this, over [`SLOW_FOR`], is given up: curl's --speed-limit and --speed-time.
const SLOWEST: u64 = 1024;
const SLOW_FOR: Duration = Duration::from_secs(300);
/// Largest listing in bytes: several hundred thousand files.
const LISTING_BYTES: u64 = 64 << 20;
/// Addresses of the hub, in addition to the endpoint from the environment.
const HUBS: [&str; 3] = ["https://huggingface.co", "https://hub-ci.huggingface.co", "https://hf.co"];

/// Why a request failed.
#[derive(Debug)]
pub(super) enum HubError {
    /// No usable answer; the caller falls back to the cache.
    Unanswered(String),
    /// The answer must not be used: an error.
    Wrong(String),
    /// The requested range is beyond the end of the file.
    Beyond,
    /// The download is too slow to finish.
    Slow(String),
}

/// The final address, the redirect answers on the way, and the final answer.
type Followed = (Uri, Vec<Response<Body>>, Response<Body>);

impl HubError {
    fn wrong(what: impl Into<String>) -> Self {
        Self::Wrong(what.into())
    }
}

/// The files of a repository at a commit.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub(super) sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    /// Names of the files, unchecked.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> + Clone {
        self.siblings.iter().map(|file| file.rfilename.as_str())
    }
}

/// Metadata of a file, read before its download.
#[derive(Debug)]
pub(super) struct Description {
    /// Identifies the content.
    pub(super) etag: String,
    /// Size in bytes.
    pub(super) size: u64,
    /// Final address of the file.
    from: Uri,
}

/// Client for requests to the hub.
pub(super) struct Client<'a> {
    settings: &'a Settings,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a Settings) -> Result<Self, Fault> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // `ask` follows redirects, because it must check each one.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(PATIENCE))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .accept_encoding("identity")
            .user_agent(concat!("dyad/", env!("CARGO_PKG_VERSION")))
            .build();
        let client = Self { settings, agent: config.into() };
        if settings.token.is_some() && !client.may_see_token(&client.address("")?) {
            let warning = "the hub's token is not sent: HF_ENDPOINT is in plain text and not on this machine";
            tracing::warn!(endpoint = settings.endpoint, "{warning}");
        }
        Ok(client)
    }

    /// Lists the files of a repository at a branch, tag or commit.
    pub(super) fn list(&self, kind: RepoKind, name: &str, revision: &str) -> Result<Listing, HubError> {
        let kind = kind.name();
        let address = self.valid(&format!("/api/{kind}/{name}/revision/{}", in_one(revision)))?;
        let (_, _, mut response) = self.ask(&address, None)?;
        let read = response.body_mut().with_config().limit(LISTING_BYTES).read_to_vec();
        let body = read.map_err(|error| HubError::Unanswered(error.to_string()))?;
        let listing: Listing = serde_json::from_slice(&body)
            .map_err(|error| HubError::wrong(format!("its listing cannot be read: {error}")))?;
        if !is_plain_component(&listing.sha) {
            return Err(HubError::wrong(format!("it names a commit {:?}, which is no commit", listing.sha)));
        }
        Ok(listing)
    }

    /// Reads the metadata of a listed file. Requests a range of one byte: the answer has the same headers as for HEAD, and also works
    /// with servers that do not support HEAD.
    pub(super) fn describe(
        &self,
        (kind, repository): (RepoKind, &str),
        revision: &str,
        commit: &str,
        name: &str,
    ) -> Result<Description, HubError> {
        // Models are at the top.
        let top = if kind == RepoKind::Model { "" } else { "/datasets" };
        let address =
            self.valid(&format!("{top}/{repository}/resolve/{}/{}", in_one(revision), escaped(name)))?;
        let answer = match self.ask(&address, Some(0..=0)) {
            // An empty file has no first byte.
            Err(HubError::Beyond) => self.ask(&address, None),
            answer => answer,
        };
        let (from, hops, response) = answer?;
        let header = |name: &str| hops.iter().chain([&response]).find_map(|hop| text(hop, name));
        let named = header("x-repo-commit").ok_or_else(|| {
            HubError::wrong(format!("{name} comes without a commit: is HF_ENDPOINT the address of a hub?"))
        })?;
        if named != commit {
            let what = format!(
                "{name} is of commit {named:?}, the listing of {commit}: the repository is changing now"
            );
            return Err(HubError::wrong(what));
        }
        let tag = header("x-linked-etag").or_else(|| header("etag")).unwrap_or_default();
        let etag = etag(&tag)
            .ok_or_else(|| HubError::wrong(format!("{name} has the ETag {tag:?}, which is not valid")))?;
        let linked = header("x-linked-size").and_then(|size| size.parse().ok());
        let size = linked
            .or_else(|| length(&response))
            .ok_or_else(|| HubError::wrong(format!("it does not say how large {name} is")))?;
        Ok(Description { etag: etag.to_owned(), size, from })
    }

    /// Appends the rest of a file after the `kept` bytes of an earlier download; resumes if the connection breaks.
    pub(super) fn fetch(&self, file: &Description, to: &mut File, kept: u64) -> Result<(), HubError> {
        let (mut done, mut most, mut left) = (kept, kept, RETRIES);
        let mut pace = DownloadPace::new(Instant::now());
        while done < file.size {
            let broke = match self.fetch_from(file, &mut done, &mut pace, to) {
                Err(HubError::Unanswered(why)) => why,
                other => {
                    other?;
                    continue;
                }
            };
            // A hub without range support starts from zero each time, so compare with the longest part so far.
            left = if done > most { RETRIES } else { left - 1 };
            most = most.max(done);
            if left == 0 {
                return Err(HubError::Unanswered(broke));
            }
            tracing::warn!(reason = broke, done, size = file.size, "the download broke off and goes on");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn fetch_from(
        &self,
        file: &Description,
        done: &mut u64,
        pace: &mut DownloadPace,
        to: &mut File,
    ) -> Result<(), HubError> {
        let failed = |error: std::io::Error| HubError::wrong(format!("cannot write it: {error}"));
        let (_, _, response) = self.ask(&file.from, Some(*done..=file.size - 1))?;
        let all = response.status() == 200;
        let range = text(&response, "content-range").unwrap_or_default();
        let expected = format!("bytes {done}-{}/{}", file.size - 1, file.size);
        if all {
            to.set_len(0).map_err(failed)?;
            *done = 0;
        } else if range != expected {
            return Err(HubError::wrong(format!("it was asked for {expected} and sent {range:?}")));
        }
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut piece = vec![0; 1 << 20];
        while *done < file.size {
            let most = usize::try_from(file.size - *done).unwrap_or(usize::MAX).min(piece.len());
            let read =
                body.read(&mut piece[..most]).map_err(|error| HubError::Unanswered(error.to_string()))?;
            if read == 0 {
                return Err(HubError::Unanswered("the connection was closed".into()));
            }
            to.write_all(&piece[..read]).map_err(failed)?;
            *done += read as u64;
            alive::advance();
            if !pace.takes(Instant::now(), read as u64) {
                let seconds = SLOW_FOR.as_secs();
                return Err(HubError::Slow(format!(
                    "it sends less than {SLOWEST} bytes a second for {seconds} s"
                )));
            }
        }
        match body.read(&mut piece[..1]) {
            Ok(more) if more > 0 => Err(HubError::wrong("it sends more than it announced")),
            _ => Ok(()),
        }
    }

    /// Sends a GET request and follows redirects.
    fn ask(&self, address: &Uri, range: Option<std::ops::RangeInclusive<u64>>) -> Result<Followed, HubError> {
        let (mut address, mut hops) = (address.clone(), Vec::new());
        loop {
            let mut request = self.agent.get(&address);
            if let Some(range) = &range {
                request = request.header("range", format!("bytes={}-{}", range.start(), range.end()));
            }
            if let Some(token) = self.settings.token.as_ref().filter(|_| self.may_see_token(&address)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| HubError::Unanswered(error.to_string()))?;
            let status = response.status();
            if !status.is_redirection() {
                return match status.is_success() {
                    true => Ok((address, hops, response)),
                    false => Err(refused(status.as_u16())),
                };
            }
            let location = text(&response, "location").unwrap_or_default();
            address = target(&address, &location).ok_or_else(|| {
                HubError::wrong(format!("it redirects to {location:?}, which is not allowed"))
            })?;
            hops.push(response);
            if hops.len() > REDIRECTS {
                return Err(HubError::wrong("it redirects too many times"));
            }
        }
    }

    fn address(&self, path: &str) -> Result<Uri, Fault> {
        let text = format!("{}{path}", self.settings.endpoint);
        text.parse().map_err(|_| {
            Fault::input(format!("HF_ENDPOINT {:?} is no address", self.settings.endpoint))
                .hint("it looks like https://huggingface.co")
        })
    }

    fn valid(&self, path: &str) -> Result<Uri, HubError> {
        self.address(path).map_err(|fault| HubError::Wrong(fault.message))
    }

    /// Whether the token may be sent: only to the hub's own addresses, over TLS or to this machine.
    fn may_see_token(&self, address: &Uri) -> bool {
        let hub = |hub: &str| hub.parse().is_ok_and(|hub: Uri| origin(&hub) == origin(address));
        let hidden = address.scheme_str() == Some("https") || is_loopback(address);
        hidden && HUBS.into_iter().chain([self.settings.endpoint.as_str()]).any(hub)
    }
}

/// Measures the speed of a download.
#[derive(Debug)]
struct DownloadPace {
    /// Start of the current interval.
    began: Instant,
    bytes: u64,
    last: Instant,
}

impl DownloadPace {
    fn new(now: Instant) -> Self {
        Self { began: now, bytes: 0, last: now }
    }

    /// Counts received bytes. Returns false if they were too few over [`SLOW_FOR`].
    fn takes(&mut self, now: Instant, bytes: u64) -> bool {
        // A read times out much earlier, so this process itself was stopped: start a new interval.
        if now.duration_since(self.last) > SLOW_FOR / 2 {
            *self = Self::new(now);
        }
        self.last = now;
        self.bytes += bytes;
        if now.duration_since(self.began) < SLOW_FOR {
            return true;
        }
        let enough = self.bytes >= SLOWEST * SLOW_FOR.as_secs();
        *self = Self::new(now);
        enough
    }
}

/// Converts an HTTP error status.
fn refused(status: u16) -> HubError {
    if status == 416 {
        return HubError::Beyond;
    }
    let why = match status {
        401 | 403 => "it asks for a token that may read it",
        404 => "it has no such repository, or not for this token",
        429 => "it was asked too often",
        500.. => "it has trouble of its own",
        _ => "it refuses",
    };
    HubError::Unanswered(format!("{why} (HTTP status {status})"))
}

fn text<T>(response: &Response<T>, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Size of the whole file in bytes, from an answer with or without a range.
fn length<T>(response: &Response<T>) -> Option<u64> {
    match text(response, "content-range") {
        Some(range) => range.rsplit_once('/')?.1.parse().ok(),
        None => text(response, "content-length")?.parse().ok(),
    }
}

/// Escapes a revision as one segment of a path, as huggingface_hub does.
fn in_one(revision: &str) -> String {
    escaped(revision).replace('/', "%2F")
}

fn escaped(name: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    name.bytes().map(byte).collect()
}

/// Scheme, host and port.
fn origin(address: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let usual = match address.scheme_str() {
        Some("https") => Some(443),
        Some("http") => Some(80),
        _ => None,
    };
    let host = address.host().map(str::to_ascii_lowercase);
    (address.scheme_str(), host, address.port_u16().or(usual))
}

fn is_loopback(address: &Uri) -> bool {
    let host = address.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The target of a redirect; `None` if it leads from TLS to plain text or from another machine to this one.
fn target(from: &Uri, location: &str) -> Option<Uri> {
    let absolute = match location.strip_prefix('/') {
        Some(rest) if !rest.starts_with('/') => {
            format!("{}://{}{location}", from.scheme_str()?, from.authority()?)
        }
        _ => location.to_owned(),
    };
    let to: Uri = absolute.parse().ok()?;
    let allowed = matches!((from.scheme_str()?, to.scheme_str()?), (_, "https") | ("http", "http"));
    (allowed && (is_loopback(from) || !is_loopback(&to))).then_some(to)
}

/// Describes a file that no server has.
#[cfg(test)]
pub(super) fn described(etag: &str, size: u64) -> Description {
    Description { etag: etag.to_owned(), size, from: Uri::from_static("https://nowhere.invalid/") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoint: &str) -> Settings {
        Settings { cache: "/c".into(), endpoint: endpoint.into(), offline: None, token: Some("hf_x".into()) }
    }

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn stalled_downloads_are_given_up_and_slow_ones_are_not() {
        let begin = Instant::now();
        let lasts = |bytes: u64, every: u64| {
            let mut pace = DownloadPace::new(begin);
            (1..=20 * 60 / every).all(|tick| pace.takes(begin + Duration::from_secs(tick * every), bytes))
        };
        assert!(lasts(SLOWEST * 9, 9) && lasts(1 << 20, 9) && lasts(SLOWEST, 1));
        assert!(!lasts(SLOWEST * 8, 9) && !lasts(1, 1));
        // The process was stopped, or its machine slept.
        let mut pace = DownloadPace::new(begin);
        assert!(pace.takes(begin + SLOW_FOR * 9, 1) && pace.takes(begin + SLOW_FOR * 10, 1));
    }

    /// A hub without range support sends the whole file for any range.
    #[test]
    fn downloads_resume_or_restart_if_the_hub_ignores_ranges() {
        let content = b"0123456789";
        for ranges in [true, false] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let serving = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = Vec::new();
                while !asked.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    asked.push(byte[0]);
                }
                let asked = String::from_utf8(asked).unwrap().to_lowercase();
                assert!(asked.contains("range: bytes=4-9"), "{asked}");
                let (head, body) = match ranges {
                    true => ("206 Partial Content\r\nContent-Range: bytes 4-9/10", &content[4..]),
                    false => ("200 OK", &content[..]),
                };
                let length = body.len();
                write!(stream, "HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
                    .unwrap();
                stream.write_all(body).unwrap();
            });
            let settings = settings(&endpoint);
            let file = Description { etag: "e".into(), size: 10, from: uri(&format!("{endpoint}/f")) };
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f");
            std::fs::write(&path, &content[..4]).unwrap();
            let mut to = File::options().append(true).open(&path).unwrap();
            Client::new(&settings).unwrap().fetch(&file, &mut to, 4).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), content);
            serving.join().unwrap();
        }
    }

    #[test]
    fn the_token_goes_only_to_the_hub_and_never_in_plain_text() {
        for (endpoint, address, sent) in [
            ("https://huggingface.co", "https://huggingface.co/api/x", true),
            ("https://huggingface.co", "https://HuggingFace.co:443/api/x", true),
            ("https://huggingface.co", "https://hf.co/x", true),
            ("https://huggingface.co", "https://huggingface.co:8443/x", false),
            ("https://huggingface.co", "http://huggingface.co/x", false),
            ("https://huggingface.co", "https://cdn-lfs.huggingface.co/x", false),
            ("https://huggingface.co", "https://huggingface.co.evil.example/x", false),
            ("https://mirror.example", "https://mirror.example/x", true),
            ("https://mirror.example", "https://huggingface.co/x", true),
            ("http://mirror.example", "http://mirror.example/x", false),
            ("http://127.0.0.1:9", "http://127.0.0.1:9/x", true),
            ("http://localhost:9", "http://localhost:9/x", true),
            ("http://127.0.0.1:9", "http://127.0.0.1:10/x", false),
            ("http://127.0.0.1.evil.example", "http://127.0.0.1.evil.example/x", false),
        ] {
            let settings = settings(endpoint);
            let client = Client::new(&settings).unwrap();
            assert_eq!(client.may_see_token(&uri(address)), sent, "{endpoint} -> {address}");
        }
    }

    #[test]
    fn redirects_to_plain_text_or_to_this_machine_are_refused() {
        let hub = uri("https://huggingface.co/a/b");
        let to = |from: &Uri, location: &str| target(from, location).map(|to| to.to_string());
        assert_eq!(to(&hub, "/api/x").as_deref(), Some("https://huggingface.co/api/x"));
        assert_eq!(to(&hub, "https://cdn.example/x?a=1").as_deref(), Some("https://cdn.example/x?a=1"));
        for evil in
            ["http://cdn.example/x", "file:///etc/passwd", "//evil.example/x", "", "x", "https://127.0.0.1/x"]
        {
            assert_eq!(to(&hub, evil), None, "{evil}");
        }
        assert!(to(&uri("http://127.0.0.1:9/x"), "http://127.0.0.1:10/y").is_some());
    }

    #[test]
    fn names_are_escaped_in_addresses() {
        assert_eq!(escaped("a b?#%/ü.json"), "a%20b%3F%23%25/%C3%BC.json");
    }
}
