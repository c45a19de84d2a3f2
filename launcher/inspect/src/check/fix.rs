//! Writes the records without findings into one file, and the others with their problems into another. The input stays as it is.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use dyad_proto::pairs::source::Located;
use dyad_proto::{Fault, safe_file};
use serde::Serialize;
use serde_json::value::RawValue;

use super::finding::Problem;

/// The two files of one input.
#[derive(Debug)]
pub(super) struct Fixed {
    clean: Out,
    rejects: Out,
}

/// A file that appears under its name when it is complete.
#[derive(Debug)]
struct Out {
    path: PathBuf,
    scratch: Scratch,
    to: BufWriter<File>,
    records: u64,
}

/// A line of the file of rejects.
#[derive(Serialize)]
struct Reject<'r> {
    line: u64,
    problems: &'r [Problem],
    record: Original<'r>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Original<'r> {
    Json(&'r RawValue),
    Text(&'r str),
}

/// What was written for one input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Written {
    /// The file of clean records, and their number.
    pub clean: (String, u64),
    /// The file of rejected records, and their number.
    pub rejects: (String, u64),
}

impl Fixed {
    /// The files of an input: `NAME.clean.jsonl` and `NAME.rejects.jsonl` in `folder`. Refuses to replace a file.
    pub(super) fn create(folder: &Path, input: &Located) -> Result<Self, Fault> {
        let name = input.shown.rsplit('/').next().unwrap_or_default();
        let stem = [".gz", ".zst", ".jsonl", ".ndjson", ".json", ".parquet"]
            .iter()
            .fold(name, |stem, end| stem.strip_suffix(end).unwrap_or(stem));
        let out = |end: &str| Out::create(folder.join(format!("{stem}.{end}.jsonl")));
        Ok(Self { clean: out("clean")?, rejects: out("rejects")? })
    }

    /// Writes a record by its problems.
    pub(super) fn put(&mut self, line: u64, record: &str, problems: &[Problem]) -> Result<(), Fault> {
        if problems.is_empty() {
            return self.clean.line(record);
        }
        // What is no JSON is kept as text.
        let original = serde_json::from_str(record).map_or(Original::Text(record), Original::Json);
        let reject = serde_json::to_string(&Reject { line, problems, record: original });
        let reject =
            reject.map_err(|error| Fault::failed(format!("cannot write a rejected record: {error}")))?;
        self.rejects.line(&reject)
    }

    /// Gives both files their names.
    pub(super) fn finish(self) -> Result<Written, Fault> {
        Ok(Written { clean: self.clean.finish()?, rejects: self.rejects.finish()? })
    }
}

impl Out {
    fn create(path: PathBuf) -> Result<Self, Fault> {
        if path.symlink_metadata().is_ok() {
            return Err(Fault::input(format!("{} exists", path.display()))
                .hint("remove it, or choose another folder with --out"));
        }
        let scratch = Scratch(safe_file::scratch(&path));
        let file = safe_file::create(&scratch.0).map_err(|error| cannot(&path, &error))?;
        Ok(Self { path, scratch, to: BufWriter::with_capacity(1 << 20, file), records: 0 })
    }

    fn line(&mut self, text: &str) -> Result<(), Fault> {
        self.records += 1;
        let written = self.to.write_all(text.as_bytes()).and_then(|()| self.to.write_all(b"\n"));
        written.map_err(|error| cannot(&self.path, &error))
    }

    fn finish(self) -> Result<(String, u64), Fault> {
        let Self { path, scratch, to, records } = self;
        let failed = |error: std::io::Error| cannot(&path, &error);
        to.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)?;
        std::fs::rename(&scratch.0, &path).map_err(failed)?;
        Ok((path.display().to_string(), records))
    }
}

/// A temporary file, removed unless it was renamed.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn cannot(path: &Path, error: &std::io::Error) -> Fault {
    Fault::failed(format!("cannot write {}: {error}", path.display()))
        .hint("choose a folder with --out that you may write to")
}
