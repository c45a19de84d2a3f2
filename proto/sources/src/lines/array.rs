//! A JSON array of records: one line for each item. The items' text stays as it is, duplicate keys and numbers included; only line ends
//! between tokens become blanks.

use std::fmt;
use std::io::{BufRead, Write};

use serde::Deserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::Problem;
use crate::alive;

const MARK: &[u8] = b"\xef\xbb\xbf";

/// Whether a text is an array of objects.
pub(super) fn begins(text: &[u8]) -> bool {
    let text = text.strip_prefix(MARK).unwrap_or(text);
    let mut letters = text.iter().filter(|byte| !byte.is_ascii_whitespace());
    letters.next() == Some(&b'[') && letters.next() == Some(&b'{')
}

pub(super) fn unpack(mut from: impl BufRead, to: &mut dyn Write) -> Result<(), Problem> {
    if from.fill_buf().map_err(Problem::content)?.starts_with(MARK) {
        from.consume(MARK.len());
    }
    let mut items = Items { to, written: 0, failed: None };
    let mut json = serde_json::Deserializer::from_reader(from);
    let read = json.deserialize_seq(&mut items).and_then(|()| json.end());
    let (failed, at) = (items.failed.take(), items.written + 1);
    match (read, failed) {
        (_, Some(error)) => Err(Problem::Writing(error)),
        (Err(error), None) => {
            Err(Problem::Content { what: format!("not valid JSON ({error})"), at: Some(at) })
        }
        (Ok(()), None) => Ok(()),
    }
}

struct Items<'w> {
    to: &'w mut dyn Write,
    written: u64,
    failed: Option<std::io::Error>,
}

impl<'de> Visitor<'de> for &mut Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while let Some(item) = items.next_element::<Box<RawValue>>()? {
            // In valid JSON, line ends stand only between tokens.
            let line = item.get().replace(['\n', '\r'], " ") + "\n";
            if let Err(error) = self.to.write_all(line.as_bytes()) {
                self.failed = Some(error);
                return Err(A::Error::custom("the copy cannot be written"));
            }
            self.written += 1;
            if self.written.is_multiple_of(1024) {
                alive::advance();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(text: &str) -> Result<String, Problem> {
        let mut to = Vec::new();
        unpack(text.as_bytes(), &mut to)?;
        Ok(String::from_utf8(to).unwrap())
    }

    #[test]
    fn items_keep_their_text() {
        let text = "\u{feff}[\r\n  {\"a\":\n 1.50, \"a\": \"x\\ny\"},{\"b\": 12345678901234567890123}\n]\n";
        let lines = "{\"a\":  1.50, \"a\": \"x\\ny\"}\n{\"b\": 12345678901234567890123}\n";
        assert_eq!(unpacked(text).unwrap(), lines);
    }

    #[test]
    fn the_item_that_is_damaged_is_named() {
        for (text, item) in
            [("[{}, {\"a\"}]", 2), ("[{}", 2), ("[{}] x", 2), ("[{} {}]", 2), ("[{\"a\": \"\n\"}]", 1)]
        {
            match unpacked(text) {
                Err(Problem::Content { at: Some(at), .. }) => assert_eq!(at, item, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
