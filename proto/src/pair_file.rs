//! A JSON Lines file of preference pairs: every line checked, every bad one counted, the first one named.

use std::ops::Range;
use std::path::Path;

use crate::Fault;
use crate::preference::PreferencePair;

const EXPECTED: &str =
    "each line is one JSON object with `input`, `preferred_output` and `non_preferred_output`";

/// Reads a whole file; `key` names it in errors, e.g. `training_file`.
pub fn read(key: &str, path: &Path) -> Result<String, Fault> {
    let shown = path.display();
    let bytes = std::fs::read(path).map_err(|error| {
        Fault::input(format!("cannot read {key} {shown}: {error}"))
            .hint(format!("`{key}` takes the path of a JSON Lines file of preference pairs"))
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        Fault::input(format!("{shown} line {line}: not valid UTF-8")).hint("save the file as UTF-8")
    })
}

/// Where each record lies in the text; blank lines are no records. No record at all is an error, too.
pub fn records(key: &str, path: &Path, text: &str) -> Result<Vec<Range<usize>>, Fault> {
    let mut records = Vec::new();
    let mut first_bad = None;
    let (mut bad_lines, mut start) = (0_usize, 0);
    for (at, line) in text.split_inclusive('\n').enumerate() {
        let record = line.trim();
        let offset = start + (line.len() - line.trim_start().len());
        start += line.len();
        if record.is_empty() {
            continue;
        }
        match PreferencePair::parse(record) {
            Ok(_) => records.push(offset..offset + record.len()),
            Err(error) => {
                bad_lines += 1;
                first_bad.get_or_insert_with(|| format!("{} line {}: {error}", path.display(), at + 1));
            }
        }
    }
    match first_bad {
        Some(first) => {
            let more =
                if bad_lines > 1 { format!(" (the first of {bad_lines} bad lines)") } else { String::new() };
            Err(Fault::input(format!("{first}{more}")).hint(EXPECTED))
        }
        None if records.is_empty() => {
            Err(Fault::input(format!("{key} {} holds no preference pairs", path.display())).hint(EXPECTED))
        }
        None => Ok(records),
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
    fn a_file_without_pairs_is_refused() {
        assert_eq!(found(" \n").unwrap_err().message, "training_file train.jsonl holds no preference pairs");
    }

    #[test]
    fn bytes_that_are_no_text_are_named_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, b"{}\n\xff\xfe\n").unwrap();
        assert!(read("training_file", &path).unwrap_err().message.ends_with("line 2: not valid UTF-8"));
    }
}
