//! A JSON Lines file of preference pairs: every line checked, every bad one counted, the first one named.

mod format;

use std::fs::Metadata;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use rayon::prelude::*;

use crate::preference::{PreferencePair, RecordError};
use crate::{Fault, MAX_PAIR_BYTES, counted, files, reading};

const EXPECTED: &str =
    "each line is one JSON object with `input`, `preferred_output` and `non_preferred_output`";

/// Reads a whole file; `key` names it in errors, e.g. `training_file`.
pub fn read(key: &str, path: &Path) -> Result<String, Fault> {
    let shown = path.display();
    let bytes = read_bytes(path).map_err(|error| {
        Fault::input(format!("cannot read {key} {shown}: {error}"))
            .hint(format!("`{key}` takes the path of a JSON Lines file of preference pairs"))
    })?;
    if let Some(other) = format::of_bytes(&bytes) {
        return Err(Fault::input(format!("{key} {shown} is {}", other.what)).hint(other.remedy));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        Fault::input(format!("{shown} line {line}: not valid UTF-8")).hint(
            "save the file as UTF-8; iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW converts most older files",
        )
    })
}

/// Read by all cores: most of it is the kernel's copying and clearing of memory.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let file = files::open(path)?;
    let before = file.metadata()?;
    let length = before.len() as usize;
    // What cannot be had is an error here; the vector that is filled would end the process.
    Vec::<u8>::new()
        .try_reserve_exact(length)
        .map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
    let mut bytes = vec![0; length];
    let part = |(at, part): (usize, &mut [u8])| -> io::Result<()> {
        file.read_exact_at(part, (at * PART) as u64)?;
        reading::goes_on();
        Ok(())
    };
    let read = bytes.par_chunks_mut(PART).enumerate().try_for_each(part);
    match read {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        Ok(()) if state(&before)? == state(&file.metadata()?)? => Ok(bytes),
        _ => Err(io::Error::other("it changed while it was read")),
    }
}

fn state(about: &Metadata) -> io::Result<(u64, SystemTime)> {
    Ok((about.len(), about.modified()?))
}

/// Bytes that one core reads or checks at a time.
const PART: usize = 1 << 20;

/// A pair in the text of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where its JSON lies.
    pub place: Range<usize>,
    /// Its line, from 1 on, blank lines counted.
    pub line: u64,
}

/// What stands before the JSON of a line and is no part of it. Editors on Windows put a byte order mark before a file's first
/// line; files that were put together have it inside.
fn blank(letter: char) -> bool {
    letter.is_whitespace() || letter == '\u{feff}'
}

/// What is found in whole lines of a text.
#[derive(Debug, Default)]
struct Part {
    records: Vec<Record>,
    lines: u64,
    bad_lines: usize,
    /// Number of the first bad line, from 1 on, and what is wrong with it.
    first_bad: Option<(u64, RecordError)>,
}

impl Part {
    /// Checks the lines between two places of the text.
    fn read(text: &str, place: Range<usize>) -> Self {
        reading::goes_on();
        let mut part = Self::default();
        let mut start = place.start;
        for line in text[place].split_inclusive('\n') {
            part.lines += 1;
            let record = line.trim_start_matches(blank);
            let offset = start + (line.len() - record.len());
            let record = record.trim_end();
            start += line.len();
            if record.is_empty() {
                continue;
            }
            match check(record) {
                Ok(()) => {
                    let place = offset..offset + record.len();
                    part.records.push(Record { place, line: part.lines });
                }
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
        let before = self.lines;
        self.records
            .extend(next.records.into_iter().map(|record| Record { line: before + record.line, ..record }));
        self.bad_lines += next.bad_lines;
        let first = next.first_bad.map(|(line, error)| (self.lines + line, error));
        self.first_bad = self.first_bad.or(first);
        self.lines += next.lines;
        self
    }
}

/// Every rule that a line must keep.
fn check(record: &str) -> Result<(), RecordError> {
    if record.len() > MAX_PAIR_BYTES {
        return Err(RecordError {
            field: "record".into(),
            problem: format!(
                "{} long; at most {MAX_PAIR_BYTES} bytes of one pair can be sent to a trainer",
                counted(record.len(), "byte")
            ),
        });
    }
    PreferencePair::check(record).map_err(|error| match record.contains('\0') {
        true => RecordError {
            field: "record".into(),
            problem: "holds NUL bytes; was the file cut off while it was written or copied?".into(),
        },
        false => error,
    })
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
pub fn records(key: &str, path: &Path, text: &str) -> Result<Vec<Record>, Fault> {
    let parts: Vec<Part> = parts(text, PART).into_par_iter().map(|place| Part::read(text, place)).collect();
    let whole = parts.into_iter().fold(Part::default(), Part::join);
    match whole.first_bad {
        Some((line, error)) => {
            if let Some(other) = format::of_text(text) {
                return Err(
                    Fault::input(format!("{key} {} is {}", path.display(), other.what)).hint(other.remedy)
                );
            }
            let bad = whole.bad_lines;
            let more = if bad > 1 { format!(" (the first of {bad} bad lines)") } else { String::new() };
            let first = text.lines().nth(line as usize - 1).unwrap_or_default();
            let hint = conversion(first).unwrap_or(EXPECTED);
            Err(Fault::input(format!("{} line {line}: {error}{more}", path.display())).hint(hint))
        }
        None if whole.records.is_empty() => {
            Err(Fault::input(format!("{key} {} holds no preference pairs", path.display())).hint(EXPECTED))
        }
        None => Ok(whole.records),
    }
}

/// A command that converts TRL's form, `prompt` with `chosen` and `rejected`, each a text or a list of messages.
const CONVERSION: &str = r#"this is TRL's form; convert it: python3 -c 'import json,sys; m=lambda role,x: x if isinstance(x,list) else [{"role":role,"content":x}]; [print(json.dumps({"input":{"messages":m("user",r["prompt"])},"preferred_output":m("assistant",r["chosen"]),"non_preferred_output":m("assistant",r["rejected"])})) for r in map(json.loads,sys.stdin)]' < OLD.jsonl > NEW.jsonl"#;
/// The same where the prompt is the beginning of both conversations.
const CONVERSION_OF_CONVERSATIONS: &str = r#"this is TRL's form with the prompt inside; convert it: python3 -c 'import json,sys; [print(json.dumps({"input":{"messages":r["chosen"][:-1]},"preferred_output":r["chosen"][-1:],"non_preferred_output":r["rejected"][-1:]})) for r in map(json.loads,sys.stdin)]' < OLD.jsonl > NEW.jsonl"#;

/// How to convert a file whose records look like this one.
fn conversion(record: &str) -> Option<&'static str> {
    let record: serde_json::Value = serde_json::from_str(record.trim_start_matches(blank)).ok()?;
    let (chosen, rejected) = (record.get("chosen")?, record.get("rejected")?);
    let conversations = chosen.is_array() && rejected.is_array();
    match record.get("prompt") {
        Some(_) => Some(CONVERSION),
        None => conversations.then_some(CONVERSION_OF_CONVERSATIONS),
    }
}

/// The pairs of a small file, each with its line.
pub fn pairs(key: &str, path: &Path) -> Result<Vec<(u64, PreferencePair)>, Fault> {
    let text = read(key, path)?;
    let parse = |record: Record| {
        let pair = PreferencePair::parse(&text[record.place]);
        let pair = pair.map_err(|error| {
            Fault::input(format!("{} line {}: {error}", path.display(), record.line)).hint(EXPECTED)
        })?;
        Ok((record.line, pair))
    };
    records(key, path, &text)?.into_iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn found(text: &str) -> Result<Vec<Record>, Fault> {
        records("training_file", Path::new("train.jsonl"), text)
    }

    #[test]
    fn blank_lines_are_no_records_but_count_as_lines() {
        let text = format!("\n  {GOOD}\r\n\n{GOOD}");
        let records = found(&text).unwrap();
        assert!(records.iter().all(|record| &text[record.place.clone()] == GOOD));
        assert_eq!(records.iter().map(|record| record.line).collect::<Vec<_>>(), [2, 4]);
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
    fn byte_order_marks_are_no_part_of_a_line() {
        let text = format!("\u{feff}{GOOD}\r\n\u{feff}{GOOD}\r\n\u{feff}\r\n");
        let records = found(&text).unwrap();
        assert_eq!(records.iter().map(|record| &text[record.place.clone()]).collect::<Vec<_>>(), [GOOD; 2]);
    }

    #[test]
    fn bytes_of_no_text_and_lines_of_no_end_are_named() {
        let fault = found(&format!("{GOOD}\n\0\0\0\0")).unwrap_err();
        assert!(fault.message.starts_with("train.jsonl line 2: record: holds NUL bytes"), "{fault}");
        let long = GOOD.replace("Hello", &"x".repeat(MAX_PAIR_BYTES));
        let fault = found(&format!("{GOOD}\n{long}\n")).unwrap_err();
        assert!(fault.message.starts_with("train.jsonl line 2: record: 67043499 bytes long"), "{fault}");
        assert!(fault.message.contains("at most 67043328 bytes"), "{fault}");
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        let fault = found("[\n {},\n {}\n]\n").unwrap_err();
        assert_eq!(fault.message, "training_file train.jsonl is one JSON array, not JSON Lines");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, b"\x1f\x8b\x08\x00").unwrap();
        let fault = read("validation_file", &path).unwrap_err();
        assert!(
            fault.message.starts_with("validation_file ") && fault.message.contains(" is a gzip file"),
            "{fault}"
        );
        assert!(fault.hint.contains("gunzip"), "{fault}");
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
