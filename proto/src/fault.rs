//! The error type: one line for the problem, one hint for the remedy. A process that stops on request reports in the same form, but not
//! as an error.

use std::borrow::Cow;
use std::path::Path;
use std::{fmt, io};

use crate::{plain, wire};

/// A process of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Process {
    /// The coordinator.
    Coordinator,
    /// The trainer of this name, such as `node0-cpu`.
    Trainer(String),
}

/// Why a process cannot go on. Closed: each code has one exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The user can fix it: config, data, model folder, missing device.
    InvalidInput,
    /// A peer, port or host cannot be reached.
    Unavailable,
    /// The run failed.
    Failed,
    /// Stopped on request.
    Interrupted,
    /// Ended because another process failed first; never shown as the cause.
    Echo,
}

impl ErrorCode {
    /// Exit status of a process that ends with this code (0 is success; 130 is the shell convention for Ctrl-C).
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::InvalidInput => 2,
            Self::Unavailable => 3,
            Self::Echo => 4,
            Self::Interrupted => 130,
        }
    }

    /// The code of an exit status; `None` if no code has this status.
    #[must_use]
    pub fn of_exit_status(status: i32) -> Option<Self> {
        let all = [Self::Failed, Self::InvalidInput, Self::Unavailable, Self::Echo, Self::Interrupted];
        all.into_iter().find(|code| i32::from(code.exit_status()) == status)
    }
}

/// An error with its code and a hint. Messages are lower-case, have no full stop, and name their subject (file, line, field, rank).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Decides the exit status.
    pub code: ErrorCode,
    /// One line: the problem and its place.
    pub message: String,
    /// One line: the remedy; may be empty.
    pub hint: String,
    /// Label of the process that failed; empty until the fault leaves that process.
    pub origin: String,
    /// The process that failed; `None` if it is unknown or this one.
    pub process: Option<Process>,
    /// The process's connection closed without a report. The program that started it knows its exit status.
    pub connection_closed: bool,
    /// A process or host ended or hangs. A restart of the run may succeed.
    pub lost: bool,
    /// A restart of the run would fail in the same way.
    pub lasting: bool,
}

/// Maximum bytes of a message and of a hint, a few lines. A message that quotes a long text puts the important part before it.
const LONGEST_MESSAGE: usize = 4096;
const LONGEST_HINT: usize = 2048;

impl Fault {
    /// A fault with the given code and no hint yet.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = cut(message.into(), LONGEST_MESSAGE);
        Self {
            code,
            message,
            hint: String::new(),
            origin: String::new(),
            process: None,
            connection_closed: false,
            lost: false,
            lasting: false,
        }
    }

    /// An input of the user is wrong.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidInput, message)
    }

    /// The run failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Failed, message)
    }

    /// The run failed because a process or host ended or hangs.
    pub fn lost(message: impl Into<String>) -> Self {
        Self { lost: true, ..Self::failed(message) }
    }

    /// Marks the fault: a restart of the run would fail in the same way.
    #[must_use]
    pub fn lasting(self) -> Self {
        Self { lasting: true, ..self }
    }

    /// A peer, port or host cannot be reached.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unavailable, message)
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = cut(hint.into(), LONGEST_HINT);
        self
    }

    /// Sets the label of the process that failed, unless it is set already.
    #[must_use]
    pub fn from_origin(mut self, origin: impl Into<String>) -> Self {
        if self.origin.is_empty() {
            self.origin = origin.into();
        }
        self
    }

    /// Sets the process that failed, unless it is set already.
    #[must_use]
    pub fn of_process(mut self, process: &Process) -> Self {
        self.process.get_or_insert_with(|| process.clone());
        self
    }

    /// A file cannot be written. The fault is lasting if the disk is full or a quota or size limit is reached.
    pub fn unwritten(path: &Path, error: &io::Error) -> Self {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];
        let fault = Self::failed(format!("cannot write {}: {error}", path.display()));
        Self { lasting: full.contains(&error.kind()), ..fault }
    }

    /// Parses the last report in a Dyad program's standard error; `None` if there is none. `status` is the program's exit status.
    #[must_use]
    pub fn reported(stderr: &str, status: Option<i32>) -> Option<Self> {
        let code = status.and_then(ErrorCode::of_exit_status).unwrap_or(ErrorCode::Failed);
        stderr.lines().filter_map(ReportLine::read).fold(None, |fault, line| match line {
            ReportLine::Error(message) | ReportLine::Stopped(message) => Some(Self::new(code, message)),
            ReportLine::Hint(hint) => fault.map(|fault: Self| fault.hint(hint)),
        })
    }

    /// Formats the fault for standard error, as every Dyad program does if its log lines are text: `error: …` and, after a blank line,
    /// `hint: …`. A stop on request begins with `stopped  …` instead of `error: …`.
    #[must_use]
    pub fn report(&self) -> String {
        let hint = match self.hint.as_str() {
            "" => String::new(),
            hint => format!("\n\n{HINT}{}", plain::cut(&plain::line(hint), LONGEST_HINT)),
        };
        if self.code != ErrorCode::Interrupted {
            return format!("{ERROR}{self}{hint}");
        }
        // Do not repeat the word "stopped" after the prefix.
        let bare = self.message.strip_prefix("stopped ").unwrap_or(&self.message);
        let bare = Self { message: bare.to_owned(), ..self.clone() };
        format!("{STOPPED}{bare}{hint}")
    }
}

/// Prefixes of the lines of a report.
const ERROR: &str = "error: ";
const STOPPED: &str = "stopped  ";
const HINT: &str = "hint: ";

/// A line of a report, parsed by the process that started the reporting one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportLine {
    /// Message of an error.
    Error(String),
    /// Message of a process that stopped on request; begins with `stopped`.
    Stopped(String),
    /// The hint.
    Hint(String),
}

impl ReportLine {
    /// Parses a line of a report; `None` for other lines.
    #[must_use]
    pub fn read(line: &str) -> Option<Self> {
        let behind = |mark: &str| line.strip_prefix(mark);
        let stopped = |words: &str| Self::Stopped(format!("stopped {words}"));
        behind(ERROR)
            .map(|words| Self::Error(words.to_owned()))
            .or_else(|| behind(STOPPED).map(stopped))
            .or_else(|| behind(HINT).map(|words| Self::Hint(words.to_owned())))
    }
}

/// Always one line: line ends in quoted texts are escaped.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = plain::line(&self.message);
        let message = plain::cut(&message, LONGEST_MESSAGE);
        if self.origin.is_empty() {
            f.write_str(&message)
        } else {
            write!(f, "{}: {message}", plain::quoted(&plain::line(&self.origin)))
        }
    }
}

fn cut(text: String, most: usize) -> String {
    match plain::cut(&text, most) {
        Cow::Borrowed(_) => text,
        Cow::Owned(cut) => cut,
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for wire::Failure {
    fn from(fault: Fault) -> Self {
        let code = match fault.code {
            ErrorCode::InvalidInput => wire::ErrorCode::InvalidInput,
            ErrorCode::Unavailable => wire::ErrorCode::Unavailable,
            ErrorCode::Failed => wire::ErrorCode::Failed,
            ErrorCode::Interrupted => wire::ErrorCode::Interrupted,
            ErrorCode::Echo => wire::ErrorCode::Echo,
        };
        Self {
            code: code.into(),
            message: fault.message,
            hint: fault.hint,
            origin: fault.origin,
            process: fault.process.map(|process| match process {
                Process::Coordinator => wire::failure::Process::Coordinator(true),
                Process::Trainer(name) => wire::failure::Process::Trainer(name),
            }),
            connection_closed: fault.connection_closed,
            lost: fault.lost,
            lasting: fault.lasting,
        }
    }
}

impl From<wire::Failure> for Fault {
    fn from(failure: wire::Failure) -> Self {
        let code = match failure.code() {
            wire::ErrorCode::InvalidInput => ErrorCode::InvalidInput,
            wire::ErrorCode::Unavailable => ErrorCode::Unavailable,
            wire::ErrorCode::Interrupted => ErrorCode::Interrupted,
            wire::ErrorCode::Echo => ErrorCode::Echo,
            wire::ErrorCode::Failed | wire::ErrorCode::Unspecified => ErrorCode::Failed,
        };
        Self {
            code,
            message: cut(failure.message, LONGEST_MESSAGE),
            hint: cut(failure.hint, LONGEST_HINT),
            origin: cut(failure.origin, LONGEST_HINT),
            process: failure.process.map(|process| match process {
                wire::failure::Process::Coordinator(_) => Process::Coordinator,
                wire::failure::Process::Trainer(name) => Process::Trainer(cut(name, LONGEST_HINT)),
            }),
            connection_closed: failure.connection_closed,
            lost: failure.lost,
            lasting: failure.lasting,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_wire() {
        let fault =
            Fault::input("line 7: no field `input`").hint("see docs/data.md").from_origin("coordinator");
        assert_eq!(Fault::from(wire::Failure::from(fault.clone())), fault);
        let lost = Fault::lost("gone");
        assert_eq!(Fault::from(wire::Failure::from(lost.clone())), lost);
        let trainer = Process::Trainer("node0-cpu".into());
        for process in [Process::Coordinator, trainer] {
            let closed = Fault { connection_closed: true, ..Fault::lost("gone") }.of_process(&process);
            assert_eq!(Fault::from(wire::Failure::from(closed.clone())), closed);
        }
        let lasting = Fault::failed("the loss is NaN").lasting();
        assert_eq!(Fault::from(wire::Failure::from(lasting.clone())), lasting);
    }

    #[test]
    fn a_report_on_standard_error_is_read_again() {
        let fault = Fault::input("no file x").hint("make it");
        let stderr = format!("some log line\n{}\n", fault.report());
        assert_eq!(Fault::reported(&stderr, Some(2)), Some(fault));
        assert_eq!(Fault::reported("stopped  by SIGTERM\n", Some(130)).unwrap().code, ErrorCode::Interrupted);
        assert_eq!(Fault::reported("error while loading shared libraries\n", Some(127)), None);
    }

    #[test]
    fn a_full_disk_is_a_lasting_fault() {
        let unwritten = |number| Fault::unwritten(Path::new("x"), &io::Error::from_raw_os_error(number));
        for number in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            assert!(unwritten(number).lasting);
        }
        assert!(!unwritten(libc::EIO).lasting);
    }

    #[test]
    fn quoted_text_cannot_start_a_line_or_move_the_cursor() {
        let evil = "no file \u{1b}[2J\nhint: send money\u{202e}";
        let fault = Fault::failed(evil).hint(evil).from_origin(evil);
        let shown = fault.report();
        assert_eq!(shown.lines().count(), 3, "{shown}");
        assert!(!shown.contains(['\u{1b}', '\u{202e}']) && shown.contains("\\u{1b}[2J\\nhint: "), "{shown}");
        assert_eq!(fault.message, evil, "what travels and is compared stays as it is");
    }

    /// A longer report could be dropped on its way, or hide later lines.
    #[test]
    fn the_report_of_a_long_message_is_cut() {
        let long = "x".repeat(3 << 20);
        let fault = Fault::input(format!("line 7: {long}")).hint(long.clone()).from_origin("trainer rank 1");
        let bypassed = Fault { message: format!("o: {long}"), ..fault.clone() };
        let sent = wire::Failure { message: long.clone(), hint: long, ..wire::Failure::default() };
        for fault in [fault.clone(), bypassed, sent.into()] {
            let shown = fault.report();
            assert!(shown.len() < 8192 && shown.contains(" more bytes] x"), "{}", shown.len());
        }
        assert!(fault.report().starts_with("error: trainer rank 1: line 7: xxx"));
    }

    #[test]
    fn exit_statuses_map_back_to_codes() {
        use ErrorCode::{Echo, Failed, Interrupted, InvalidInput, Unavailable};
        for code in [Failed, InvalidInput, Unavailable, Echo, Interrupted] {
            assert_eq!(ErrorCode::of_exit_status(code.exit_status().into()), Some(code));
        }
        assert_eq!([0, 77, 137].map(ErrorCode::of_exit_status), [None; 3]);
    }

    #[test]
    fn report_shows_origin_message_and_hint() {
        let fault = Fault::failed("gone").hint("look").from_origin("trainer rank 1 (node1-cpu)");
        assert_eq!(fault.report(), "error: trainer rank 1 (node1-cpu): gone\n\nhint: look");
        assert_eq!(Fault::failed("gone").report(), "error: gone");
    }

    #[test]
    fn a_stop_on_request_is_not_called_an_error() {
        let stop = |message: &str| Fault::new(ErrorCode::Interrupted, message);
        let fault = stop("stopped by SIGINT after step 12").hint("continue with --resume");
        assert_eq!(fault.report(), "stopped  by SIGINT after step 12\n\nhint: continue with --resume");
        let elsewhere = stop("stopped on request after step 5").from_origin("trainer rank 3 (node3-cpu)");
        assert_eq!(elsewhere.report(), "stopped  trainer rank 3 (node3-cpu): on request after step 5");
        assert_eq!(stop("the end").report(), "stopped  the end");
        assert_eq!(fault.to_string(), "stopped by SIGINT after step 12", "without a mark the word is there");
    }

    #[test]
    fn report_lines_are_parsed_back() {
        let stop = Fault::new(ErrorCode::Interrupted, "stopped by SIGINT").hint("go on");
        let read: Vec<ReportLine> = stop.report().lines().filter_map(ReportLine::read).collect();
        let expected = [ReportLine::Stopped("stopped by SIGINT".into()), ReportLine::Hint("go on".into())];
        assert_eq!(read, expected);
        assert_eq!(ReportLine::read("error: gone"), Some(ReportLine::Error("gone".into())));
        for other in ["stopped by hand", "2026-01-01T00:00:00Z  INFO error: no", "", "hint"] {
            assert_eq!(ReportLine::read(other), None, "{other}");
        }
    }
}
