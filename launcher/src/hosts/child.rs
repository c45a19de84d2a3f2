//! Processes of a run, here or on another host: their logs, signals, ends and final error messages. They cannot outlive the launcher.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use dyad_proto::fault::Process;
use dyad_proto::{ErrorCode, Fault, ReportLine, grouped, plain, safe_file};
use futures::stream::FuturesUnordered;
use tokio::io::AsyncRead;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};

use crate::agent::protocol::StartProgram;
use crate::hosts::connection::{Agent, Remote};
use crate::process::end::{End, LINES};
use crate::process::log_allowance::{Allowance, LeftOut};
use crate::process::os::{die_with_me, each_line, end, raw_status};
use crate::process::programs::missing_hint;
use crate::show::console::{Console, Speaker};

/// Number of last lines to show of the process that failed first.
const TAIL: usize = 10;

/// A process of the run, on this machine or another.
#[derive(Debug)]
pub struct Child {
    /// Name in messages.
    pub label: String,
    /// Identity in the run.
    pub process: Process,
    stdout: Option<mpsc::Receiver<String>>,
    signals: SignalSender,
    end: watch::Receiver<Option<End>>,
    report: Arc<Mutex<ChildReport>>,
    log: Option<PathBuf>,
    /// Task that writes the log; `None` once [`Child::ended`] has joined it.
    writer: Option<tokio::task::JoinHandle<()>>,
}

/// Sends signals to a process while it runs; cheap to clone.
#[derive(Clone, Debug)]
pub struct SignalSender(mpsc::UnboundedSender<i32>);

impl SignalSender {
    /// Sends a signal, unless the process has ended.
    pub fn send(&self, signal: i32) {
        let _ = self.0.send(signal);
    }
}

/// A process's final error and hint, and its last log lines.
#[derive(Clone, Debug, Default)]
struct ChildReport {
    error: Option<String>,
    hint: String,
    tail: VecDeque<String>,
}

impl ChildReport {
    /// Records a line. Returns false for a log line, which the console may show; true for error, hint and empty lines.
    fn hears(&mut self, line: &str) -> bool {
        if let Some((error, hint)) = dyad_telemetry::read_last_words(line) {
            (self.error, self.hint) = (Some(error), hint);
        } else if let Some(said) = ReportLine::read(line) {
            match said {
                ReportLine::Error(words) | ReportLine::Stopped(words) => {
                    (self.error, self.hint) = (Some(words), String::new());
                }
                ReportLine::Hint(words) => self.hint = words,
            }
        } else if !line.trim().is_empty() {
            if self.tail.len() == TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(line.to_owned());
            return false;
        }
        true
    }
}

/// Where a child's lines go.
#[derive(Clone, Debug)]
pub struct ChildOutput {
    /// Log file; `None` for no log.
    pub file: Option<PathBuf>,
    /// Terminal.
    pub console: Console,
    /// Prefix of the lines on the terminal.
    pub speaker: Speaker,
}

impl Child {
    /// Starts a program. Must be called on the main thread: the kernel ties the parent-death signal to the calling thread.
    pub fn start(
        process: Process,
        label: &str,
        mut command: Command,
        output: ChildOutput,
    ) -> Result<Self, Fault> {
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stderr(Stdio::piped()).env("NO_COLOR", "1");
        die_with_me(&mut command);
        let report = Arc::default();
        let log = Log::create(output, Arc::clone(&report))?;
        let mut child = command.spawn().map_err(|error| {
            Fault::failed(format!("cannot start {program}: {error}")).hint(missing_hint())
        })?;
        let (stdout_lines, stdout) = mpsc::channel(LINES);
        let (stderr_lines, stderr) = mpsc::channel(LINES);
        let pipes = [
            child.stdout.take().map(|stream| tokio::spawn(pass_on(stream, stdout_lines))),
            child.stderr.take().map(|stream| tokio::spawn(pass_on(stream, stderr_lines))),
        ];
        let (signals, wanted) = mpsc::unbounded_channel();
        let (tell, end) = watch::channel(None);
        tokio::spawn(async move {
            let status = reap(child, wanted).await;
            for pipe in pipes.into_iter().flatten() {
                let _ = pipe.await;
            }
            let _ = tell.send(Some(End::Status(status)));
        });
        Ok(Self::follow(process, label, log, report, Remote { stdout, stderr, end, signals }))
    }

    /// Starts a program of Dyad on another host: its own copy there, with the command's arguments and variables.
    pub fn start_there(
        process: Process,
        label: &str,
        agent: &Agent,
        command: &Command,
        cores: &[usize],
        output: ChildOutput,
    ) -> Result<Self, Fault> {
        let command = command.as_std();
        let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        let program = Path::new(command.get_program()).file_name().map(text).unwrap_or_default();
        let env = command.get_envs().filter_map(|(name, value)| Some((text(name), text(value?))));
        let start = StartProgram {
            process: 0,
            program,
            args: command.get_args().map(text).collect(),
            env: env.chain([("NO_COLOR".to_owned(), "1".to_owned())]).collect(),
            cores: cores.to_vec(),
        };
        let report = Arc::default();
        let log = Log::create(output, Arc::clone(&report))?;
        Ok(Self::follow(process, label, log, report, agent.start(start)))
    }

    fn follow(
        process: Process,
        label: &str,
        log: Log,
        report: Arc<Mutex<ChildReport>>,
        streams: Remote,
    ) -> Self {
        let Remote { stdout, stderr, end, signals } = streams;
        let (file, label) = (log.output.file.clone(), label.to_owned());
        let writer = Some(tokio::spawn(log.write(stderr)));
        let (stdout, signals) = (Some(stdout), SignalSender(signals));
        Self { label, process, stdout, signals, end, report, log: file, writer }
    }

    /// The next line of its standard output; `None` after the last, or if it is not piped.
    pub async fn next_line(&mut self) -> Option<String> {
        self.stdout.as_mut()?.recv().await
    }

    /// Drops all further lines of its standard output.
    pub fn close_output(&mut self) {
        self.stdout = None;
    }

    /// Waits for its end and until its log is written. Returns the status, or `None` if its host is lost. May be called repeatedly.
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        let end = self.end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        if let Some(writer) = self.writer.as_mut() {
            let _ = writer.await;
            self.writer = None;
        }
        match end? {
            End::Status(status) => Some(ExitStatus::from_raw(status)),
            End::Lost(_) => None,
        }
    }

    /// Whether it has ended or its host is lost.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Resolves when its host is lost; never resolves if it ends in another way.
    pub fn lost(&self) -> impl Future<Output = Fault> + use<> {
        let mut end = self.end.clone();
        async move {
            let lost =
                end.wait_for(|end| matches!(end, Some(End::Lost(_)))).await.ok().and_then(|end| end.clone());
            match lost {
                Some(End::Lost(fault)) => fault,
                _ => std::future::pending().await,
            }
        }
    }

    /// Sends a signal, unless the process has ended.
    pub fn signal(&self, signal: i32) {
        self.signals.send(signal);
    }

    /// A handle for signals while [`Child::ended`] borrows the child.
    #[must_use]
    pub fn signals(&self) -> SignalSender {
        self.signals.clone()
    }

    /// The last lines of its log.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).tail.iter().cloned().collect()
    }

    /// The fault for this exit status, with the process's own message if it wrote one; `None` on success.
    #[must_use]
    pub fn fault(&self, status: Option<ExitStatus>) -> Option<Fault> {
        if let Some(End::Lost(fault)) = &*self.end.borrow() {
            return Some(fault.clone());
        }
        let status = status.filter(|status| !status.success())?;
        let ChildReport { error, hint, .. } =
            self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let code = status.code().and_then(ErrorCode::of_exit_status).unwrap_or(ErrorCode::Failed);
        Some(match error {
            Some(message) => Fault::new(code, message).hint(hint),
            // A trainer that fails because another process failed exits with status 4 and prints nothing.
            None if code == ErrorCode::Echo => Fault::new(code, "stopped because another process failed")
                .hint("the coordinator's log names it"),
            // The signal came before the process had installed its handler.
            None if matches!(status.signal(), Some(libc::SIGTERM | libc::SIGINT)) => {
                let message = format!("stopped when {} was told to end: {}", self.label, end(status));
                Fault::new(ErrorCode::Interrupted, message).of_process(&self.process)
            }
            None => {
                let died = Fault::new(code, format!("{} died: {}", self.label, end(status)));
                let died = died.hint(self.log_hint()).of_process(&self.process);
                Fault { lost: status.signal().is_some(), ..died }
            }
        })
    }

    /// Waits for its end; the error of a failure names the process.
    pub async fn outcome(&mut self) -> Result<(), Fault> {
        let status = self.ended().await;
        match self.fault(status) {
            None => Ok(()),
            // The message already names the process.
            Some(fault) if fault.process.is_some() => Err(fault),
            Some(fault) => Err(fault.from_origin(self.label.clone()).of_process(&self.process)),
        }
    }

    /// Hint that names its log file; empty without a log.
    #[must_use]
    pub fn log_hint(&self) -> String {
        self.log.as_ref().map_or_else(String::new, |log| format!("its log is {}", log.display()))
    }
}

/// Outcomes of all children, in the order in which they end.
pub fn outcomes(children: &mut [Child]) -> FuturesUnordered<impl Future<Output = Result<(), Fault>>> {
    children.iter_mut().map(Child::outcome).collect()
}

/// Path of a child's log.
#[must_use]
pub fn log_file(output_dir: &Path, name: &str) -> PathBuf {
    output_dir.join("logs").join(format!("{name}.log"))
}

/// Number of logs of earlier processes to keep in addition to the newest.
const EARLIER_LOGS: u32 = 5;

/// Rotates logs, because the log of an earlier attempt may explain its failure: `a.log` becomes `a.log.1`, that becomes `a.log.2`.
/// An empty log is not kept.
fn keep_earlier(path: &Path) {
    if !path.metadata().is_ok_and(|log| log.len() > 0) {
        return;
    }
    let numbered = |number: u32| match number {
        0 => path.to_owned(),
        number => PathBuf::from(format!("{}.{number}", path.display())),
    };
    for number in (0..EARLIER_LOGS).rev() {
        // Ignore errors: most of these files do not exist.
        let _ = std::fs::rename(numbered(number), numbered(number + 1));
    }
}

struct Log {
    file: Option<std::fs::File>,
    output: ChildOutput,
    report: Arc<Mutex<ChildReport>>,
    /// Rate limits of the file and of the terminal.
    kept: Allowance,
    shown: Allowance,
}

impl Log {
    fn create(output: ChildOutput, report: Arc<Mutex<ChildReport>>) -> Result<Self, Fault> {
        let create = |path: &PathBuf| {
            keep_earlier(path);
            safe_file::create(path).map_err(|error| {
                Fault::input(format!("cannot write {}: {error}", path.display()))
                    .hint("is there room, and may this user write there?")
            })
        };
        let file = output.file.as_ref().map(create).transpose()?;
        let now = Instant::now();
        Ok(Self { file, output, report, kept: Allowance::of_file(now), shown: Allowance::of_terminal(now) })
    }

    async fn write(mut self, mut lines: mpsc::Receiver<String>) {
        while let Some(line) = lines.recv().await {
            self.take(&plain::line(&line));
        }
        self.say_what_is_missing(true);
    }

    /// Handles a line. Error and hint are recorded even if the rate limits drop the line.
    fn take(&mut self, line: &str) {
        let now = Instant::now();
        if self.kept.takes(now, line.len()) {
            self.write_down(line);
        }
        if !self.report.lock().unwrap_or_else(PoisonError::into_inner).hears(line) {
            let console = &self.output.console;
            if console.shows(line) && self.shown.takes(now, line.len()) {
                console.log(&self.output.speaker, line);
            }
        }
        self.say_what_is_missing(false);
    }

    fn say_what_is_missing(&mut self, end: bool) {
        let now = Instant::now();
        if let Some(left_out) = self.kept.due(now, end) {
            self.write_down(&format!("[left out here: {}]", told(left_out)));
        }
        if let Some(left_out) = self.shown.due(now, end) {
            let line = format!(" WARN left out here: {}; see its log", told(left_out));
            self.output.console.log(&self.output.speaker, &line);
        }
    }

    /// Writes a line to the file. Ignores errors: with a full disk the pipe must still be read, or the child would block.
    fn write_down(&mut self, line: &str) {
        use std::io::Write;
        let _ = self.file.as_mut().map(|file| writeln!(file, "{line}"));
    }
}

fn told(LeftOut { lines, bytes }: LeftOut) -> String {
    format!("{} of {}, more than is kept of one process", grouped(lines, "line"), grouped(bytes, "byte"))
}

/// Forwards lines until the stream ends.
async fn pass_on<R: AsyncRead + Unpin>(stream: R, lines: mpsc::Sender<String>) {
    each_line(stream, &lines, |line| line).await;
}

/// Forwards signals until the process has ended. Returns its status as wait(2) does.
async fn reap(mut process: tokio::process::Child, mut wanted: mpsc::UnboundedReceiver<i32>) -> i32 {
    loop {
        let ended = tokio::select! {
            status = process.wait() => status,
            Some(signal) = wanted.recv() => {
                send(&process, signal);
                continue;
            }
        };
        return raw_status(ended);
    }
}

#[expect(unsafe_code, reason = "kill")]
fn send(process: &tokio::process::Child, signal: i32) {
    if let Some(pid) = process.id() {
        // SAFETY: a system call without pointers. The process is not reaped yet, so the pid is still its own.
        unsafe { libc::kill(pid as i32, signal) };
    }
}

#[cfg(test)]
mod tests {
    use dyad_telemetry::LogFormat;

    use super::*;

    /// Outcome of a child that runs this script with this log file.
    async fn outcome(script: &str, file: Option<PathBuf>) -> Result<(), Fault> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let console = Console::new(false, LogFormat::Text);
        let output = ChildOutput { file, console, speaker: Speaker { node: String::new(), rank: Some(1) } };
        let process = Process::Trainer("a-cpu".into());
        Child::start(process, "trainer rank 1 (a-cpu)", command, output).unwrap().outcome().await
    }

    #[tokio::test]
    async fn outcomes_have_the_right_code_and_message() {
        let cases = [
            ("exit 4", ErrorCode::Echo, "trainer rank 1 (a-cpu): stopped because another process failed"),
            ("echo 'error: gone' >&2; exit 4", ErrorCode::Echo, "trainer rank 1 (a-cpu): gone"),
            (
                "echo 'stopped  on request' >&2; exit 130",
                ErrorCode::Interrupted,
                "trainer rank 1 (a-cpu): stopped on request",
            ),
            ("exit 3", ErrorCode::Unavailable, "trainer rank 1 (a-cpu) died: exit status 3"),
            ("exit 77", ErrorCode::Failed, "trainer rank 1 (a-cpu) died: exit status 77"),
            (
                "kill -TERM $$",
                ErrorCode::Interrupted,
                "stopped when trainer rank 1 (a-cpu) was told to end: killed by signal 15",
            ),
        ];
        for (script, code, words) in cases {
            let fault = outcome(script, None).await.unwrap_err();
            assert_eq!((fault.code, fault.to_string().as_str()), (code, words), "{script}");
        }
        assert_eq!(outcome("exit 0", None).await, Ok(()));
    }

    #[tokio::test]
    async fn a_death_without_message_has_a_hint_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let file = log_file(dir.path(), "a-cpu");
        std::fs::create_dir(dir.path().join("logs")).unwrap();
        let hint = format!("its log is {}", file.display());
        assert_eq!(outcome("echo lost >&2; exit 1", Some(file.clone())).await.unwrap_err().hint, hint);
        assert_eq!(std::fs::read_to_string(file).unwrap(), "lost\n");
        assert_eq!(outcome("exit 1", None).await.unwrap_err().hint, "");
    }

    #[tokio::test]
    async fn logs_of_earlier_processes_are_kept_up_to_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.log");
        std::fs::write(dir.path().join("a.log.mine"), "of the user").unwrap();
        for run in 1..=8 {
            outcome(&format!("echo {run} >&2"), Some(file.clone())).await.unwrap();
        }
        // Empty logs are not rotated.
        outcome("exit 0", Some(file.clone())).await.unwrap();
        outcome("exit 0", Some(file)).await.unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let kept: String = (1..=5).map(|number| read(&format!("a.log.{number}"))).collect();
        assert_eq!((read("a.log"), kept), (String::new(), "8\n7\n6\n5\n4\n".into()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 7);
    }
}
