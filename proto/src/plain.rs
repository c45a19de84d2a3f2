//! Escapes untrusted text (data, model folders, peers, hubs, file names) for a terminal or log: the result cannot move the cursor,
//! change colours, change the writing direction or start a new line.

use std::borrow::Cow;
use std::fmt::Write;

use crate::counted;

/// Approximate maximum bytes of a quoted key or value.
const QUOTED: usize = 80;

/// Escapes all control characters, including line ends and tabs.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// Cuts the middle out of a text longer than `most` bytes, and notes the number of missing bytes there. `most` does not include the note.
#[must_use]
pub fn cut(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return text.into();
    }
    // Keep both ends: errors begin with the problem and often end with its place.
    let boundary = |at: &usize| text.is_char_boundary(*at);
    let end = (0..=most - most / 4).rev().find(boundary).unwrap_or(0);
    let begin = (text.len() - most / 4..text.len()).find(boundary).unwrap_or(text.len());
    format!("{} [{}] {}", &text[..end], counted(begin - end, "more byte"), &text[begin..]).into()
}

/// Cuts an untrusted key or value for quoting in a message.
#[must_use]
pub fn quoted(text: &str) -> Cow<'_, str> {
    cut(text, QUOTED)
}

/// A peer's self-chosen name for a message: at most 64 characters of it, escaped.
#[must_use]
pub fn peer_name(name: &str) -> String {
    name.chars().take(64).flat_map(char::escape_default).collect()
}

/// Like [`line`], but keeps line ends and tabs.
#[must_use]
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// Like [`lines`], but keeps colours (`ESC [ … m`). For text that other code has coloured, after its untrusted parts were escaped.
#[must_use]
pub fn coloured(text: &str) -> Cow<'_, str> {
    if !text.contains('\u{1b}') {
        return lines(text);
    }
    let mut parts = text.split('\u{1b}');
    let mut out = lines(parts.next().unwrap_or_default()).into_owned();
    for part in parts {
        let end = part.strip_prefix('[').and_then(|codes| {
            let end = codes.find(|c: char| !(c.is_ascii_digit() || c == ';'))?;
            codes[end..].starts_with('m').then_some(end + 2)
        });
        match end {
            Some(end) => {
                out.push('\u{1b}');
                out.push_str(&part[..end]);
                out.push_str(&lines(&part[end..]));
            }
            None => {
                out.push_str("\\u{1b}");
                out.push_str(&lines(part));
            }
        }
    }
    out.into()
}

/// Escapes control characters in a line of JSON as `\uXXXX`; JSON itself does not require that for all of them.
#[must_use]
pub fn json(line: &str) -> Cow<'_, str> {
    if !line.contains(is_active) {
        return line.into();
    }
    let mut out = String::with_capacity(line.len() + 16);
    for c in line.chars() {
        if !is_active(c) {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing into a string cannot fail.
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    out.into()
}

fn escaped(text: &str, allowed: impl Fn(char) -> bool) -> Cow<'_, str> {
    let bad = |c: char| is_active(c) && !allowed(c);
    if !text.contains(bad) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !bad(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => {
                let _ = write!(out, "\\u{{{:x}}}", c as u32);
            }
        }
    }
    out.into()
}

/// Whether a terminal, an editor or a line reader would act on the character instead of showing it.
fn is_active(c: char) -> bool {
    c.is_control()
        // Line and paragraph separators; bidirectional marks, embeddings, overrides and isolates; invisible tags.
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{61c}' | '\u{200e}' | '\u{200f}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        for (text, shown) in [
            ("plain ü 漢 🙂 \\n", "plain ü 漢 🙂 \\n"),
            ("a\nerror: made up", "a\\nerror: made up"),
            ("\u{1b}[2J\u{1b}]0;title\u{7}", "\\u{1b}[2J\\u{1b}]0;title\\u{7}"),
            ("a\rb\tc\u{7f}", "a\\rb\\tc\\u{7f}"),
            ("\u{9b}31m\u{85}", "\\u{9b}31m\\u{85}"),
            ("abc\u{202e}fed\u{2066}\u{200f}", "abc\\u{202e}fed\\u{2066}\\u{200f}"),
            ("a\u{2028}b", "a\\u{2028}b"),
        ] {
            assert_eq!(line(text), shown);
        }
        assert!(matches!(line("plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn lines_keeps_line_ends_and_coloured_keeps_colours() {
        assert_eq!(lines("a\n\tb\u{1b}[31m\r\n"), "a\n\tb\\u{1b}[31m\\r\n");
        assert_eq!(coloured("\u{1b}[36m[a/0]\u{1b}[0m x"), "\u{1b}[36m[a/0]\u{1b}[0m x");
        for evil in ["\u{1b}[2J", "\u{1b}]0;x\u{7}", "\u{1b}", "\u{1b}[", "\u{1b}[31", "\u{1b}[31;\u{1b}[1A"]
        {
            let shown = coloured(evil);
            assert!(!shown.contains(['\u{1b}', '\u{7}']), "{evil:?}: {shown:?}");
        }
    }

    #[test]
    fn cut_keeps_both_ends_and_counts_the_missing_bytes() {
        assert!(matches!(cut("short", 5), Cow::Borrowed("short")));
        assert_eq!(cut(&format!("begin{}end", "x".repeat(100)), 12), "beginxxxx [96 more bytes] end");
        // Never cuts within a character.
        for most in 0..12 {
            let text = "漢字🙂ü".repeat(3);
            let shown = cut(&text, most);
            assert!(shown.contains(" more bytes] "), "{most}: {shown}");
        }
        assert_eq!(quoted("key"), "key");
        assert!(quoted(&"k".repeat(1 << 20)).len() < 120);
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let text = "\u{1b}[2J\n\u{9b}\u{202e}\u{e0041}ü";
        let line = serde_json::json!({ "a": text }).to_string();
        let shown = json(&line);
        assert!(!shown.contains(is_active), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap()["a"], text);
    }

    proptest! {
        #[test]
        fn no_control_character_is_left(text in "\\PC*|[\\x00-\\xff\u{202e}\u{2028}]*") {
            prop_assert!(!line(&text).contains(is_active));
            prop_assert!(!lines(&text).contains(|c| is_active(c) && c != '\n' && c != '\t'));
            // Escaping twice changes nothing.
            let once = line(&text).into_owned();
            let twice = line(&once).into_owned();
            prop_assert_eq!(twice, once);
        }
    }
}
