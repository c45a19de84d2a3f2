//! Python's view of text: characters, not bytes.

use super::error::TemplateError;

/// `str.isspace` of one character.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// Whether `str.splitlines` ends a line at this character.
fn ends_line(character: char) -> bool {
    matches!(character, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some((at, end)) = rest.char_indices().find(|&(_, character)| ends_line(character)) else {
            lines.push(rest);
            break;
        };
        let crlf = end == '\r' && rest[at + 1..].starts_with('\n');
        let after = at + end.len_utf8() + usize::from(crlf);
        lines.push(&rest[..if keep_ends { after } else { at }]);
        rest = &rest[after..];
    }
    lines
}

/// `repr` of a text.
pub(super) fn repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            '\\' => out.push_str("\\\\"),
            _ if character == quote => {
                out.push('\\');
                out.push(character);
            }
            _ if is_printable(character) => out.push(character),
            _ => {
                let code = character as u32;
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable` of one character; Rust's tables follow the same rule.
pub(super) fn is_printable(character: char) -> bool {
    match character {
        ' '..='~' => true,
        _ if character.is_ascii() => false,
        // After another character, because `escape_debug` escapes a combining character at the start of a text.
        _ => {
            let mut buffer = String::from("a");
            buffer.push(character);
            buffer.escape_debug().nth(1) != Some('\\')
        }
    }
}

/// `repr` of a float: the shortest digits that read back the same.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if !(-4..16).contains(&exponent) && value != 0.0 {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

/// Byte positions of all characters, and the length of the text.
pub(super) fn boundaries(text: &str) -> Vec<usize> {
    text.char_indices().map(|(at, _)| at).chain([text.len()]).collect()
}

/// Whether the title case may differ from the upper case, or has several characters.
fn has_title_of_its_own(character: char) -> bool {
    matches!(character, '\u{1c4}'..='\u{1cc}' | '\u{1f1}'..='\u{1f3}' | '\u{10d0}'..='\u{10ff}' | '\u{1f80}'..='\u{1ffc}')
        || character.to_uppercase().count() > 1
}

/// Appends a character in title case.
pub(super) fn title(character: char, out: &mut String) -> Result<(), TemplateError> {
    if has_title_of_its_own(character) {
        return Err(TemplateError::unsupported(format!("title case of {character:?}")));
    }
    out.extend(character.to_uppercase());
    Ok(())
}

/// `str.isalpha` of one character; fails if the answer is not certain.
pub(super) fn is_letter(character: char) -> Result<bool, TemplateError> {
    let sure = matches!(character, '\u{c0}'..='\u{2af}' | '\u{388}'..='\u{481}' | '\u{48a}'..='\u{556}'
        | '\u{5d0}'..='\u{5ea}' | '\u{621}'..='\u{64a}' | '\u{1e00}'..='\u{1fbc}' | '\u{3041}'..='\u{3096}'
        | '\u{30a1}'..='\u{30fa}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}')
        || matches!(character, '\u{aa}' | '\u{b5}' | '\u{ba}');
    match character {
        _ if character.is_ascii() => Ok(character.is_ascii_alphabetic()),
        // Every letter is alphabetic, but not every alphabetic character is a letter.
        _ if !character.is_alphabetic() => Ok(false),
        _ if sure => Ok(true),
        _ => Err(TemplateError::unsupported(format!("asking whether {character:?} is a letter"))),
    }
}

/// `str.isdigit` of one character, or `str.isnumeric` if `numeric`; fails if the answer is not certain.
pub(super) fn is_digit(character: char, numeric: bool) -> Result<bool, TemplateError> {
    let ideograph =
        matches!(character, '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}');
    match character {
        _ if character.is_ascii() => Ok(character.is_ascii_digit()),
        _ if numeric && !ideograph => Ok(character.is_numeric()),
        _ if !numeric && !character.is_numeric() => Ok(false),
        _ => Err(TemplateError::unsupported(format!("asking whether {character:?} is a digit"))),
    }
}
