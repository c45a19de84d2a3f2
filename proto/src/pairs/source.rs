//! Access to records by number, for any number of files.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Example;
use super::forms::Form;
use crate::Fault;

/// How the records of a file are counted for the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Lines of text.
    Line,
    /// Rows of a table.
    Row,
    /// Items of a JSON array.
    Item,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Line => "line",
            Self::Row => "row",
            Self::Item => "item",
        })
    }
}

/// A file of lines on this machine, and the name that the user knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its name for messages; that of the original, if the file was fetched or unpacked.
    pub shown: String,
    /// The file of lines.
    pub path: PathBuf,
    /// What a line is in the original.
    pub unit: Unit,
}

impl Located {
    /// A file of lines that the user named.
    #[must_use]
    pub fn here(path: &Path) -> Self {
        Self { shown: path.display().to_string(), path: path.to_owned(), unit: Unit::Line }
    }
}

/// Checked records, numbered from 0 in the files' order. Duplicates are kept.
#[allow(clippy::len_without_is_empty, reason = "a source is never empty: opening one without a pair fails")]
pub trait PairSource: fmt::Debug + Send + Sync {
    /// Number of pairs.
    fn len(&self) -> usize;

    /// The files, each with its form and the names of its fields that are not read.
    fn files(&self) -> Vec<FileNotes<'_>>;

    /// Bytes of a record and of its place; its wire form is not larger.
    fn bytes(&self, id: u64) -> usize;

    /// Parses one record.
    fn pair(&self, id: u64) -> Result<Example, Fault>;

    /// File and line of a pair, for messages.
    fn place(&self, id: u64) -> String;
}

/// What the user should know about a file.
#[derive(Clone, Copy, Debug)]
pub struct FileNotes<'a> {
    /// Name for messages.
    pub path: &'a str,
    /// Id of its first pair.
    pub first: u64,
    /// Form of its records.
    pub form: &'static Form,
    /// Names of fields that are not read.
    pub passed_over: &'a [String],
}
