//! Reads a file of lines in windows of whole lines, on all cores, in bounded memory.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use rayon::prelude::*;

use super::format;
use super::source::{Located, Unit};
use crate::{Fault, MAX_PAIR_BYTES, counted, files, reading};

/// Bytes that one core reads or checks at a time.
pub const PART: usize = 1 << 20;

/// Bytes of a window of a file that is not kept in memory.
pub const WINDOW: usize = 32 << 20;

/// Size and time of change of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u64, SystemTime);

impl State {
    /// The state of an open file.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Self::in_metadata(&file.metadata()?)
    }

    fn in_metadata(about: &Metadata) -> io::Result<Self> {
        Ok(Self(about.len(), about.modified()?))
    }
}

/// A file that is being read from its beginning to its end.
#[derive(Debug)]
pub struct Windows {
    key: String,
    shown: String,
    unit: Unit,
    file: File,
    before: State,
    /// Bytes that were read.
    at: u64,
    size: usize,
    /// Read, but not returned: the beginning of the next window.
    tail: Vec<u8>,
    /// Lines that were returned.
    lines: u64,
}

impl Windows {
    /// Opens a file; `key` is its configuration key for errors. A window has `size` bytes and the rest of its last line.
    pub fn open(key: &str, place: &Located, size: impl FnOnce(u64) -> usize) -> Result<Self, Fault> {
        let opened = files::open(&place.path).and_then(|file| Ok((State::of(&file)?, file)));
        let (before, file) = opened.map_err(|error| unreadable(key, &place.shown, &error))?;
        let size = size(before.0).max(1);
        let (key, shown, unit) = (key.to_owned(), place.shown.clone(), place.unit);
        Ok(Self { key, shown, unit, file, before, at: 0, size, tail: Vec::new(), lines: 0 })
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.before.0
    }

    /// The file, after it was read.
    pub(super) fn into_file(self) -> (File, State) {
        (self.file, self.before)
    }

    /// The next whole lines; `None` at the end of the file.
    #[allow(clippy::should_implement_trait, reason = "an iterator would not stop at an error")]
    pub fn next(&mut self) -> Result<Option<String>, Fault> {
        let first = self.at == 0;
        let mut bytes = std::mem::take(&mut self.tail);
        let mut searched = 0;
        let end = loop {
            let wanted = (self.length() - self.at).min(self.size as u64) as usize;
            if wanted == 0 {
                break bytes.len();
            }
            self.append(&mut bytes, wanted).map_err(|error| unreadable(&self.key, &self.shown, &error))?;
            if let Some(other) = format::of_bytes(&bytes).filter(|_| first) {
                return Err(
                    Fault::input(format!("{} {} is {}", self.key, self.shown, other.what)).hint(other.remedy)
                );
            }
            if self.at == self.length() {
                break bytes.len();
            }
            if let Some(at) = bytes[searched..].iter().rposition(|byte| *byte == b'\n') {
                break searched + at + 1;
            }
            searched = bytes.len();
            if searched > MAX_PAIR_BYTES {
                return Err(self.endless(&bytes));
            }
        };
        if bytes.is_empty() {
            return Ok(None);
        }
        self.tail = bytes.split_off(end);
        let text = self.text(bytes)?;
        self.lines += text.bytes().filter(|byte| *byte == b'\n').count() as u64;
        Ok(Some(text))
    }

    /// Reads on all cores: most of the time goes into the kernel's copying and clearing of memory.
    fn append(&mut self, bytes: &mut Vec<u8>, wanted: usize) -> io::Result<()> {
        // Return an error if the memory is not available; `resize` would abort the process.
        bytes.try_reserve_exact(wanted).map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
        let (start, at, file) = (bytes.len(), self.at, &self.file);
        bytes.resize(start + wanted, 0);
        let part = |(number, part): (usize, &mut [u8])| -> io::Result<()> {
            file.read_exact_at(part, at + (number * PART) as u64)?;
            reading::goes_on();
            Ok(())
        };
        let read = bytes[start..].par_chunks_mut(PART).enumerate().try_for_each(part);
        self.at += wanted as u64;
        match read {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
            Ok(()) if self.before == State::of(&self.file)? => Ok(()),
            _ => Err(io::Error::other("it changed while it was read")),
        }
    }

    fn text(&self, bytes: Vec<u8>) -> Result<String, Fault> {
        String::from_utf8(bytes).map_err(|error| {
            let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = self.lines + 1 + valid.iter().filter(|byte| **byte == b'\n').count() as u64;
            Fault::input(format!("{} {} {line}: not valid UTF-8", self.shown, self.unit)).hint(
                "save the file as UTF-8; iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW converts most older files",
            )
        })
    }

    fn endless(&self, bytes: &[u8]) -> Fault {
        let beginning = String::from_utf8_lossy(&bytes[..PART.min(bytes.len())]);
        match format::of_text(&beginning) {
            Some(other) => {
                Fault::input(format!("{} {} is {}", self.key, self.shown, other.what)).hint(other.remedy)
            }
            None => Fault::input(format!(
                "{} {} {}: record: more than {} long; at most {MAX_PAIR_BYTES} bytes of one pair can be sent to a trainer",
                self.shown,
                self.unit,
                self.lines + 1,
                counted(bytes.len() as u64, "byte")
            ))
            .hint("each pair is one line; does the file have line ends?"),
        }
    }
}

fn unreadable(key: &str, shown: &str, error: &io::Error) -> Fault {
    Fault::input(format!("cannot read {key} {shown}: {error}"))
        .hint(format!("`{key}` takes the path of a file of preference pairs (docs/data.md)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(text: impl AsRef<[u8]>, size: usize) -> Result<Vec<String>, Fault> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, text).unwrap();
        let mut windows = Windows::open("training_file", &Located::here(&path), |_| size)?;
        let mut all = Vec::new();
        while let Some(text) = windows.next()? {
            all.push(text);
        }
        Ok(all)
    }

    #[test]
    fn windows_of_any_size_are_whole_lines_and_together_the_file() {
        for text in ["", "\n", "a\nbcd\n\ne", "abcdefgh\nä\n", "x"] {
            for size in 1..12 {
                let all = windows(text, size).unwrap();
                assert_eq!(all.concat(), text, "{size}");
                let whole = |at: usize| all[at].ends_with('\n') || at + 1 == all.len();
                assert!((0..all.len()).all(whole), "{size}: {all:?}");
            }
        }
    }

    #[test]
    fn a_large_file_is_read_whole() {
        let text: String = (0..PART / 4).map(|at| format!("{at}\n")).collect();
        assert!(text.len() > PART && windows(&text, usize::MAX).unwrap() == [text]);
    }

    #[test]
    fn invalid_utf8_is_reported_with_its_line() {
        for size in [1, 4, 100] {
            let fault = windows(b"{}\n\xff\xfe\n", size).unwrap_err();
            assert!(fault.message.ends_with("line 2: not valid UTF-8"), "{fault}");
        }
    }

    #[test]
    fn another_format_and_a_file_without_line_ends_are_refused() {
        let fault = windows(b"\x1f\x8b\x08\x00", 100).unwrap_err();
        assert!(fault.message.contains(" is a gzip file"), "{fault}");
        let fault = windows("x".repeat(MAX_PAIR_BYTES + (2 << 20)), 1 << 20).unwrap_err();
        assert!(fault.message.contains("line 1: record: more than "), "{fault}");
    }
}
