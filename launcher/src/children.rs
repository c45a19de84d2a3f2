//! Child processes that cannot outlive the launcher, their log files, and what they said before they ended.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use dyad_proto::{ErrorCode, Fault};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::{mpsc, watch};

use crate::agent::protocol::Start;
use crate::console::{Console, Speaker};
use crate::hosts::connection::{Agent, Remote};

/// Lines of a process that are shown again when it was the first to fail.
const TAIL: usize = 10;

/// A process of the run, on this machine or another.
#[derive(Debug)]
pub struct Child {
    /// How it is called in messages.
    pub label: String,
    stdout: Option<mpsc::UnboundedReceiver<String>>,
    signals: Signals,
    end: watch::Receiver<Option<End>>,
    report: Arc<Mutex<Report>>,
    logs: Vec<tokio::task::JoinHandle<()>>,
}

/// How a process ended.
#[derive(Clone, Debug)]
pub enum End {
    /// With this status, as wait(2) has it.
    Status(i32),
    /// Nobody knows: its host is lost, or it could not be started there.
    Lost(Fault),
}

/// Sends signals to a process as long as it runs; cheap to clone.
#[derive(Clone, Debug)]
pub struct Signals(mpsc::UnboundedSender<i32>);

impl Signals {
    /// Sends one, unless the process has ended.
    pub fn send(&self, signal: i32) {
        let _ = self.0.send(signal);
    }
}

/// Error and hint that Dyad's programs end with, and what came before.
#[derive(Clone, Debug, Default)]
struct Report {
    error: Option<String>,
    hint: String,
    tail: VecDeque<String>,
}

/// Where a child's lines go.
#[derive(Clone, Debug)]
pub struct Output {
    /// Log file.
    pub file: PathBuf,
    /// Terminal.
    pub console: Console,
    /// Who speaks, on the terminal.
    pub speaker: Speaker,
}

impl Child {
    /// Starts a program. Must be called on the main thread: the kernel ties the parent-death signal to the calling thread.
    pub fn start(label: &str, mut command: Command, output: Output) -> Result<Self, Fault> {
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stderr(Stdio::piped()).env("NO_COLOR", "1");
        // A group of its own: Ctrl-C in the terminal reaches the launcher alone, which then stops everything in order.
        command.process_group(0);
        die_with_me(&mut command);
        let report = Arc::default();
        let log = Log::create(output, Arc::clone(&report))?;
        let mut process = command.spawn().map_err(|error| {
            Fault::failed(format!("cannot start {program}: {error}")).hint("run `make build` first")
        })?;
        let (stdout_lines, stdout) = mpsc::unbounded_channel();
        let (stderr_lines, stderr) = mpsc::unbounded_channel();
        let pipes = [
            process.stdout.take().map(|stream| tokio::spawn(pump(stream, stdout_lines))),
            process.stderr.take().map(|stream| tokio::spawn(pump(stream, stderr_lines))),
        ];
        let (signals, wanted) = mpsc::unbounded_channel();
        let (tell, end) = watch::channel(None);
        tokio::spawn(async move {
            let status = reap(process, wanted).await;
            for pipe in pipes.into_iter().flatten() {
                let _ = pipe.await;
            }
            let _ = tell.send(Some(End::Status(status)));
        });
        Ok(Self::follow(label, log, report, Remote { stdout, stderr, end, signals }))
    }

    /// Starts a program of Dyad on another host, as the command has it.
    pub fn start_there(
        label: &str,
        agent: &Agent,
        command: &Command,
        cores: &[usize],
        output: Output,
    ) -> Result<Self, Fault> {
        let command = command.as_std();
        let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        let program = Path::new(command.get_program()).file_name().map(text).unwrap_or_default();
        let env = command.get_envs().filter_map(|(name, value)| Some((text(name), text(value?))));
        let start = Start {
            process: 0,
            program,
            args: command.get_args().map(text).collect(),
            env: env.chain([("NO_COLOR".to_owned(), "1".to_owned())]).collect(),
            cores: cores.to_vec(),
            stdout: true,
        };
        let report = Arc::default();
        let log = Log::create(output, Arc::clone(&report))?;
        Ok(Self::follow(label, log, report, agent.start(start)))
    }

    fn follow(label: &str, log: Log, report: Arc<Mutex<Report>>, process: Remote) -> Self {
        let Remote { stdout, stderr, end, signals } = process;
        let logs = vec![tokio::spawn(log.pump(stderr))];
        Self { label: label.to_owned(), stdout: Some(stdout), signals: Signals(signals), end, report, logs }
    }

    /// The first line of its standard output, if that was piped; what follows is dropped.
    pub async fn first_line(&mut self) -> Option<String> {
        self.stdout.take()?.recv().await
    }

    /// Waits for its end; may be called again. All its lines have been read when this returns. None where nobody knows.
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        let end = self.end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        for log in self.logs.drain(..) {
            let _ = log.await;
        }
        match end? {
            End::Status(status) => Some(ExitStatus::from_raw(status)),
            End::Lost(_) => None,
        }
    }

    /// Resolves when its host is lost; never when it ends in another way.
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

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: i32) {
        self.signals.send(signal);
    }

    /// For whoever may have to signal while somebody else waits for its end.
    #[must_use]
    pub fn signals(&self) -> Signals {
        self.signals.clone()
    }

    /// The last lines of its log.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).tail.iter().cloned().collect()
    }

    /// Why it ended, in its own words where it left any; `None` when it ended well.
    #[must_use]
    pub fn fault(&self, status: Option<ExitStatus>) -> Option<Fault> {
        if let Some(End::Lost(fault)) = &*self.end.borrow() {
            return Some(fault.clone());
        }
        let status = status?;
        if status.success() {
            return None;
        }
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some(match report.error {
            Some(message) => Fault::new(error_code(status), message).hint(report.hint),
            // It was told to end before it could listen for that.
            None if matches!(status.signal(), Some(libc::SIGTERM | libc::SIGINT)) => {
                Fault::new(ErrorCode::Interrupted, format!("{} was stopped: {}", self.label, end(status)))
            }
            None => Fault::failed(format!("{} died: {}", self.label, end(status)))
                .hint(format!("its log is {}.log in output_dir/logs", file_stem(&self.label))),
        })
    }
}

/// Keeps the process that the command starts, and all its threads, to some cores.
#[expect(unsafe_code, reason = "sched_setaffinity between fork and exec")]
pub fn keep_to(command: &mut Command, cores: &[usize]) {
    if cores.is_empty() {
        return;
    }
    // SAFETY: a zeroed set is a valid one; CPU_SET ignores what lies beyond it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().for_each(|&core| libc::CPU_SET(core, &mut set));
        set
    };
    // SAFETY: one async-signal-safe call between fork and exec. Where the kernel refuses, the process runs anywhere.
    unsafe {
        command.pre_exec(move || {
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
            Ok(())
        });
    }
}

/// Makes the process that the command starts end with the launcher, however that ends, and with its own handle.
#[expect(unsafe_code, reason = "prctl between fork and exec")]
pub fn die_with_me(command: &mut Command) {
    command.kill_on_drop(true);
    let parent = std::process::id();
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The launcher may have died before the line above.
            if libc::getppid() as u32 != parent { Err(std::io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        });
    }
}

/// `killed by signal 9 (SIGKILL)` or `exit status 1`.
#[must_use]
pub fn end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => {
            "killed by signal 9 (SIGKILL), for example by the kernel when memory runs out".into()
        }
        (Some(libc::SIGSEGV), _) => "killed by signal 11 (SIGSEGV)".into(),
        (Some(signal), _) => format!("killed by signal {signal}"),
        (None, code) => format!("exit status {}", code.unwrap_or(-1)),
    }
}

fn error_code(status: ExitStatus) -> ErrorCode {
    let all = [ErrorCode::InvalidInput, ErrorCode::Unavailable, ErrorCode::Echo, ErrorCode::Interrupted];
    let code = all.into_iter().find(|code| status.code() == Some(code.exit_status().into()));
    code.unwrap_or(ErrorCode::Failed)
}

/// The word in parentheses of `trainer rank 1 (node1-cpu)`, or the label itself.
fn file_stem(label: &str) -> &str {
    label.split_once('(').map_or(label, |(_, rest)| rest.trim_end_matches(')'))
}

/// Path of a child's log.
#[must_use]
pub fn log_file(output_dir: &Path, name: &str) -> PathBuf {
    output_dir.join("logs").join(format!("{name}.log"))
}

struct Log {
    file: std::fs::File,
    output: Output,
    report: Arc<Mutex<Report>>,
}

impl Log {
    fn create(output: Output, report: Arc<Mutex<Report>>) -> Result<Self, Fault> {
        let file = std::fs::File::create(&output.file)
            .map_err(|error| Fault::input(format!("cannot write {}: {error}", output.file.display())))?;
        Ok(Self { file, output, report })
    }

    async fn pump(mut self, mut lines: mpsc::UnboundedReceiver<String>) {
        use std::io::Write;
        while let Some(line) = lines.recv().await {
            // A full disk must not stop the child by blocking its pipe.
            let _ = writeln!(self.file, "{line}");
            let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((error, hint)) = dyad_telemetry::read_last_words(&line) {
                (report.error, report.hint) = (Some(error), hint);
            } else if let Some(error) = line.strip_prefix("error: ") {
                report.error = Some(error.to_owned());
                report.hint.clear();
            } else if let Some(hint) = line.strip_prefix("hint: ") {
                hint.clone_into(&mut report.hint);
            } else if !line.trim().is_empty() {
                if report.tail.len() == TAIL {
                    report.tail.pop_front();
                }
                report.tail.push_back(line.clone());
                drop(report);
                self.output.console.log(&self.output.speaker, &line);
            }
        }
    }
}

/// Passes lines on until the stream ends. By bytes: a line that is no UTF-8 must not end the log.
async fn pump<R: AsyncRead + Unpin>(stream: R, lines: mpsc::UnboundedSender<String>) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        // Fails when nobody reads any more; the process must be able to write all the same.
        let _ = lines.send(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned());
        line.clear();
    }
}

/// Hands signals on until the process has ended; its status as wait(2) has it.
async fn reap(mut process: tokio::process::Child, mut wanted: mpsc::UnboundedReceiver<i32>) -> i32 {
    loop {
        let ended = tokio::select! {
            status = process.wait() => status,
            Some(signal) = wanted.recv() => {
                send(&process, signal);
                continue;
            }
        };
        return ended.map_or(1 << 8, ExitStatusExt::into_raw);
    }
}

#[expect(unsafe_code, reason = "kill")]
fn send(process: &tokio::process::Child, signal: i32) {
    if let Some(pid) = process.id() {
        // SAFETY: a plain system call; the process is not reaped yet, so the id is still its own.
        unsafe { libc::kill(pid as i32, signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_map_back_to_codes() {
        for code in [ErrorCode::InvalidInput, ErrorCode::Unavailable, ErrorCode::Echo, ErrorCode::Failed] {
            assert_eq!(error_code(ExitStatus::from_raw(i32::from(code.exit_status()) << 8)), code);
        }
        assert_eq!(end(ExitStatus::from_raw(11)), "killed by signal 11 (SIGSEGV)");
        assert_eq!(end(ExitStatus::from_raw(7 << 8)), "exit status 7");
    }

    #[test]
    fn logs_are_named_after_the_process() {
        assert_eq!(file_stem("trainer rank 1 (node1-cpu)"), "node1-cpu");
        assert_eq!(file_stem("coordinator"), "coordinator");
    }
}
