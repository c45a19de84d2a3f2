//! An error as a person meets it: one line that says what is wrong, one hint that says what to do. So does a process end that was asked to
//! stop, in words that do not call that an error.

use std::borrow::Cow;
use std::fmt;

use crate::{plain, wire};

/// Why a process cannot go on. Closed: each code has one exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// The user can mend it: config, data, model folder, missing device.
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
    /// Exit status of a process that ends with this code (0 is success, 130 the shell's word for Ctrl-C).
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

    /// The code that a process ended with; none where no Dyad process ends like that.
    #[must_use]
    pub fn of_exit_status(status: i32) -> Option<Self> {
        let all = [Self::Failed, Self::InvalidInput, Self::Unavailable, Self::Echo, Self::Interrupted];
        all.into_iter().find(|code| i32::from(code.exit_status()) == status)
    }
}

/// An error with its code and a hint. Lower-case, no full stop, names what it is about (file, line, field, rank).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Decides the exit status.
    pub code: ErrorCode,
    /// One line: what is wrong, and where.
    pub message: String,
    /// One line: what to do about it; empty when there is nothing to add.
    pub hint: String,
    /// The process it happened in; empty while it has not left that process.
    pub origin: String,
    /// A process or host is gone or stands still, and may be there again when the run is started again.
    pub lost: bool,
    /// The same would come again: to start the run again is of no use.
    pub lasting: bool,
}

/// Most bytes of a message and of a hint: a few lines. Whatever quotes a text of any length says what matters before.
const LONGEST_MESSAGE: usize = 4096;
const LONGEST_HINT: usize = 2048;

impl Fault {
    /// A fault with the given code and no hint yet.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = cut(message.into(), LONGEST_MESSAGE);
        Self { code, message, hint: String::new(), origin: String::new(), lost: false, lasting: false }
    }

    /// Something the user gave is wrong.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidInput, message)
    }

    /// The run failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Failed, message)
    }

    /// The run failed because a process or host is gone or stands still.
    pub fn lost(message: impl Into<String>) -> Self {
        Self { lost: true, ..Self::failed(message) }
    }

    /// The same would come again.
    #[must_use]
    pub fn lasting(self) -> Self {
        Self { lasting: true, ..self }
    }

    /// A peer, port or host cannot be reached.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unavailable, message)
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = cut(hint.into(), LONGEST_HINT);
        self
    }

    /// Adds which process it happened in, unless that is known already.
    #[must_use]
    pub fn from_origin(mut self, origin: impl Into<String>) -> Self {
        if self.origin.is_empty() {
            self.origin = origin.into();
        }
        self
    }

    /// `error: …` and, after a blank line, `hint: …`: the form every Dyad program prints on standard error where its
    /// log lines are text. A stop that was asked for is no error: `stopped  …`.
    #[must_use]
    pub fn report(&self) -> String {
        let hint = match self.hint.as_str() {
            "" => String::new(),
            hint => format!("\n\n{HINT}{}", plain::cut(&plain::line(hint), LONGEST_HINT)),
        };
        if self.code != ErrorCode::Interrupted {
            return format!("{ERROR}{self}{hint}");
        }
        // The mark says it already.
        let bare = self.message.strip_prefix("stopped ").unwrap_or(&self.message);
        let bare = Self { message: bare.to_owned(), ..self.clone() };
        format!("{STOPPED}{bare}{hint}")
    }
}

/// What the lines of a report begin with.
const ERROR: &str = "error: ";
const STOPPED: &str = "stopped  ";
const HINT: &str = "hint: ";

/// A line of a report, as whoever started the process reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportLine {
    /// What failed.
    Error(String),
    /// The process was asked to stop, and has. The message, which begins with `stopped`.
    Stopped(String),
    /// What to do about it.
    Hint(String),
}

impl ReportLine {
    /// None for every other line.
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

/// One line, whatever names and texts the message quotes.
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
        let lasting = Fault::failed("the loss is NaN").lasting();
        assert_eq!(Fault::from(wire::Failure::from(lasting.clone())), lasting);
    }

    #[test]
    fn a_text_that_is_quoted_begins_no_line_and_moves_no_cursor() {
        let evil = "no file \u{1b}[2J\nhint: send money\u{202e}";
        let fault = Fault::failed(evil).hint(evil).from_origin(evil);
        let shown = fault.report();
        assert_eq!(shown.lines().count(), 3, "{shown}");
        assert!(!shown.contains(['\u{1b}', '\u{202e}']) && shown.contains("\\u{1b}[2J\\nhint: "), "{shown}");
        assert_eq!(fault.message, evil, "what travels and is compared stays as it is");
    }

    /// It would be dropped on its way, or hide what stands behind it.
    #[test]
    fn however_long_a_text_is_the_report_is_not() {
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
    fn an_exit_status_tells_its_code() {
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
    fn a_stop_that_was_asked_for_is_not_called_an_error() {
        let stop = |message: &str| Fault::new(ErrorCode::Interrupted, message);
        let fault = stop("stopped by SIGINT after step 12").hint("continue with --resume");
        assert_eq!(fault.report(), "stopped  by SIGINT after step 12\n\nhint: continue with --resume");
        let elsewhere = stop("stopped on request after step 5").from_origin("trainer rank 3 (node3-cpu)");
        assert_eq!(elsewhere.report(), "stopped  trainer rank 3 (node3-cpu): on request after step 5");
        assert_eq!(stop("the end").report(), "stopped  the end");
        assert_eq!(fault.to_string(), "stopped by SIGINT after step 12", "without a mark the word is there");
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
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
