//! Child processes that cannot outlive the launcher, their log files, and what they said before they ended.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use dyad_proto::{ErrorCode, Fault};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader, Lines};
use tokio::process::{ChildStdout, Command};

use crate::console::Console;

/// A process of the run.
#[derive(Debug)]
pub struct Child {
    /// How it is called in messages.
    pub label: String,
    process: tokio::process::Child,
    report: Arc<Mutex<Report>>,
    logs: Vec<tokio::task::JoinHandle<()>>,
}

/// The `error:` and `hint:` lines that Dyad's programs end with.
#[derive(Clone, Debug, Default)]
struct Report {
    error: Option<String>,
    hint: String,
}

/// Where a child's lines go.
#[derive(Clone, Debug)]
pub struct Output {
    /// Log file.
    pub file: PathBuf,
    /// Terminal.
    pub console: Console,
    /// Before each line on the terminal.
    pub prefix: String,
}

impl Child {
    /// Starts a program. Must be called on the main thread: the kernel ties the parent-death signal to the calling thread.
    pub fn start(label: &str, mut command: Command, output: Output) -> Result<Self, Fault> {
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stderr(Stdio::piped()).env("NO_COLOR", "1");
        // A group of its own: Ctrl-C in the terminal reaches the launcher alone, which then stops everything in order.
        command.process_group(0);
        die_with_me(&mut command);
        let mut process = command.spawn().map_err(|error| {
            Fault::failed(format!("cannot start {program}: {error}")).hint("run `make build` first")
        })?;
        let report = Arc::new(Mutex::new(Report::default()));
        let log = Log::create(output, Arc::clone(&report))?;
        let logs = process.stderr.take().map(|stream| tokio::spawn(log.pump(BufReader::new(stream).lines())));
        Ok(Self { label: label.to_owned(), process, report, logs: logs.into_iter().collect() })
    }

    /// Lines of its standard output, if that was piped.
    pub fn stdout(&mut self) -> Option<Lines<BufReader<ChildStdout>>> {
        self.process.stdout.take().map(|stream| BufReader::new(stream).lines())
    }

    /// Waits for its end; may be called again. All its lines have been read when this returns.
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.process.wait().await.ok();
        for log in self.logs.drain(..) {
            let _ = log.await;
        }
        status
    }

    /// Sends a signal, unless it has ended.
    #[expect(unsafe_code, reason = "kill")]
    pub fn signal(&self, signal: i32) {
        if let Some(pid) = self.process.id() {
            // SAFETY: a plain system call; the process is not reaped yet, so the id is still its own.
            unsafe { libc::kill(pid as i32, signal) };
        }
    }

    /// Why it ended, in its own words where it left any; `None` when it ended well.
    #[must_use]
    pub fn fault(&self, status: Option<ExitStatus>) -> Option<Fault> {
        let status = status?;
        if status.success() {
            return None;
        }
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some(match report.error {
            Some(message) => Fault::new(error_code(status), message).hint(report.hint),
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

    async fn pump<R: AsyncRead + Unpin>(mut self, mut lines: Lines<BufReader<R>>) {
        use std::io::Write;
        while let Ok(Some(line)) = lines.next_line().await {
            // A full disk must not stop the child by blocking its pipe.
            let _ = writeln!(self.file, "{line}");
            let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(error) = line.strip_prefix("error: ") {
                *report = Report { error: Some(error.to_owned()), hint: String::new() };
            } else if let Some(hint) = line.strip_prefix("hint: ") {
                hint.clone_into(&mut report.hint);
            } else {
                drop(report);
                self.output.console.log(&self.output.prefix, &line);
            }
        }
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
