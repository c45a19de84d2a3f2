//! The tools of the observability tests, which `make test` installs.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::root;

/// Returns a file of the folder that `tests/observability/install.sh` fills.
pub fn tool(name: &str) -> PathBuf {
    let dir = std::env::var_os("DYAD_OBSERVABILITY_TOOLS");
    let path = dir.map_or_else(|| root().join(".tools/observability"), PathBuf::from).join(name);
    assert!(path.exists(), "{} is missing; run `make .tools/observability/.done`", path.display());
    path
}

/// Returns a free port.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Returns the body of a plain GET; `None` unless the status is 200.
pub fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
}

/// A running Prometheus server.
#[derive(Debug)]
pub struct Prometheus {
    process: Child,
    /// Port of its HTTP API.
    pub port: u16,
}

impl Prometheus {
    /// Scrapes `target` twice a second and evaluates the rules of a file.
    pub fn start(dir: &Path, target: u16, rules: &Path) -> Self {
        let config = format!(
            "global: {{ scrape_interval: 500ms, scrape_timeout: 400ms, evaluation_interval: 500ms }}\n\
             rule_files: [\"{}\"]\n\
             scrape_configs: [{{ job_name: dyad, static_configs: [{{ targets: [\"127.0.0.1:{target}\"] }}] }}]\n",
            rules.display()
        );
        std::fs::write(dir.join("prometheus.yml"), config).unwrap();
        let port = free_port();
        let mut command = Command::new(tool("prometheus/usr/bin/prometheus"));
        command.arg(format!("--config.file={}", dir.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        command.arg("--enable-feature=exemplar-storage").stdout(Stdio::null()).stderr(Stdio::null());
        Self { process: command.spawn().unwrap(), port }
    }

    /// Calls the API and returns the `data` of the answer.
    pub fn api(&self, path: &str, query: &str) -> Result<Value, String> {
        let path = format!("/api/v1/{path}?{}", encoded(query));
        // The status is not 200 if the expression does not parse.
        let body = get(self.port, &path).ok_or_else(|| format!("no answer to {path}"))?;
        let mut answer: Value = serde_json::from_str(&body).map_err(|error| error.to_string())?;
        Ok(answer["data"].take())
    }

    /// Runs an instant query and returns its values.
    pub fn query(&self, expression: &str) -> Result<Vec<f64>, String> {
        let data = self.api("query", &format!("query={expression}"))?;
        let result = data["result"].as_array().cloned().unwrap_or_default();
        Ok(result.iter().filter_map(|sample| sample["value"][1].as_str()?.parse().ok()).collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Percent-encodes the value of `key=value`.
fn encoded(query: &str) -> String {
    let Some((key, value)) = query.split_once('=') else { return String::new() };
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    format!("{key}={}", value.bytes().map(byte).collect::<String>())
}
