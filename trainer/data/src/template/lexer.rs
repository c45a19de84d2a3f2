//! Splits source into tokens, with jinja2's white-space rules for `trim_blocks` and `lstrip_blocks`.

use super::error::TemplateError;
use super::text::is_space;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tok {
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i64),
    Float(f64),
    Op(&'static str),
    Eof,
}

#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) line: u32,
    pub(super) tok: Tok,
}

/// Longer operators first: the first match counts.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";",
];

/// Tokens of a whole source. As in jinja2, line ends become `\n`, and one line end at the end of the source is removed.
pub(super) fn tokens(source: &str) -> Result<Vec<Token>, TemplateError> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { source: &source, at: 0, line: 1, counted: 0, starts_line: true, out: Vec::new() };
    lexer.root()?;
    lexer.push(Tok::Eof);
    Ok(lexer.out)
}

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: u32,
    /// Byte up to which lines are counted.
    counted: usize,
    /// Whether the last part read ended with a line end; true at the start of the source.
    starts_line: bool,
    out: Vec<Token>,
}

impl Lexer<'_> {
    fn rest(&self) -> &str {
        &self.source[self.at..]
    }

    fn line_at(&mut self, at: usize) -> u32 {
        if at > self.counted {
            self.line += self.source[self.counted..at].matches('\n').count() as u32;
            self.counted = at;
        }
        self.line
    }

    fn push(&mut self, tok: Tok) {
        let line = self.line_at(self.at);
        self.out.push(Token { line, tok });
    }

    fn fail<T>(&mut self, message: impl Into<String>) -> Result<T, TemplateError> {
        let line = self.line_at(self.at);
        Err(TemplateError::syntax(message).at(line))
    }

    fn advance(&mut self, to: usize) {
        self.starts_line = to > self.at && self.source.as_bytes()[to - 1] == b'\n';
        self.at = to;
    }

    fn root(&mut self) -> Result<(), TemplateError> {
        while self.at < self.source.len() {
            let rest = self.rest();
            let begin = rest
                .match_indices('{')
                .map(|(at, _)| at)
                .find(|&at| matches!(rest.as_bytes().get(at + 1), Some(b'%' | b'{' | b'#')));
            let Some(begin) = begin.map(|at| self.at + at) else {
                let data = rest.to_owned();
                self.push(Tok::Data(data));
                self.at = self.source.len();
                return Ok(());
            };
            let kind = self.source.as_bytes()[begin + 1];
            let sign =
                self.source.as_bytes().get(begin + 2).copied().filter(|sign| matches!(sign, b'-' | b'+'));
            self.data(begin, sign, kind == b'{');
            let inside = begin + 2 + usize::from(sign.is_some());
            match kind {
                b'#' => self.comment(begin, inside)?,
                b'{' => self.tag(begin, inside, true)?,
                _ => match raw_begin(&self.source[inside..]) {
                    Some(length) => self.raw(inside + length)?,
                    None => self.tag(begin, inside, false)?,
                },
            }
        }
        Ok(())
    }

    /// Adds the text before a tag, without the white space that the tag strips.
    fn data(&mut self, end: usize, sign: Option<u8>, variable: bool) {
        let text = &self.source[self.at..end];
        let kept = match sign {
            Some(b'-') => text.trim_end_matches(is_space),
            None if !variable => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let blank = line < text.len() && text[line..].chars().all(is_space);
                if blank && (line > 0 || self.starts_line) { &text[..line] } else { text }
            }
            _ => text,
        };
        if !kept.is_empty() {
            let kept = kept.to_owned();
            self.push(Tok::Data(kept));
        }
    }

    fn comment(&mut self, begin: usize, inside: usize) -> Result<(), TemplateError> {
        let Some(end) = self.source[inside..].find("#}").map(|at| inside + at) else {
            self.at = begin;
            return self.fail("a comment has no end");
        };
        let sign = self.source.as_bytes()[inside..end].last().copied();
        let after = self.after_end(end + 2, sign, true);
        self.at = begin;
        self.advance(after);
        Ok(())
    }

    /// Position after the end of a tag and the white space that it strips.
    fn after_end(&self, end: usize, sign: Option<u8>, trims: bool) -> usize {
        let rest = &self.source[end..];
        match sign {
            Some(b'-') => self.source.len() - rest.trim_start_matches(is_space).len(),
            Some(b'+') => end,
            _ => end + usize::from(trims && rest.starts_with('\n')),
        }
    }

    fn raw(&mut self, inside: usize) -> Result<(), TemplateError> {
        self.at = inside - 1;
        self.advance(inside);
        let mut from = inside;
        while let Some(begin) = self.source[from..].find("{%").map(|at| from + at) {
            let tag = &self.source[begin + 2..];
            let sign = tag.as_bytes().first().copied().filter(|sign| matches!(sign, b'-' | b'+'));
            let word = tag[usize::from(sign.is_some())..].trim_start_matches(is_space);
            if let Some(rest) = word.strip_prefix("endraw") {
                let rest = rest.trim_start_matches(is_space);
                let closing = rest.as_bytes().first().copied().filter(|sign| matches!(sign, b'-' | b'+'));
                if rest[usize::from(closing.is_some())..].starts_with("%}") {
                    let end = self.source.len() - rest.len() + usize::from(closing.is_some()) + 2;
                    self.data(begin, sign, false);
                    let after = self.after_end(end, closing, true);
                    self.advance(after);
                    return Ok(());
                }
            }
            from = begin + 2;
        }
        self.fail("a raw block has no end")
    }

    /// Reads `{{ … }}` or `{% … %}`.
    fn tag(&mut self, begin: usize, inside: usize, variable: bool) -> Result<(), TemplateError> {
        self.at = begin;
        self.push(if variable { Tok::VariableBegin } else { Tok::BlockBegin });
        self.at = inside;
        let mut open: Vec<&str> = Vec::new();
        while self.at < self.source.len() {
            if open.is_empty() && self.end(variable) {
                return Ok(());
            }
            let rest = self.rest();
            let spaces = rest.len() - rest.trim_start_matches(is_space).len();
            if spaces > 0 {
                self.at += spaces;
                continue;
            }
            if self.number()? || self.name()? || self.string()? {
                continue;
            }
            let Some(&operator) = OPERATORS.iter().find(|operator| self.rest().starts_with(**operator))
            else {
                let character = self.rest().chars().next().unwrap_or_default();
                return self.fail(format!("unexpected character {character:?}"));
            };
            match operator {
                "{" => open.push("}"),
                "(" => open.push(")"),
                "[" => open.push("]"),
                "}" | ")" | "]" if open.pop() != Some(operator) => {
                    return self.fail(format!("unexpected '{operator}'"));
                }
                _ => {}
            }
            self.push(Tok::Op(operator));
            self.at += operator.len();
        }
        self.fail("a tag has no end")
    }

    fn end(&mut self, variable: bool) -> bool {
        let rest = self.rest();
        let sign = rest.as_bytes().first().copied().filter(|&sign| sign == b'-' || sign == b'+' && !variable);
        let closing = if variable { "}}" } else { "%}" };
        let signs = usize::from(sign.is_some());
        if !rest[signs..].starts_with(closing) {
            return false;
        }
        self.push(if variable { Tok::VariableEnd } else { Tok::BlockEnd });
        let after = self.after_end(self.at + signs + 2, sign, !variable);
        self.advance(after);
        true
    }

    fn number(&mut self) -> Result<bool, TemplateError> {
        let rest = self.rest();
        if !rest.starts_with(|character: char| character.is_ascii_digit()) {
            return Ok(false);
        }
        let after_dot = self.at > 0 && self.source.as_bytes()[self.at - 1] == b'.';
        let (length, tok) = match float(rest).filter(|_| !after_dot) {
            Some(length) => {
                let value = rest[..length].replace('_', "").parse().unwrap_or(f64::NAN);
                (length, Some(Tok::Float(value)))
            }
            None => integer(rest),
        };
        let Some(tok) = tok else {
            let line = self.line_at(self.at);
            return Err(TemplateError::unsupported("a whole number beyond 64 bits").at(line));
        };
        self.push(tok);
        self.at += length;
        Ok(true)
    }

    fn name(&mut self) -> Result<bool, TemplateError> {
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if end == 0 {
            return Ok(false);
        }
        let name = rest[..end].to_owned();
        if name.starts_with(char::is_numeric) {
            return self.fail(format!("{name} is no name"));
        }
        self.push(Tok::Name(name));
        self.at += end;
        Ok(true)
    }

    fn string(&mut self) -> Result<bool, TemplateError> {
        let rest = self.rest();
        let Some(quote) = rest.chars().next().filter(|&quote| quote == '"' || quote == '\'') else {
            return Ok(false);
        };
        let mut escaped = false;
        let end = rest.char_indices().skip(1).find(|&(_, character)| {
            let ends = character == quote && !escaped;
            escaped = character == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else { return self.fail("a string has no end") };
        match unescape(&rest[1..end]) {
            Ok(text) => self.push(Tok::Str(text)),
            Err(message) => return self.fail(message),
        }
        self.at += end + 1;
        Ok(true)
    }
}

/// Length of `raw %}`, with white space and signs; `None` if the tag is another one.
fn raw_begin(tag: &str) -> Option<usize> {
    let rest = tag.trim_start_matches(is_space).strip_prefix("raw")?.trim_start_matches(is_space);
    let rest = match rest.strip_prefix("-%}") {
        Some(rest) => rest.trim_start_matches(is_space),
        None => rest.strip_prefix("%}")?,
    };
    Some(tag.len() - rest.len())
}

/// Length of a run of digits, with single underscores allowed between them.
fn digits(text: &str, is_digit: fn(u8) -> bool) -> usize {
    let bytes = text.as_bytes();
    let mut end = 0;
    while let Some(&byte) = bytes.get(end) {
        let between = byte == b'_' && end > 0 && bytes[end - 1] != b'_';
        let more = between && bytes.get(end + 1).copied().is_some_and(is_digit);
        if !(is_digit(byte) || more) {
            break;
        }
        end += 1;
    }
    end
}

fn float(text: &str) -> Option<usize> {
    let decimal = |text: &str| digits(text, |byte| byte.is_ascii_digit());
    let mut end = decimal(text);
    let mut is_float = false;
    if text.as_bytes().get(end) == Some(&b'.') {
        let fraction = decimal(&text[end + 1..]);
        if fraction > 0 {
            (end, is_float) = (end + 1 + fraction, true);
        }
    }
    if matches!(text.as_bytes().get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(text.as_bytes().get(end + 1), Some(b'+' | b'-')));
        let exponent = text.get(end + 1 + sign..).map_or(0, decimal);
        if exponent > 0 {
            (end, is_float) = (end + 1 + sign + exponent, true);
        }
    }
    is_float.then_some(end)
}

fn integer(text: &str) -> (usize, Option<Tok>) {
    let radix = match text.get(..2).map(str::to_ascii_lowercase).as_deref() {
        Some("0x") => Some((16, (|byte| byte.is_ascii_hexdigit()) as fn(u8) -> bool)),
        Some("0o") => Some((8, (|byte| (b'0'..=b'7').contains(&byte)) as fn(u8) -> bool)),
        Some("0b") => Some((2, (|byte| byte == b'0' || byte == b'1') as fn(u8) -> bool)),
        _ => None,
    };
    let (skip, radix, length) = match radix.map(|(radix, is)| (radix, digits(&text[2..], is))) {
        Some((radix, length)) if length > 0 => (2, radix, length),
        _ if text.starts_with('0') => (0, 10, digits(text, |byte| byte == b'0')),
        _ => (0, 10, digits(text, |byte| byte.is_ascii_digit())),
    };
    let value = i64::from_str_radix(&text[skip..skip + length].replace('_', ""), radix);
    (skip + length, value.ok().map(Tok::Int))
}

/// Resolves Python's escapes, as the codec `unicode-escape` does.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let mut after = rest[at + 1..].chars();
        let kind = after.next().unwrap_or('\\');
        rest = after.as_str();
        let simple = match kind {
            '\n' => continue,
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'v' => '\x0b',
            '\\' | '\'' | '"' => kind,
            'x' => hexadecimal(&mut rest, 2)?,
            'u' => hexadecimal(&mut rest, 4)?,
            'U' => hexadecimal(&mut rest, 8)?,
            '0'..='7' => {
                let more = rest.bytes().take(2).take_while(|byte| (b'0'..=b'7').contains(byte)).count();
                let octal = format!("{kind}{}", &rest[..more]);
                rest = &rest[more..];
                u32::from_str_radix(&octal, 8).ok().and_then(char::from_u32).unwrap_or_default()
            }
            'N' => return Err("a character by its name (\\N{…}) is not supported".to_owned()),
            _ if !kind.is_ascii() => return Err(format!("a backslash before {kind:?} is not supported")),
            _ => {
                out.push('\\');
                kind
            }
        };
        out.push(simple);
    }
    out.push_str(rest);
    Ok(out)
}

fn hexadecimal(rest: &mut &str, length: usize) -> Result<char, String> {
    let digits = rest.get(..length).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let character = code.and_then(char::from_u32).ok_or("an escape names no character")?;
    *rest = &rest[length..];
    Ok(character)
}
