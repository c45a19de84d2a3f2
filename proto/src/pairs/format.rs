//! Recognises files that are not JSON Lines in UTF-8; gives a hint how to convert them. Pure.

use serde::de::IgnoredAny;

/// A recognised format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Description; follows "FILE is" in an error.
    pub(super) what: &'static str,
    /// Hint for the user.
    pub(super) remedy: &'static str,
}

const fn format(what: &'static str, remedy: &'static str) -> Format {
    Format { what, remedy }
}

const UTF_16: Format =
    format("UTF-16 text, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW, or save it as UTF-8");
const UTF_16_LE: Format = format(UTF_16.what, "convert it: iconv -f UTF-16LE -t UTF-8 OLD > NEW");
const UTF_16_BE: Format = format(UTF_16.what, "convert it: iconv -f UTF-16BE -t UTF-8 OLD > NEW");
const UTF_32: Format = format("UTF-32 text, not UTF-8", "convert it: iconv -f UTF-32 -t UTF-8 OLD > NEW");
const PARQUET: Format = format(
    "a Parquet file, not JSON Lines",
    "convert it: python3 -c 'import pandas; pandas.read_parquet(\"OLD\").to_json(\"NEW\", orient=\"records\", lines=True)'",
);
const ARROW: Format = format(
    "an Arrow file, not JSON Lines",
    "convert it: python3 -c 'import datasets; datasets.Dataset.from_file(\"OLD\").to_json(\"NEW\")'",
);

/// First bytes of formats. If one is a prefix of another, the longer comes first.
const BEGINNINGS: [(&[u8], Format); 15] = [
    (b"\xff\xfe\0\0", UTF_32),
    (b"\0\0\xfe\xff", UTF_32),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"\x1f\x8b", format("a gzip file, not JSON Lines", "unpack it: gunzip -c OLD > NEW")),
    (b"\x28\xb5\x2f\xfd", format("a Zstandard file, not JSON Lines", "unpack it: zstd -dc OLD > NEW")),
    (b"\xfd7zXZ\0", format("an xz file, not JSON Lines", "unpack it: xz -dc OLD > NEW")),
    (b"BZh", format("a bzip2 file, not JSON Lines", "unpack it: bunzip2 -c OLD > NEW")),
    (b"7z\xbc\xaf\x27\x1c", format("a 7z archive, not JSON Lines", "unpack it first")),
    (b"PK\x03\x04", format("a ZIP archive, not JSON Lines", "unpack it first: unzip OLD")),
    (b"PAR1", PARQUET),
    (b"ARROW1", ARROW),
    (b"\xff\xff\xff\xff", ARROW),
    (b"SQLite format 3\0", format("an SQLite database, not JSON Lines", "export its rows as JSON Lines")),
    (
        b"version https://git-lfs",
        format("a Git LFS pointer, not the data itself", "fetch what it points to: git lfs pull"),
    ),
];

/// Whether a character before the JSON of a line is skipped. Editors on Windows write a byte order mark at the start of a file;
/// concatenated files have it in the middle too.
pub fn blank(letter: char) -> bool {
    letter.is_whitespace() || letter == '\u{feff}'
}

/// Recognises a format by the file's first bytes.
pub(super) fn of_bytes(bytes: &[u8]) -> Option<Format> {
    let begins = |(start, _): &&(&[u8], Format)| bytes.starts_with(start);
    if let Some((_, format)) = BEGINNINGS.iter().find(begins) {
        return Some(*format);
    }
    // UTF-16 without a mark: JSON begins with ASCII characters, so one of the two bytes of each is zero.
    match bytes {
        [low, 0, next, 0, ..] if *low > 0 && *next > 0 => Some(UTF_16_LE),
        [0, high, 0, next, ..] if *high > 0 && *next > 0 => Some(UTF_16_BE),
        _ => None,
    }
}

/// Recognises the format of a text that has bad lines.
pub(super) fn of_text(text: &str) -> Option<Format> {
    let text = text.trim_start_matches(blank);
    let mut marks = text.chars().filter(|letter| !letter.is_whitespace());
    match (marks.next(), marks.next()) {
        (Some('['), Some('{')) => {
            Some(format("one JSON array, not JSON Lines", "convert it: jq -c '.[]' OLD > NEW"))
        }
        (Some('<'), _) => Some(format("a web page or XML, not JSON Lines", "download the file itself")),
        (Some('{'), _) if text.trim_end().contains('\r') && !text.contains('\n') => Some(format(
            "text whose lines end with a carriage return alone",
            "convert it: tr '\\r' '\\n' < OLD > NEW",
        )),
        (Some('{'), _) if is_spread_over_lines(text) => {
            Some(format("JSON over several lines, not one object a line", "convert it: jq -c . OLD > NEW"))
        }
        _ => None,
    }
}

/// Whether the first line is only the start of a JSON value that the next lines continue.
fn is_spread_over_lines(text: &str) -> bool {
    let first = text.lines().next().unwrap_or_default();
    let ends_early = |error: serde_json::Error| error.is_eof();
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    serde_json::from_str::<IgnoredAny>(first).err().is_some_and(ends_early)
        && matches!(values.next(), Some(Ok(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_known_by_their_first_bytes() {
        let what = |bytes: &[u8]| of_bytes(bytes).map_or("", |format| format.what);
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        assert_eq!(what(&utf16("\u{feff}{\"a\": 1}")), "UTF-16 text, not UTF-8");
        assert_eq!(of_bytes(&utf16("{\"a\": 1}")), Some(UTF_16_LE));
        assert_eq!(of_bytes(b"\0{\0\"\0a"), Some(UTF_16_BE));
        assert_eq!(what(b"\xff\xfe\0\0{\0\0\0"), "UTF-32 text, not UTF-8");
        assert_eq!(what(b"PAR1\x15\x04"), "a Parquet file, not JSON Lines");
        assert_eq!(what(b"\x1f\x8b\x08\x08"), "a gzip file, not JSON Lines");
        for text in ["", "{", "{}\n", "\u{feff}{\"input\"", "Provably no archive", "\0\0\0\0\0"] {
            assert_eq!(of_bytes(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn other_text_formats_are_recognised() {
        let remedy = |text: &str| of_text(text).map_or("", |format| format.remedy);
        assert!(remedy("\u{feff}[\n {\"a\": 1},\n {\"a\": 2}\n]").contains("'.[]'"));
        assert!(remedy("[{\"a\": 1}]").contains("'.[]'"));
        assert!(remedy("{\n  \"a\": 1\n}\n{\n  \"a\": 2\n}\n").contains("jq -c ."));
        assert!(remedy("{\"a\": 1}\r{\"a\": 2}\r").contains("tr "));
        assert!(remedy("<!DOCTYPE html>").contains("download"));
        for text in ["{\"a\": 1}\n{\n", "{\n{\"a\": 1}\n", "{\"a\":\n", "[]\n", "7\n", "{}\r\n{\r\n"] {
            assert_eq!(of_text(text), None, "{text:?}");
        }
    }
}
