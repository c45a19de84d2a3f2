//! A local HTTP server for tests of downloads: answers every request by a function, and remembers the requests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

/// A request without its body.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Headers with names in lower case.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    /// The path without its query.
    pub fn plain_path(&self) -> &str {
        self.path.split('?').next().unwrap_or_default()
    }

    /// A value of the query, with `%2F` and `%20` decoded.
    pub fn query(&self, name: &str) -> Option<String> {
        let query = self.path.split_once('?')?.1;
        let value = query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))?;
        Some(value.replace("%2F", "/").replace("%20", " "))
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code with its words.
    pub status: &'static str,
    /// Lines of headers, without `Content-Length`.
    pub headers: Vec<String>,
    /// The body; a `Range` of the request applies to it.
    pub body: Vec<u8>,
}

impl Answer {
    /// 404.
    pub fn none() -> Self {
        Self { status: "404 Not Found", headers: Vec::new(), body: Vec::new() }
    }

    /// 200 with a body.
    pub fn of(body: impl Into<Vec<u8>>) -> Self {
        Self { status: "200 OK", headers: Vec::new(), body: body.into() }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, line: impl Into<String>) -> Self {
        self.headers.push(line.into());
        self
    }

    /// Cuts the body to the range that the request asks for.
    #[must_use]
    fn in_range(mut self, request: &Request) -> Self {
        let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes="));
        let Some((first, last)) = range.and_then(|range| range.split_once('-')) else { return self };
        if self.status != "200 OK" || self.body.is_empty() {
            return self;
        }
        let first: usize = first.parse().unwrap();
        let last = last.parse().map_or(self.body.len() - 1, |last: usize| last.min(self.body.len() - 1));
        self.status = "206 Partial Content";
        self.headers.push(format!("Content-Range: bytes {first}-{last}/{}", self.body.len()));
        self.body = self.body[first..=last].to_vec();
        self
    }
}

/// A server that runs until the test ends.
#[derive(Clone, Debug)]
pub struct Server {
    /// `http://127.0.0.1:PORT`.
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Starts a server.
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { address, requests: Arc::default() };
        let requests = Arc::clone(&server.requests);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let first = lines.next().unwrap_or_default();
                let mut words = first.split(' ').map(str::to_owned);
                let headers = lines.take_while(|line| !line.is_empty());
                let headers = headers.filter_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    Some((name.to_lowercase(), value.trim().to_owned()))
                });
                let request = Request {
                    method: words.next().unwrap_or_default(),
                    path: words.next().unwrap_or_default(),
                    headers: headers.collect(),
                };
                let Answer { status, headers, body } = answer(&request).in_range(&request);
                let mut head =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
                headers.iter().for_each(|line| head += &format!("{line}\r\n"));
                let body = if request.method == "HEAD" { &[] } else { &body[..] };
                requests.lock().unwrap().push(request);
                let _ =
                    stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(body));
            }
        });
        server
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}
