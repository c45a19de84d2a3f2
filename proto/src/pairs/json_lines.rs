//! JSON Lines files of preference pairs. All lines are checked; an error counts the bad lines and describes the first one.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rayon::prelude::*;

pub use super::format::blank;
use super::format::{self, Format};
use super::forms::{Form, PassedOver};
use super::source::{FileNotes, Located, PairSource, Unit};
use super::wanted::Wanted;
use super::windows::{PART, State, WINDOW, Windows};
use super::{Example, RecordError};
use crate::{Fault, MAX_PAIR_BYTES, counted, reading};

const EXPECTED: &str = "each line is one JSON object: of pairs, with `input`, `preferred_output` and `non_preferred_output` \
    or with TRL's `prompt`, `chosen` and `rejected`; docs/data.md has all forms";

/// A larger file stays on the disk, and a pair is read when it is needed.
const MOST_IN_MEMORY: u64 = 256 << 20;

/// Most bytes of the unit and number of a record in its place.
const PLACE_BYTES: usize = 32;

/// A checked file.
#[derive(Debug)]
pub struct JsonLines {
    shown: String,
    unit: Unit,
    content: Content,
    /// Without blank lines.
    records: Vec<PairRecord>,
    form: &'static Form,
    passed_over: Vec<String>,
}

/// Where the text of a file is.
#[derive(Debug)]
enum Content {
    Memory(String),
    Disk(File, State),
}

impl JsonLines {
    /// Reads and checks a whole file; `key` is its configuration key for errors, e.g. `training_file`. `beside` gets the file's bytes in
    /// order and in parallel, e.g. to compute a checksum.
    pub fn load(
        key: &str,
        place: &Located,
        wanted: Wanted,
        beside: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Self, Fault> {
        Self::load_by(key, place, wanted, beside, MOST_IN_MEMORY)
    }

    fn load_by(
        key: &str,
        place: &Located,
        wanted: Wanted,
        beside: &mut (dyn FnMut(&[u8]) + Send),
        most_in_memory: u64,
    ) -> Result<Self, Fault> {
        let size = |length| if length <= most_in_memory { length as usize } else { WINDOW };
        let mut windows = Windows::open(key, place, size)?;
        let kept = windows.length() <= most_in_memory;
        let (mut scan, mut memory) = (Scan::new(wanted), String::new());
        while let Some(text) = windows.next()? {
            rayon::join(|| beside(text.as_bytes()), || scan.add(&text));
            if kept {
                memory = text;
            }
        }
        let content = if kept {
            Content::Memory(memory)
        } else {
            let (file, state) = windows.into_file();
            Content::Disk(file, state)
        };
        scan.finish(key, place, wanted, content)
    }

    /// Checks the text of a file, or of its beginning, on all cores. Fails if it holds no record.
    pub fn of_text(key: &str, place: &Located, wanted: Wanted, text: String) -> Result<Self, Fault> {
        let mut scan = Scan::new(wanted);
        scan.add(&text);
        scan.finish(key, place, wanted, Content::Memory(text))
    }

    fn line(&self, id: u64) -> u64 {
        self.records.get(id as usize).map_or(0, |record| record.line)
    }

    /// The JSON of a pair.
    pub fn record(&self, id: u64) -> Result<String, Fault> {
        let Some(record) = self.records.get(id as usize) else { return Ok(String::new()) };
        let Range { start, end } = record.place;
        match &self.content {
            Content::Memory(text) => Ok(text[start as usize..end as usize].to_owned()),
            Content::Disk(file, state) => {
                let mut bytes = vec![0; (end - start) as usize];
                let changed = || {
                    Fault::failed(format!("{} was changed while the run reads it", self.shown)).hint(
                        "start again with a file that stays as it is; a resume needs the former content",
                    )
                };
                let read = file.read_exact_at(&mut bytes, start).and_then(|()| State::of(file));
                match read {
                    Ok(now) if now == *state => String::from_utf8(bytes).map_err(|_| changed()),
                    Ok(_) => Err(changed()),
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(changed()),
                    Err(error) => Err(Fault::failed(format!("cannot read {}: {error}", self.shown))),
                }
            }
        }
    }
}

impl PairSource for JsonLines {
    fn len(&self) -> usize {
        self.records.len()
    }

    fn files(&self) -> Vec<FileNotes<'_>> {
        vec![FileNotes { path: &self.shown, first: 0, form: self.form, passed_over: &self.passed_over }]
    }

    fn bytes(&self, id: u64) -> usize {
        let place = self.shown.len() + PLACE_BYTES;
        self.records
            .get(id as usize)
            .map_or(0, |record| (record.place.end - record.place.start) as usize + place)
    }

    fn pair(&self, id: u64) -> Result<Example, Fault> {
        // Fails only by a defect of Dyad: the line was checked when the file was loaded.
        self.form
            .parse(&self.record(id)?)
            .map_err(|error| Fault::failed(format!("{}: {error}", self.place(id))))
    }

    fn place(&self, id: u64) -> String {
        format!("{} {} {}", self.shown, self.unit, self.line(id))
    }
}

/// A pair in the text of its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairRecord {
    /// Byte range of its JSON in the file.
    pub place: Range<u64>,
    /// Its line, 1-based, counting blank lines.
    pub line: u64,
}

/// The first bad line of a part.
#[derive(Debug)]
struct FirstBad {
    /// 1-based within the part.
    line: u64,
    error: RecordError,
    /// The form that recognises it.
    form: Option<&'static Form>,
}

/// Result of checking some whole lines of a text.
#[derive(Debug, Default)]
struct FilePart {
    records: Vec<PairRecord>,
    lines: u64,
    bad_lines: usize,
    first_bad: Option<FirstBad>,
    passed_over: PassedOver,
}

impl FilePart {
    /// Checks the lines in a byte range of a text that begins at byte `before` of its file.
    fn read(form: &Form, text: &str, place: Range<usize>, before: u64) -> Self {
        reading::goes_on();
        let mut part = Self::default();
        let mut start = before + place.start as u64;
        for line in text[place].split_inclusive('\n') {
            part.lines += 1;
            let record = line.trim_start_matches(blank);
            let offset = start + (line.len() - record.len()) as u64;
            let record = record.trim_end();
            start += line.len() as u64;
            if record.is_empty() {
                continue;
            }
            match check(form, record, &mut part.passed_over) {
                Ok(()) => {
                    let place = offset..offset + record.len() as u64;
                    part.records.push(PairRecord { place, line: part.lines });
                }
                Err(error) => {
                    part.bad_lines += 1;
                    part.first_bad.get_or_insert_with(|| FirstBad {
                        line: part.lines,
                        error,
                        form: Form::recognised(record),
                    });
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
        let first = next.first_bad.map(|bad| FirstBad { line: self.lines + bad.line, ..bad });
        self.first_bad = self.first_bad.or(first);
        self.passed_over.extend(next.passed_over);
        self.lines += next.lines;
        self
    }
}

/// Checks all rules of a line.
fn check(form: &Form, record: &str, passed_over: &mut PassedOver) -> Result<(), RecordError> {
    short_enough(record)?;
    form.check(record, passed_over).map_err(|error| or_cut_off(record, error))
}

/// Checks all rules of a line and reads it; adds the names of unread fields to `passed_over`.
pub fn examine(form: &Form, record: &str, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
    short_enough(record)?;
    form.examine(record, passed_over).map_err(|error| or_cut_off(record, error))
}

fn short_enough(record: &str) -> Result<(), RecordError> {
    if record.len() <= MAX_PAIR_BYTES {
        return Ok(());
    }
    Err(RecordError {
        field: "record".into(),
        problem: format!(
            "{} long; at most {MAX_PAIR_BYTES} bytes of one pair can be sent to a trainer",
            counted(record.len(), "byte")
        ),
    })
}

/// The error of a line, or a better one if the line holds NUL bytes.
fn or_cut_off(record: &str, error: RecordError) -> RecordError {
    match record.contains('\0') {
        true => RecordError {
            field: "record".into(),
            problem: "holds NUL bytes; was the file cut off while it was written or copied?".into(),
        },
        false => error,
    }
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

/// The form of the first line that is not blank.
fn form_of(text: &str) -> Option<&'static Form> {
    let mut lines = text.split('\n').map(|line| line.trim_start_matches(blank).trim_end());
    lines.find(|line| !line.is_empty()).map(Form::of)
}

/// Checks a file, one window after the other, each on all cores.
#[derive(Debug, Default)]
struct Scan {
    bytes: u64,
    /// The configured form, or that of the first line that is not blank.
    form: Option<&'static Form>,
    whole: FilePart,
    /// What the text is, if it is no JSON Lines. Decided by the first window with a bad line, if it begins the file.
    other: Option<Format>,
}

impl Scan {
    fn new(wanted: Wanted) -> Self {
        Self { form: Form::of_format(wanted.format), ..Self::default() }
    }

    fn add(&mut self, text: &str) {
        let (before, first) = (self.bytes, self.bytes == 0);
        self.bytes += text.len() as u64;
        self.form = self.form.or_else(|| form_of(text));
        let Some(form) = self.form else {
            self.whole.lines += text.bytes().filter(|byte| *byte == b'\n').count() as u64;
            return;
        };
        let read = |place| FilePart::read(form, text, place, before);
        let parts: Vec<FilePart> = parts(text, PART).into_par_iter().map(read).collect();
        self.whole = parts.into_iter().fold(std::mem::take(&mut self.whole), FilePart::join);
        if first && self.whole.bad_lines > 0 {
            self.other = format::of_text(text);
        }
    }

    /// The checked file, or the error of its first bad line. Fails if there is no record.
    fn finish(
        self,
        key: &str,
        place: &Located,
        wanted: Wanted,
        content: Content,
    ) -> Result<JsonLines, Fault> {
        let Located { shown, unit, .. } = place;
        let Self { form, whole, other, .. } = self;
        if let Some(other) = other {
            return Err(Fault::input(format!("{key} {shown} is {}", other.what)).hint(other.remedy));
        }
        form.map_or(Ok(()), |form| wanted.check(key, Path::new(shown), form))?;
        let (Some(form), None) = (form, &whole.first_bad) else {
            return Err(match whole.first_bad {
                Some(bad) => refusal(place, form, &bad, whole.bad_lines),
                None => Fault::input(format!("{key} {shown} holds no records")).hint(EXPECTED),
            });
        };
        let (shown, unit, records) = (shown.clone(), *unit, whole.records);
        Ok(JsonLines {
            shown,
            unit,
            content,
            records,
            form,
            passed_over: whole.passed_over.into_iter().collect(),
        })
    }
}

fn refusal(place: &Located, form: Option<&'static Form>, bad: &FirstBad, bad_lines: usize) -> Fault {
    let Located { shown, unit, .. } = place;
    let more = if bad_lines > 1 { format!(" (the first of {bad_lines} bad {unit}s)") } else { String::new() };
    let fault = Fault::input(format!("{shown} {unit} {}: {}{more}", bad.line, bad.error));
    match (bad.form, form) {
        (Some(other), Some(form)) if other.name != form.name => fault.hint(format!(
            "all {unit}s of a file have the same fields: the first {unit} has {} ({} form), this one {} ({} form)",
            form.fields, form.name, other.fields, other.name
        )),
        _ => fault.hint(EXPECTED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn found(text: &str) -> Result<Vec<PairRecord>, Fault> {
        let place = Located::here(Path::new("train.jsonl"));
        JsonLines::of_text("training_file", &place, Wanted::default(), text.into()).map(|file| file.records)
    }

    fn json<'a>(text: &'a str, record: &PairRecord) -> &'a str {
        &text[record.place.start as usize..record.place.end as usize]
    }

    #[test]
    fn blank_lines_are_no_records_but_count_as_lines() {
        let text = format!("\n  {GOOD}\r\n\n{GOOD}");
        let records = found(&text).unwrap();
        assert!(records.iter().all(|record| json(&text, record) == GOOD));
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
        let form = |text: &str| form_of(text).unwrap_or_else(|| Form::of(""));
        for text in texts {
            let whole = FilePart::read(form(&text), &text, 0..text.len(), 0);
            for bytes in [1, 3, GOOD.len(), 2 * GOOD.len(), 1 << 20] {
                let read =
                    parts(&text, bytes).into_iter().map(|place| FilePart::read(form(&text), &text, place, 0));
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
            [(format!("{GOOD}\n{trl}\n"), "input: missing"), (format!("{trl}\n{GOOD}\n"), "chosen: missing")]
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
        let place = Located::here(Path::new("train.jsonl"));
        let source = JsonLines::of_text("training_file", &place, Wanted::default(), lines).unwrap();
        let notes = source.files().remove(0);
        assert_eq!((notes.passed_over, notes.form.name), (&["id".to_owned(), "score".to_owned()][..], "TRL"));
    }

    #[test]
    fn a_file_without_pairs_is_refused() {
        assert_eq!(found(" \n").unwrap_err().message, "training_file train.jsonl holds no records");
    }

    #[test]
    fn byte_order_marks_are_ignored() {
        let text = format!("\u{feff}{GOOD}\r\n\u{feff}{GOOD}\r\n\u{feff}\r\n");
        let records = found(&text).unwrap();
        assert_eq!(records.iter().map(|record| json(&text, record)).collect::<Vec<_>>(), [GOOD; 2]);
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
    }

    /// A file that is read from the disk gives the same pairs as one in memory, and notices that it is changed.
    #[test]
    fn a_file_on_the_disk_gives_the_same_pairs_as_one_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let text: String = (0..50).map(|at| GOOD.replace("Hello", &"x".repeat(at + 1)) + "\n\n").collect();
        std::fs::write(&path, &text).unwrap();
        let place = Located::here(&path);
        let mut bytes = Vec::new();
        let disk = JsonLines::load_by(
            "training_file",
            &place,
            Wanted::default(),
            &mut |part| bytes.extend_from_slice(part),
            0,
        );
        let (disk, memory) = (
            disk.unwrap(),
            JsonLines::load("training_file", &place, Wanted::default(), &mut |_| {}).unwrap(),
        );
        assert!(matches!(disk.content, Content::Disk(..)) && matches!(memory.content, Content::Memory(..)));
        assert_eq!((bytes, disk.len()), (text.into_bytes(), memory.len()));
        for id in 0..50 {
            assert_eq!(disk.pair(id), memory.pair(id));
            assert_eq!((disk.place(id), disk.bytes(id)), (memory.place(id), memory.bytes(id)));
        }
        std::fs::write(&path, GOOD).unwrap();
        assert!(disk.pair(0).unwrap_err().message.contains("was changed while the run reads it"));
        assert!(memory.pair(49).is_ok());
    }
}
