//! Counts with nouns for messages: `1 trainer`, `2 trainers`, `12,345 pairs`. All messages that print a count use this.

use std::borrow::Cow;
use std::fmt::Display;

/// The count and its noun; `one` is the singular.
#[must_use]
pub fn counted<N: Copy + Display + PartialEq + From<u8>>(count: N, one: &str) -> String {
    format!("{count} {}", noun(count, one))
}

/// Like [`counted`], with thousands separators.
#[must_use]
pub fn grouped(count: u64, one: &str) -> String {
    format!("{} {}", thousands(count), noun(count, one))
}

/// The noun in the singular or plural; of several words, the last one takes the plural.
#[must_use]
pub fn noun<N: PartialEq + From<u8>>(count: N, one: &str) -> Cow<'_, str> {
    if count == N::from(1) {
        return one.into();
    }
    let hisses = ["s", "x", "tch", "sh"].iter().any(|end| one.ends_with(end));
    let stem = one.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'i', 'o', 'u']));
    match stem {
        Some(stem) => format!("{stem}ies").into(),
        None if hisses => format!("{one}es").into(),
        None => format!("{one}s").into(),
    }
}

/// `one` if the count is 1, otherwise `many`: `is` or `are`, `has` or `have`.
#[must_use]
pub fn agrees<N: PartialEq + From<u8>>(count: N, one: &'static str, many: &'static str) -> &'static str {
    if count == N::from(1) { one } else { many }
}

/// 12345678 -> 12,345,678
#[must_use]
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noun_agrees_with_its_count() {
        for (count, one, expected) in [
            (1, "trainer", "1 trainer"),
            (0, "trainer", "0 trainers"),
            (2, "held-out pair", "2 held-out pairs"),
            (2, "process", "2 processes"),
            (1, "process", "1 process"),
            (2, "micro-batch", "2 micro-batches"),
            (2, "entry", "2 entries"),
            (2, "day", "2 days"),
            (2, "box", "2 boxes"),
            (2, "epoch", "2 epochs"),
        ] {
            assert_eq!(counted(count, one), expected);
        }
        assert_eq!(counted(1_usize, "step"), "1 step");
        assert_eq!((agrees(1_u64, "is", "are"), agrees(0_u64, "is", "are")), ("is", "are"));
        assert_eq!((grouped(1, "pair"), grouped(1234, "pair")), ("1 pair".into(), "1,234 pairs".into()));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            (thousands(7), thousands(1234), thousands(12_345_678)),
            ("7".into(), "1,234".into(), "12,345,678".into())
        );
    }
}
