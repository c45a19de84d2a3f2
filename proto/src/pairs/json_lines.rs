//! JSON Lines files of preference pairs. All lines are checked; an error counts the bad lines and describes the first one.

use std::fs::Metadata;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use rayon::prelude::*;

use super::format::{self, blank};
use super::forms::{Form, PassedOver};
use super::source::PairSource;
use super::{PreferencePair, RecordError};
use crate::{Fault, MAX_PAIR_BYTES, counted, files, reading};

const EXPECTED: &str = "each line is one JSON object, with `input`, `preferred_output` and `non_preferred_output` \
    or with TRL's `prompt`, `chosen` and `rejected` (docs/data.md)";

/// A file in memory.
#[derive(Debug)]
pub struct JsonLines {
    path: String,
    text: String,
    /// Without blank lines.
    records: Vec<PairRecord>,
    form: &'static Form,
    passed_over: Vec<String>,
}

impl JsonLines {
    /// Reads and checks a whole file; `key` is its configuration key for errors, e.g. `training_file`.
    pub fn load(key: &str, path: &Path) -> Result<Self, Fault> {
        Self::of_text(key, path, read(key, path)?)
    }

    /// Checks the text of a file, or of its beginning, on all cores. Fails if it holds no record.
    pub fn of_text(key: &str, path: &Path, text: String) -> Result<Self, Fault> {
        let Checked { records, form, passed_over } = check_text(key, path, &text)?;
        let passed_over = passed_over.into_iter().collect();
        Ok(Self { path: path.display().to_string(), text, records, form, passed_over })
    }

    /// Like [`JsonLines::load`]; `beside` processes the text in parallel.
    pub fn load_beside<T: Send>(
        key: &str,
        path: &Path,
        beside: impl FnOnce(&str) -> T + Send,
    ) -> Result<(Self, T), Fault> {
        let text = read(key, path)?;
        let (other, checked) = rayon::join(|| beside(&text), || check_text(key, path, &text));
        let Checked { records, form, passed_over } = checked?;
        let passed_over = passed_over.into_iter().collect();
        Ok((Self { path: path.display().to_string(), text, records, form, passed_over }, other))
    }

    fn line_of(&self, id: u64) -> &str {
        self.records.get(id as usize).map_or("", |record| &self.text[record.place.clone()])
    }
}

impl PairSource for JsonLines {
    fn path(&self) -> &str {
        &self.path
    }

    fn len(&self) -> usize {
        self.records.len()
    }

    fn form(&self) -> &'static Form {
        self.form
    }

    fn passed_over(&self) -> &[String] {
        &self.passed_over
    }

    fn bytes(&self, id: u64) -> usize {
        self.line_of(id).len()
    }

    fn line(&self, id: u64) -> u64 {
        self.records.get(id as usize).map_or(0, |record| record.line)
    }

    fn pair(&self, id: u64) -> Result<PreferencePair, Fault> {
        // Fails only by a defect of Dyad: the line was checked when the file was loaded.
        self.form
            .parse(self.line_of(id))
            .map_err(|error| Fault::failed(format!("{}: {error}", self.place(id))))
    }
}

/// Reads a whole file as UTF-8; `key` is its configuration key for errors, e.g. `training_file`.
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

/// Reads on all cores: most of the time goes into the kernel's copying and clearing of memory.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let file = files::open(path)?;
    let before = file.metadata()?;
    let length = before.len() as usize;
    // Return an error if the memory is not available; `vec!` would abort the process.
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
pub struct PairRecord {
    /// Byte range of its JSON in the text.
    pub place: Range<usize>,
    /// Its line, 1-based, counting blank lines.
    pub line: u64,
}

/// Result of checking some whole lines of a text.
#[derive(Debug, Default)]
struct FilePart {
    records: Vec<PairRecord>,
    lines: u64,
    bad_lines: usize,
    /// Number of the first bad line, 1-based within the part, and its error.
    first_bad: Option<(u64, RecordError)>,
    passed_over: PassedOver,
}

impl FilePart {
    /// Checks the lines in a byte range of the text.
    fn read(form: &Form, text: &str, place: Range<usize>) -> Self {
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
            match check(form, record, &mut part.passed_over) {
                Ok(()) => {
                    let place = offset..offset + record.len();
                    part.records.push(PairRecord { place, line: part.lines });
                }
                Err(error) => {
                    part.bad_lines += 1;
                    part.first_bad.get_or_insert((part.lines, error));
                }
            }
        }
        part
    }

    /// Adds the result of the lines that follow.
    fn join(mut self, next: Self) -> Self {
        let before = self.lines;
        self.records.extend(
            next.records.into_iter().map(|record| PairRecord { line: before + record.line, ..record }),
        );
        self.bad_lines += next.bad_lines;
        let first = next.first_bad.map(|(line, error)| (self.lines + line, error));
        self.first_bad = self.first_bad.or(first);
        self.passed_over.extend(next.passed_over);
        self.lines += next.lines;
        self
    }
}

/// Checks all rules of a line.
fn check(form: &Form, record: &str, passed_over: &mut PassedOver) -> Result<(), RecordError> {
    if record.len() > MAX_PAIR_BYTES {
        return Err(RecordError {
            field: "record".into(),
            problem: format!(
                "{} long; at most {MAX_PAIR_BYTES} bytes of one pair can be sent to a trainer",
                counted(record.len(), "byte")
            ),
        });
    }
    form.check(record, passed_over).map_err(|error| match record.contains('\0') {
        true => RecordError {
            field: "record".into(),
            problem: "holds NUL bytes; was the file cut off while it was written or copied?".into(),
        },
        false => error,
    })
}

/// Splits a text after line ends into parts of slightly more than `bytes` bytes.
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

/// Result of checking a whole text.
#[derive(Debug)]
struct Checked {
    records: Vec<PairRecord>,
    form: &'static Form,
    passed_over: PassedOver,
}

/// The form of the first line that is not blank.
fn form_of(text: &str) -> &'static Form {
    let mut lines = text.split('\n').map(|line| line.trim_start_matches(blank).trim_end());
    Form::of(lines.find(|line| !line.is_empty()).unwrap_or_default())
}

/// Checks all lines on all cores and returns the place of each record; skips blank lines. Fails if there is no record.
fn check_text(key: &str, path: &Path, text: &str) -> Result<Checked, Fault> {
    let form = form_of(text);
    let read = |place| FilePart::read(form, text, place);
    let parts: Vec<FilePart> = parts(text, PART).into_par_iter().map(read).collect();
    let whole = parts.into_iter().fold(FilePart::default(), FilePart::join);
    match whole.first_bad {
        Some((line, error)) => {
            if let Some(other) = format::of_text(text) {
                return Err(
                    Fault::input(format!("{key} {} is {}", path.display(), other.what)).hint(other.remedy)
                );
            }
            let bad = whole.bad_lines;
            let more = if bad > 1 { format!(" (the first of {bad} bad lines)") } else { String::new() };
            let first = text.split('\n').nth(line as usize - 1).unwrap_or_default();
            let fault = Fault::input(format!("{} line {line}: {error}{more}", path.display()));
            Err(match Form::recognised(first.trim_start_matches(blank)) {
                Some(other) if other.name != form.name => fault.hint(format!(
                    "all lines of a file have the same fields: the first line has {} ({} form), this one {} ({} form)",
                    form.fields, form.name, other.fields, other.name
                )),
                _ => fault.hint(EXPECTED),
            })
        }
        None if whole.records.is_empty() => {
            Err(Fault::input(format!("{key} {} holds no preference pairs", path.display())).hint(EXPECTED))
        }
        None => Ok(Checked { records: whole.records, form, passed_over: whole.passed_over }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn found(text: &str) -> Result<Vec<PairRecord>, Fault> {
        check_text("training_file", Path::new("train.jsonl"), text).map(|checked| checked.records)
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
    fn splitting_into_parts_does_not_change_the_result() {
        let texts = [
            "".into(),
            "\n".into(),
            format!("{GOOD}\n\n {GOOD}\n[]\n{{}}\n{GOOD}"),
            format!("7\n{GOOD}\n\n"),
        ];
        for text in texts {
            let whole = FilePart::read(form_of(&text), &text, 0..text.len());
            for bytes in [1, 3, GOOD.len(), 2 * GOOD.len(), 1 << 20] {
                let read =
                    parts(&text, bytes).into_iter().map(|place| FilePart::read(form_of(&text), &text, place));
                let joined = read.fold(FilePart::default(), FilePart::join);
                assert_eq!(format!("{joined:?}"), format!("{whole:?}"), "parts of {bytes} bytes");
            }
        }
    }

    #[test]
    fn a_line_of_another_form_gets_a_hint() {
        let trl = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
        assert_eq!(found(&format!("{trl}\n{trl}\n")).unwrap().len(), 2);
        for (text, field) in
            [(format!("{GOOD}\n{trl}\n"), "unknown field `prompt`"), (format!("{trl}\n{GOOD}\n"), "missing")]
        {
            let fault = found(&text).unwrap_err();
            assert!(
                fault.message.starts_with("train.jsonl line 2: ") && fault.message.contains(field),
                "{fault}"
            );
            assert!(fault.hint.starts_with("all lines of a file have the same fields"), "{}", fault.hint);
        }
    }

    #[test]
    fn names_of_unread_columns_are_kept() {
        let lines: String = ["id", "score"]
            .map(|name| {
                format!("{{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\", \"{name}\": 1}}\n")
            })
            .concat();
        let source = JsonLines::of_text("training_file", Path::new("train.jsonl"), lines).unwrap();
        assert_eq!(
            (source.passed_over(), source.form().name),
            (&["id".to_owned(), "score".to_owned()][..], "TRL")
        );
    }

    #[test]
    fn a_file_without_pairs_is_refused() {
        assert_eq!(found(" \n").unwrap_err().message, "training_file train.jsonl holds no preference pairs");
    }

    #[test]
    fn byte_order_marks_are_ignored() {
        let text = format!("\u{feff}{GOOD}\r\n\u{feff}{GOOD}\r\n\u{feff}\r\n");
        let records = found(&text).unwrap();
        assert_eq!(records.iter().map(|record| &text[record.place.clone()]).collect::<Vec<_>>(), [GOOD; 2]);
    }

    #[test]
    fn nul_bytes_and_overlong_lines_are_refused() {
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
    fn invalid_utf8_is_reported_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, b"{}\n\xff\xfe\n").unwrap();
        assert!(read("training_file", &path).unwrap_err().message.ends_with("line 2: not valid UTF-8"));
    }
}
