//! Reads the records of files, one window after the other, in bounded memory.

use std::ops::Range;

use dyad_proto::Fault;
use dyad_proto::pairs::forms::Form;
use dyad_proto::pairs::json_lines::blank;
use dyad_proto::pairs::source::Located;
use dyad_proto::pairs::windows::{PART, WINDOW, Windows};
use dyad_proto::run_config::{DataFiles, DatasetFormat};
use dyad_sources::lines;
use dyad_sources::places::originals;
use dyad_sources::remote::Fetch;
use rayon::prelude::*;

/// The files of some places, unpacked. `key` is the option that names them, for errors.
pub fn files(key: &str, places: &DataFiles) -> Result<Vec<Located>, Fault> {
    let originals = originals(key, places, Fetch::Missing)?.unwrap_or_default();
    originals.iter().map(|original| lines::of(key, &original.shown, &original.path)).collect()
}

/// A line with a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its number in the file, from 1, blank lines counted.
    pub number: u64,
    /// Its place in the window.
    pub place: Range<usize>,
}

/// Whole lines of a file.
#[derive(Debug)]
pub struct Window {
    /// The text.
    pub text: String,
    /// The lines that are not blank.
    pub lines: Vec<Line>,
}

impl Window {
    /// The record of a line.
    #[must_use]
    pub fn record(&self, line: &Line) -> &str {
        &self.text[line.place.clone()]
    }

    /// Some consecutive lines for each task of a thread pool.
    pub fn parts(&self) -> impl IndexedParallelIterator<Item = &[Line]> {
        let each = (self.lines.len() * PART / self.text.len().max(1)).clamp(1, 4096);
        self.lines.par_chunks(each)
    }
}

/// The windows of one file, and the form of its records.
#[derive(Debug)]
pub struct Records {
    windows: Windows,
    lines: u64,
    form: Option<&'static Form>,
}

impl Records {
    /// Opens a file. The first record decides the form, unless `format` does.
    pub fn open(key: &str, file: &Located, format: DatasetFormat) -> Result<Self, Fault> {
        let windows = Windows::open(key, file, |_| WINDOW)?;
        Ok(Self { windows, lines: 0, form: Form::of_format(format) })
    }

    /// The form; `None` before the first record.
    #[must_use]
    pub fn form(&self) -> Option<&'static Form> {
        self.form
    }

    /// The next window; `None` at the end of the file.
    #[allow(clippy::should_implement_trait, reason = "an iterator would not stop at an error")]
    pub fn next(&mut self) -> Result<Option<Window>, Fault> {
        let Some(text) = self.windows.next()? else { return Ok(None) };
        let mut lines = Vec::new();
        let mut start = 0;
        for line in text.split_inclusive('\n') {
            self.lines += 1;
            let record = line.trim_start_matches(blank);
            let offset = start + (line.len() - record.len());
            let record = record.trim_end();
            start += line.len();
            if !record.is_empty() {
                lines.push(Line { number: self.lines, place: offset..offset + record.len() });
            }
        }
        if let (None, Some(first)) = (self.form, lines.first()) {
            self.form = Some(Form::of(&text[first.place.clone()]));
        }
        Ok(Some(Window { text, lines }))
    }
}
