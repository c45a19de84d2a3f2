//! Connection to an agent: sends requests, delivers replies, and detects a lost host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dyad_proto::Fault;
use dyad_proto::security::Proof;
use dyad_proto::wire::Failure;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::agent::machine::Hello;
use crate::agent::protocol::{Answer, Question, Reply, Request, StartProgram, decode, encode};
use crate::hosts::greeting::{hello, last_words, same_version, start, unreachable};
use crate::hosts::hostfile::Host;
use crate::hosts::transport::Transport;
use crate::process::end::{End, LINES};

/// How long to wait for the agent's greeting; long enough for a busy login node and a cold file system.
const HELLO: Duration = Duration::from_secs(60);
/// How long to wait for the end of an agent that was told to end.
const LEAVE: Duration = Duration::from_secs(5);

/// A connected agent.
#[derive(Debug)]
pub struct Agent {
    /// Its host.
    pub host: Host,
    /// Its greeting.
    pub hello: Hello,
    /// Seconds that the host's clock is ahead of this machine's, and the uncertainty in seconds.
    pub skew: (f64, f64),
    link: Arc<HostLink>,
    gone: watch::Receiver<bool>,
}

/// State that agent and connection tasks share.
#[derive(Debug)]
struct HostLink {
    requests: mpsc::UnboundedSender<Out>,
    state: Mutex<ConnectionState>,
}

#[derive(Debug)]
enum Out {
    Line(String),
    Close,
}

#[derive(Debug, Default)]
struct ConnectionState {
    next: u64,
    processes: HashMap<u64, Ends>,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    /// Why the connection ended; `None` while it is up.
    lost: Option<Fault>,
}

/// Channels for the output and end of a process.
#[derive(Debug)]
struct Ends {
    stdout: mpsc::Sender<String>,
    stderr: mpsc::Sender<String>,
    end: watch::Sender<Option<End>>,
}

/// A process that runs on another host.
#[derive(Debug)]
pub struct Remote {
    /// Its standard output.
    pub stdout: mpsc::Receiver<String>,
    /// Its standard error.
    pub stderr: mpsc::Receiver<String>,
    /// How it ended.
    pub end: watch::Receiver<Option<End>>,
    /// Signals to send to it.
    pub signals: mpsc::UnboundedSender<i32>,
}

impl Agent {
    /// Starts an agent with a shell command on the host, and waits for its greeting.
    pub async fn connect(
        host: &Host,
        transport: &Transport,
        line: &str,
        silence: Duration,
    ) -> Result<Self, Fault> {
        let began = crate::agent::machine::clock();
        let mut process = start(host, transport, line)?;
        let mut stderr = tokio::spawn(last_words(process.stderr.take()));
        let (Some(stdin), Some(stdout)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(Fault::failed(format!("host {host}: {} has no pipes", transport.name())));
        };
        let mut lines = BufReader::new(stdout).lines();
        let hello = handshake(host, transport, &mut lines, &mut process, &mut stderr).await?;
        same_version(host, &hello)?;
        let ended = crate::agent::machine::clock();
        let skew = (hello.clock - f64::midpoint(began, ended), (ended - began) / 2.0);
        let (requests, outgoing) = mpsc::unbounded_channel();
        let link = Arc::new(HostLink { requests, state: Mutex::default() });
        let writer = tokio::spawn(write(outgoing, stdin, silence / 4));
        let (tell, gone) = watch::channel(false);
        let reader = Reader { host: host.clone(), link: Arc::clone(&link), silence };
        tokio::spawn(async move {
            reader.read(lines, process, stderr).await;
            writer.abort();
            let _ = tell.send(true);
        });
        Ok(Self { host: host.clone(), hello, skew, link, gone })
    }

    /// Starts a program on the host.
    #[must_use]
    pub fn start(&self, mut start: StartProgram) -> Remote {
        let (stdout, stdout_lines) = mpsc::channel(LINES);
        let (stderr, stderr_lines) = mpsc::channel(LINES);
        let (end, ended) = watch::channel(None);
        let (signals, mut wanted) = mpsc::unbounded_channel();
        {
            let mut state = self.link.state();
            start.process = state.id();
            match &state.lost {
                Some(fault) => drop(end.send(Some(End::Lost(fault.clone())))),
                None => drop(state.processes.insert(start.process, Ends { stdout, stderr, end })),
            }
        }
        let (link, process) = (Arc::clone(&self.link), start.process);
        self.link.send(&Request::Start(start));
        tokio::spawn(async move {
            while let Some(signal) = wanted.recv().await {
                link.send(&Request::Signal { process, signal });
            }
        });
        Remote { stdout: stdout_lines, stderr: stderr_lines, end: ended, signals }
    }

    /// Sends a request and waits for the answer. [`Answer::Failed`] becomes an error that names the host.
    pub async fn ask(&self, question: Question) -> Result<Answer, Fault> {
        let (answer, answered) = oneshot::channel();
        {
            let mut state = self.link.state();
            if let Some(fault) = &state.lost {
                return Err(fault.clone());
            }
            let ask = state.id();
            state.answers.insert(ask, answer);
            drop(state);
            self.link.send(&Request::Ask { ask, question });
        }
        match answered.await {
            Ok(Answer::Failed(failure)) => Err(named(&self.host, failure)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.link.state().lost.clone().unwrap_or_else(|| Fault::lost("the agent ended"))),
        }
    }

    /// Stores a process's credentials on the host; returns their folder there.
    pub async fn keep(&self, process: &str, proof: Proof) -> Result<String, Fault> {
        match self.ask(Question::Keep { process: process.to_owned(), proof }).await? {
            Answer::Written(folder) => Ok(folder),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The error for an answer of the wrong type.
    #[must_use]
    pub fn unexpected(&self, answer: &Answer) -> Fault {
        Fault::failed(format!("host {}: unexpected answer {answer:?}", self.host))
            .hint("install one build everywhere, or copy this one with --push")
    }

    /// Why the host is lost; `None` if it is not.
    #[must_use]
    pub fn lost(&self) -> Option<Fault> {
        self.link.state().lost.clone()
    }

    /// Ends the agent, which kills its processes.
    pub async fn close(&self) {
        let _ = self.link.requests.send(Out::Close);
        let mut gone = self.gone.clone();
        // Ignore a timeout: the reader kills the connection of a silent host.
        let _ = tokio::time::timeout(LEAVE, gone.wait_for(|gone| *gone)).await;
    }
}

impl HostLink {
    fn state(&self) -> MutexGuard<'_, ConnectionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, request: &Request) {
        // Fails only if the host is lost, and then all waiters get that error.
        let _ = self.requests.send(Out::Line(encode(request)));
    }
}

impl ConnectionState {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// Waits for the agent's greeting; the error says why there is none.
async fn handshake(
    host: &Host,
    transport: &Transport,
    lines: &mut Lines<BufReader<ChildStdout>>,
    process: &mut Child,
    stderr: &mut JoinHandle<Vec<String>>,
) -> Result<Hello, Fault> {
    match tokio::time::timeout(HELLO, hello(lines)).await {
        Ok(Some(hello)) => Ok(hello),
        Ok(None) => {
            let status = process.wait().await.ok().and_then(|status| status.code());
            Err(unreachable(host, transport, status, &stderr.await.unwrap_or_default()))
        }
        Err(_) => {
            let message =
                format!("host {host} says nothing over {} for {} s", transport.name(), HELLO.as_secs());
            Err(Fault::unavailable(message).hint("try the same connection by hand"))
        }
    }
}

/// An agent's failure as an error that names the host.
fn named(host: &Host, failure: Failure) -> Fault {
    let fault = Fault::from(failure);
    Fault { message: format!("host {host}: {}", fault.message), ..fault }
}

/// Sends requests, and a ping at every interval.
async fn write(mut outgoing: mpsc::UnboundedReceiver<Out>, mut stdin: ChildStdin, every: Duration) {
    let mut pings = tokio::time::interval(every);
    loop {
        let line = tokio::select! {
            out = outgoing.recv() => match out {
                Some(Out::Line(line)) => line,
                // Returning closes the agent's standard input, so it ends.
                Some(Out::Close) | None => return,
            },
            _ = pings.tick() => encode(&Request::Ping),
        };
        if stdin.write_all(line.as_bytes()).await.is_err() {
            // The reader notices the broken connection too and reports it.
            return std::future::pending().await;
        }
    }
}

struct Reader {
    host: Host,
    link: Arc<HostLink>,
    silence: Duration,
}

impl Reader {
    async fn read(
        self,
        mut lines: Lines<BufReader<ChildStdout>>,
        mut process: Child,
        stderr: JoinHandle<Vec<String>>,
    ) {
        let silent = loop {
            match tokio::time::timeout(self.silence, lines.next_line()).await {
                Ok(Ok(Some(line))) => {
                    if let Some(reply) = decode(&line) {
                        self.deliver(reply).await;
                    }
                }
                Ok(_) => break false,
                Err(_) => break true,
            }
        };
        let reason = if silent {
            format!("no answer for {} s", self.silence.as_secs())
        } else {
            let words =
                tokio::time::timeout(LEAVE, stderr).await.ok().and_then(Result::ok).unwrap_or_default();
            let said = words.into_iter().rev().find(|line| !line.is_empty());
            said.map_or_else(|| "its agent ended".to_owned(), |said| format!("its agent ended: {said}"))
        };
        let _ = process.start_kill();
        let _ = process.wait().await;
        self.lose(&reason);
    }

    async fn deliver(&self, reply: Reply) {
        if let Reply::Line { process, stdout, text } = reply {
            return self.line(process, stdout, text).await;
        }
        let mut state = self.link.state();
        match reply {
            Reply::Ended { process, status } => {
                if let Some(ends) = state.processes.remove(&process) {
                    let _ = ends.end.send(Some(End::Status(status)));
                }
            }
            Reply::Unstarted { process, trouble } => {
                if let Some(ends) = state.processes.remove(&process) {
                    let _ = ends.end.send(Some(End::Lost(named(&self.host, trouble))));
                }
            }
            Reply::Answer { ask, answer } => {
                if let Some(waiting) = state.answers.remove(&ask) {
                    let _ = waiting.send(answer);
                }
            }
            Reply::Pong | Reply::Hello(_) | Reply::Line { .. } => {}
        }
    }

    /// Delivers a line. If the log's buffer is full, waits, which blocks the host's processes. Lines of standard output are dropped if its
    /// buffer is full: only the coordinator's few announcements are read from it.
    async fn line(&self, process: u64, stdout: bool, text: String) {
        let ends =
            self.link.state().processes.get(&process).map(|ends| (ends.stdout.clone(), ends.stderr.clone()));
        let Some((first, log)) = ends else { return };
        if stdout {
            let _ = first.try_send(text);
        } else {
            let _ = log.send(text).await;
        }
    }

    fn lose(&self, reason: &str) {
        let fault = Fault::lost(format!("host {} is cut off: {reason}", self.host)).hint(format!(
            "what ran there ends itself within {} s; continue with --resume, without that host or once it is back",
            self.silence.as_secs()
        ));
        let mut state = self.link.state();
        state.lost = Some(fault.clone());
        state.answers.clear();
        for (_, ends) in state.processes.drain() {
            let _ = ends.end.send(Some(End::Lost(fault.clone())));
        }
    }
}
