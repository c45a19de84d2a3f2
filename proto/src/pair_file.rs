//! A JSON Lines file of preference pairs: every line checked, every bad one counted, the first one named.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rayon::prelude::*;

use crate::Fault;
use crate::preference::{PreferencePair, RecordError};

const EXPECTED: &str =
    "each line is one JSON object with `input`, `preferred_output` and `non_preferred_output`";

/// Reads a whole file; `key` names it in errors, e.g. `training_file`.
pub fn read(key: &str, path: &Path) -> Result<String, Fault> {
    let shown = path.display();
    let bytes = read_bytes(path).map_err(|error| {
        Fault::input(format!("cannot read {key} {shown}: {error}"))
            .hint(format!("`{key}` takes the path of a JSON Lines file of preference pairs"))
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        Fault::input(format!("{shown} line {line}: not valid UTF-8")).hint("save the file as UTF-8")
    })
}

/// Large files are read by all cores: most of it is the kernel's copying and clearing of memory.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let about = file.metadata()?;
    if !about.is_file() || about.len() <= PART as u64 {
        // Not by its path: a pipe that is opened twice waits for a second writer.
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    let mut bytes = vec![0; about.len() as usize];
    let part = |(at, part): (usize, &mut [u8])| file.read_exact_at(part, (at * PART) as u64);
    bytes.par_chunks_mut(PART).enumerate().try_for_each(part)?;
    Ok(bytes)
}

/// Bytes that one core reads or checks at a time.
const PART: usize = 1 << 20;

/// What is found in whole lines of a text.
#[derive(Debug, Default)]
struct Part {
    records: Vec<Range<usize>>,
    lines: usize,
    bad_lines: usize,
    /// Number of the first bad line, from 1 on, and what is wrong with it.
    first_bad: Option<(usize, RecordError)>,
}

impl Part {
    /// Checks the lines between two places of the text.
    fn read(text: &str, place: Range<usize>) -> Self {
        let mut part = Self::default();
        let mut start = place.start;
        for line in text[place].split_inclusive('\n') {
            part.lines += 1;
            let record = line.trim();
            let offset = start + (line.len() - line.trim_start().len());
            start += line.len();
            if record.is_empty() {
                continue;
            }
            match PreferencePair::check(record) {
                Ok(()) => part.records.push(offset..offset + record.len()),
                Err(error) => {
                    part.bad_lines += 1;
                    part.first_bad.get_or_insert((part.lines, error));
                }
            }
        }
        part
    }

    /// Adds what was found in the lines that follow.
    fn join(mut self, next: Self) -> Self {
        self.records.extend(next.records);
        self.bad_lines += next.bad_lines;
        let first = next.first_bad.map(|(line, error)| (self.lines + line, error));
        self.first_bad = self.first_bad.or(first);
        self.lines += next.lines;
        self
    }
}

/// Cuts a text after line ends, into parts of about so many bytes.
fn parts(text: &str, bytes: usize) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let rest = text.as_bytes().get(start + bytes..).unwrap_or_default();
        let end = rest.iter().position(|byte| *byte == b'\n').map_or(text.len(), |at| start + bytes + at + 1);
        parts.push(start..end);
        start = end;
    }
    parts
}

/// Where each record lies in the text; blank lines are no records. No record at all is an error, too. Uses all cores.
pub fn records(key: &str, path: &Path, text: &str) -> Result<Vec<Range<usize>>, Fault> {
    let parts: Vec<Part> = parts(text, PART).into_par_iter().map(|place| Part::read(text, place)).collect();
    let whole = parts.into_iter().fold(Part::default(), Part::join);
    match whole.first_bad {
        Some((line, error)) => {
            let bad = whole.bad_lines;
            let more = if bad > 1 { format!(" (the first of {bad} bad lines)") } else { String::new() };
            Err(Fault::input(format!("{} line {line}: {error}{more}", path.display())).hint(EXPECTED))
        }
        None if whole.records.is_empty() => {
            Err(Fault::input(format!("{key} {} holds no preference pairs", path.display())).hint(EXPECTED))
        }
        None => Ok(whole.records),
    }
}

/// The pairs of a small file.
pub fn pairs(key: &str, path: &Path) -> Result<Vec<PreferencePair>, Fault> {
    let text = read(key, path)?;
    let parse = |record: Range<usize>| {
        PreferencePair::parse(&text[record])
            .map_err(|error| Fault::input(format!("{}: {error}", path.display())))
    };
    records(key, path, &text)?.into_iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn found(text: &str) -> Result<Vec<Range<usize>>, Fault> {
        records("training_file", Path::new("train.jsonl"), text)
    }

    #[test]
    fn blank_lines_are_no_records_but_count_as_lines() {
        let text = format!("\n  {GOOD}\r\n\n{GOOD}");
        let records = found(&text).unwrap();
        assert!(records.len() == 2 && records.into_iter().all(|record| &text[record] == GOOD));
        let fault = found(&format!("{GOOD}\n\n{{}}\n[]\n")).unwrap_err();
        assert!(fault.message.starts_with("train.jsonl line 3: "), "{fault}");
        assert!(fault.message.ends_with("(the first of 2 bad lines)"), "{fault}");
    }

    #[test]
    fn parts_change_nothing() {
        let texts = [
            "".into(),
            "\n".into(),
            format!("{GOOD}\n\n {GOOD}\n[]\n{{}}\n{GOOD}"),
            format!("7\n{GOOD}\n\n"),
        ];
        for text in texts {
            let whole = Part::read(&text, 0..text.len());
            for bytes in [1, 3, GOOD.len(), 2 * GOOD.len(), 1 << 20] {
                let read = parts(&text, bytes).into_iter().map(|place| Part::read(&text, place));
                let joined = read.fold(Part::default(), Part::join);
                assert_eq!(format!("{joined:?}"), format!("{whole:?}"), "parts of {bytes} bytes");
            }
        }
    }

    #[test]
    fn a_file_without_pairs_is_refused() {
        assert_eq!(found(" \n").unwrap_err().message, "training_file train.jsonl holds no preference pairs");
    }

    #[test]
    fn a_large_file_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let text: String = (0..PART / 4).map(|at| format!("{at}\n")).collect();
        std::fs::write(&path, &text).unwrap();
        assert!(text.len() > PART && read("training_file", &path).unwrap() == text);
    }

    #[test]
    fn bytes_that_are_no_text_are_named_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, b"{}\n\xff\xfe\n").unwrap();
        assert!(read("training_file", &path).unwrap_err().message.ends_with("line 2: not valid UTF-8"));
    }
}
