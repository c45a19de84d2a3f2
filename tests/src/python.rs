//! The Python scripts in `tests/parity`, which ask TRL, transformers and PEFT. They run in one server per test program
//! (`tests/parity/serve.py`), because importing these libraries takes longer than most scripts.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};

use serde_json::{Value, json};

use crate::{Workspace, root};

/// The server; it ends when its standard input is closed, at the latest with this program.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
}

static SERVER: OnceLock<Mutex<Option<Server>>> = OnceLock::new();

/// The interpreter of the environment with TRL.
#[must_use]
pub fn interpreter() -> PathBuf {
    let python = root().join(".venv/parity/bin/python");
    assert!(python.is_file(), "no Python environment with TRL; run `make test`");
    python
}

/// Starts the server if there is none; returns its socket.
fn socket() -> PathBuf {
    let mut server = SERVER.get_or_init(Mutex::default).lock().unwrap();
    let server = server.get_or_insert_with(|| {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(interpreter());
        command.arg(root().join("tests/parity/serve.py")).arg(dir.path().join("socket"));
        command.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "tests/parity/serve.py does not start");
        Server { child, dir }
    });
    assert!(server.child.try_wait().unwrap().is_none(), "tests/parity/serve.py has ended");
    server.dir.path().join("socket")
}

/// Runs a script of `tests/parity` in a workspace; returns its standard output. Fails if the script does.
pub fn python(script: &str, args: &[&str], workspace: &Workspace) -> String {
    let request = json!({ "script": script, "args": args, "cwd": workspace.path(".") });
    let mut stream = UnixStream::connect(socket()).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    let answer: Value = serde_json::from_str(&answer)
        .unwrap_or_else(|_| panic!("{script} {args:?}: its process died without an answer"));
    let said = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
    assert_eq!(answer["status"], 0, "{script} {args:?}\n{}{}", said("stdout"), said("stderr"));
    said("stdout")
}
