//! What is found about a record.

use dyad_proto::plain;
use serde::Serialize;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// A run refuses the file.
    Error,
    /// A run leaves the record out.
    LeftOut,
    /// A run trains on the record, and that is probably not wanted.
    Warning,
}

impl Severity {
    /// The word before a finding.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::LeftOut => "left out",
            Self::Warning => "warning",
        }
    }
}

/// A problem of a record, without its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// Path of the field; `record` for the record as a whole.
    pub field: String,
    /// What is wrong, and what was expected.
    pub problem: String,
}

impl Problem {
    /// A problem.
    pub fn new(severity: Severity, field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { severity, field: field.into(), problem: problem.into() }
    }
}

/// A problem of a record of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the file.
    pub file: String,
    /// Line, row or item, from 1.
    pub line: u64,
    /// The problem.
    #[serde(flatten)]
    pub problem: Problem,
}

impl Finding {
    /// One line for the terminal; `unit` says what is counted.
    #[must_use]
    pub fn shown(&self, unit: &str) -> String {
        let Self { file, line, problem: Problem { severity, field, problem } } = self;
        let text = format!("{}: {file} {unit} {line}: {field}: {problem}", severity.word());
        plain::line(&text).into_owned()
    }
}
