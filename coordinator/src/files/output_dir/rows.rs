//! The metrics files: appending rows during a run, and selecting the rows that a resumed run keeps.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dyad_proto::{Fault, counted, files, noun, safe_file::Staged};
use serde_json::Value;

use super::unusable;

/// Rows of an earlier run, up to the step after which it is resumed.
#[derive(Debug, Default, PartialEq)]
pub(super) struct KeptRows {
    text: String,
    /// The last row.
    pub(super) last: Option<Value>,
    steps: BTreeSet<u64>,
    /// Numbers (from 1) of lines that hold no row, except the last line, which a kill may have torn.
    torn: Vec<usize>,
}

impl KeptRows {
    /// The rows of a file up to a step; none if the file does not exist.
    pub(super) fn read(path: &Path, step: u64) -> Result<Self, Fault> {
        match files::read_rows(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(unusable(path, &error)),
            Ok(bytes) => Ok(Self::of(&String::from_utf8_lossy(&bytes), step)),
        }
    }

    fn of(text: &str, step: u64) -> Self {
        let mut kept = Self::default();
        let lines = text.lines().count();
        for (index, line) in text.lines().enumerate() {
            let row = serde_json::from_str::<Value>(line).ok();
            let Some((at, row)) = row.and_then(|row| Some((row.get("step")?.as_u64()?, row))) else {
                kept.torn.extend((index + 1 < lines).then_some(index + 1));
                continue;
            };
            if at <= step {
                kept.text += line;
                kept.text.push('\n');
                kept.steps.insert(at);
                kept.last = Some(row);
            }
        }
        kept
    }

    /// A message about missing and unreadable rows, if not every step from 1 to `step` has one.
    pub(super) fn holes(&self, step: u64) -> Option<String> {
        let mut holes = Vec::new();
        let mut next = 1;
        for at in self.steps.iter().copied().chain([step + 1]) {
            match at.saturating_sub(next) {
                0 => {}
                1 => holes.push(next.to_string()),
                _ => holes.push(format!("{next} to {}", at - 1)),
            }
            next = at + 1;
        }
        let steps = (!holes.is_empty()).then(|| lacks(&holes));
        [steps, self.torn()].into_iter().flatten().reduce(|steps, torn| format!("{steps}; {torn}"))
    }

    /// The rows as JSON, in order.
    pub(super) fn values(&self) -> Vec<Value> {
        self.text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> u64 {
        self.steps.len() as u64
    }

    /// A message if there are fewer than `expected` rows of steps before `step`.
    pub(super) fn lost_before(&self, step: u64, expected: u64) -> Option<String> {
        let found = self.steps.range(..step).count() as u64;
        let lost = expected.saturating_sub(found);
        (lost > 0).then(|| format!("lacks {} of {expected} before step {step}", counted(lost, "row")))
    }

    /// A message with the numbers of the lines that hold no row, if there are any.
    pub(super) fn torn(&self) -> Option<String> {
        let lines: Vec<String> = self.torn.iter().map(ToString::to_string).collect();
        (!lines.is_empty())
            .then(|| format!("holds no row in {} {}", noun(lines.len(), "line"), lines.join(", ")))
    }
}

/// The message for missing steps; each entry is a step or a range such as `5 to 7`.
fn lacks(holes: &[String]) -> String {
    match holes {
        [step] if !step.contains(' ') => format!("lacks the row of step {step}"),
        _ => format!("lacks the rows of steps {}", holes.join(", ")),
    }
}

/// A JSON Lines file to which rows are appended.
#[derive(Debug)]
pub(super) struct MetricsFile {
    path: PathBuf,
    file: File,
    /// Expected length of the file in bytes.
    bytes: u64,
}

/// A metrics file that is ready to replace the earlier one atomically: a kill leaves the earlier one unchanged.
#[derive(Debug)]
pub(super) struct StagedRows {
    path: PathBuf,
    staged: Staged,
    bytes: u64,
}

impl StagedRows {
    /// Writes the kept rows to a temporary file.
    pub(super) fn new(path: PathBuf, kept: &KeptRows) -> Result<Self, Fault> {
        let staged = Staged::new(&path, kept.text.as_bytes()).map_err(|error| unusable(&path, &error))?;
        Ok(Self { path, staged, bytes: kept.text.len() as u64 })
    }

    /// Replaces the earlier file, and returns the new one for appending.
    pub(super) fn place(self) -> Result<MetricsFile, Fault> {
        let file = self.staged.place().map_err(|error| unusable(&self.path, &error))?;
        Ok(MetricsFile { path: self.path, file, bytes: self.bytes })
    }
}

impl MetricsFile {
    /// Writes one row to the file without buffering, so that readers see it at once.
    pub(super) fn append(&mut self, row: &str) -> Result<(), Fault> {
        still_there(&self.path, &self.file, self.bytes)?;
        let row = format!("{row}\n");
        if let Err(error) = self.file.write_all(row.as_bytes()) {
            // Remove the part of the row that was written.
            let _ = self.file.set_len(self.bytes);
            return Err(unwritten(&self.path, &error));
        }
        self.bytes += row.len() as u64;
        Ok(())
    }

    /// Returns once all rows are on the disk.
    pub(super) fn persist(&self) -> Result<(), Fault> {
        self.file.sync_data().map_err(|error| unwritten(&self.path, &error))
    }
}

/// Fails unless the path still leads to the opened file and the file has the expected length; otherwise rows would be lost.
pub(crate) fn still_there(path: &Path, file: &File, bytes: u64) -> Result<(), Fault> {
    let what = match (fs::metadata(path), file.metadata()) {
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => "was removed or moved".to_owned(),
        (Err(error), _) | (_, Err(error)) => format!("cannot be read any more: {error}"),
        (Ok(there), Ok(own)) if (there.dev(), there.ino()) != (own.dev(), own.ino()) => {
            "was replaced by another file".to_owned()
        }
        (_, Ok(own)) if own.len() < bytes => "was cut short".to_owned(),
        (_, Ok(own)) if own.len() > bytes => "was written to by another process".to_owned(),
        _ => return Ok(()),
    };
    Err(Fault::failed(format!("{} {what} while the run was writing it", path.display()))
        .hint("leave output_dir alone while a run writes to it")
        .lasting())
}

pub(crate) fn unwritten(path: &Path, error: &io::Error) -> Fault {
    let fault = Fault::unwritten(path, error);
    let hint = match fault.lasting {
        true => "make room on the disk of output_dir",
        false => "check the disk of output_dir and its permissions",
    };
    fault.hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(steps: impl IntoIterator<Item = u64>) -> String {
        steps.into_iter().map(|step| format!("{{\"step\":{step}}}\n")).collect()
    }

    #[test]
    fn missing_evaluation_rows_are_counted() {
        let lost = |text: &str, expected| KeptRows::of(text, 6).lost_before(6, expected);
        assert_eq!(lost(&rows([0, 3, 6]), 2), None);
        assert_eq!(lost(&rows([3, 6]), 2).unwrap(), "lacks 1 row of 2 before step 6");
        assert_eq!(lost("", 2).unwrap(), "lacks 2 rows of 2 before step 6");
    }

    #[test]
    fn missing_rows_are_named_and_a_torn_last_row_is_ignored() {
        let holes = |text: &str| KeptRows::of(text, 9).holes(9);
        assert_eq!(holes(&(rows(1..=12) + "{\"step\":13,")), None);
        assert_eq!(holes(&rows(1..=8)).unwrap(), "lacks the row of step 9");
        assert_eq!(holes(&rows([1, 2, 4, 8, 9])).unwrap(), "lacks the rows of steps 3, 5 to 7");
        assert_eq!(holes("").unwrap(), "lacks the rows of steps 1 to 9");
        let torn = rows(1..=3) + "{\"ste\n" + &rows(5..=9);
        assert_eq!(holes(&torn).unwrap(), "lacks the row of step 4; holds no row in line 4");
        assert_eq!(KeptRows::of(&torn, 9).text, rows([1, 2, 3, 5, 6, 7, 8, 9]));
    }

    #[test]
    fn append_fails_after_the_file_was_removed_replaced_or_changed() {
        type Meddling = fn(&Path) -> io::Result<()>;
        let cases: [(Meddling, &str); 5] = [
            (|path| fs::remove_file(path), "was removed or moved"),
            (|path| fs::remove_dir_all(path.parent().unwrap()), "was removed or moved"),
            (|path| fs::remove_file(path).and_then(|()| fs::write(path, "{}\n")), "was replaced by another"),
            (|path| fs::write(path, "{}"), "was cut short"),
            (
                |path| fs::OpenOptions::new().append(true).open(path)?.write_all(b"{}\n"),
                "was written to by another",
            ),
        ];
        for (meddle, expected) in cases {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out/metrics.jsonl");
            fs::create_dir(path.parent().unwrap()).unwrap();
            let staged = StagedRows::new(path.clone(), &KeptRows::default()).unwrap();
            let mut file = staged.place().unwrap();
            file.append("{\"step\":1}").unwrap();
            meddle(&path).unwrap();
            let fault = file.append("{\"step\":2}").unwrap_err();
            assert!(fault.message.contains(expected), "{fault}");
            assert_eq!(fault.code.exit_status(), 1);
        }
    }
}
