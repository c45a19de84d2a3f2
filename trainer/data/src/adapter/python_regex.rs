//! Python regular expressions, as PEFT uses them, run by Rust's `regex`. Both languages spell most constructs alike; a construct that one
//! lacks or reads differently is refused by name. Whether a whole text matches does not depend on the engine's search order.

use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;

/// A pattern that means the same in both languages.
#[derive(Clone, Debug)]
pub struct PythonRegex(Regex);

impl PythonRegex {
    /// `re.fullmatch(pattern, text)`.
    pub fn whole(pattern: &str) -> Result<Self, String> {
        Self::compiled(pattern, &format!("^(?:{pattern})$"))
    }

    /// `re.match(rf"(.*\.)?({pattern})$", text)`, as PEFT looks up ranks and alphas.
    pub fn ending(pattern: &str) -> Result<Self, String> {
        Self::compiled(pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))
    }

    /// Whether the pattern matches a text.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        self.0.is_match(text)
    }

    fn compiled(pattern: &str, whole: &str) -> Result<Self, String> {
        Scanner { rest: pattern.chars().peekable(), open: 0 }.pattern()?;
        // The last line of regex's message gives the reason; the lines before it show the position.
        let reason = |error: regex::Error| error.to_string().lines().last().unwrap_or_default().to_owned();
        Regex::new(whole).map(Self).map_err(reason)
    }
}

/// Whether a text has a special character of regular expressions, apart from the dot.
#[must_use]
pub fn is_pattern(text: &str) -> bool {
    text.contains(['\\', '^', '$', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|'])
}

struct Scanner<'a> {
    rest: Peekable<Chars<'a>>,
    open: usize,
}

impl Scanner<'_> {
    /// Scans the pattern; fails with the first construct that the two languages do not share.
    fn pattern(mut self) -> Result<(), String> {
        // Whether a quantifier may follow the previous construct.
        let mut repeatable = false;
        while let Some(c) = self.rest.next() {
            repeatable = match c {
                '\\' => self.escape()?,
                '[' => self.class().map(|()| true)?,
                '(' => self.group().map(|()| false)?,
                ')' => self.close().map(|()| true)?,
                '|' | '^' | '$' => false,
                '*' | '+' | '?' | '{' if !repeatable => {
                    return Err(format!("nothing to repeat before `{c}`"));
                }
                '*' | '+' | '?' => self.repetition(&c.to_string()).map(|()| false)?,
                '{' => {
                    let count = self.count()?;
                    self.repetition(&count).map(|()| false)?
                }
                '}' | ']' => return Err(format!("`{c}` without its partner")),
                _ => true,
            };
        }
        if self.open > 0 { Err("a `(` is not closed".into()) } else { Ok(()) }
    }

    /// Reads the character after a backslash; returns whether a quantifier may follow.
    fn escape(&mut self) -> Result<bool, String> {
        match self.rest.next() {
            Some('d' | 'D' | 'w' | 'W' | 's' | 'S') => Ok(true),
            Some('b' | 'B' | 'A') => Ok(false),
            Some(c) if literal_when_escaped(c) => Ok(true),
            Some(c) => Err(format!("`\\{c}`")),
            None => Err("a lone backslash at the end".into()),
        }
    }

    /// Reads the start of a group, after `(`.
    fn group(&mut self) -> Result<(), String> {
        self.open += 1;
        if self.rest.next_if_eq(&'?').is_none() {
            return Ok(());
        }
        match (self.rest.next(), self.rest.peek()) {
            (Some(':'), _) => Ok(()),
            (Some('P'), Some('<')) => self.group_name(),
            (Some(c), _) => Err(format!("`(?{c}`")),
            (None, _) => Err("`(?`".into()),
        }
    }

    fn group_name(&mut self) -> Result<(), String> {
        self.rest.next();
        let mut name = String::new();
        while let Some(c) = self.rest.next_if(|c| *c != '>') {
            name.push(c);
        }
        let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let good = letters && !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit());
        match self.rest.next() {
            Some('>') if good => Ok(()),
            _ => Err(format!("the group name `{name}`")),
        }
    }

    fn close(&mut self) -> Result<(), String> {
        self.open = self.open.checked_sub(1).ok_or("`)` without its partner")?;
        Ok(())
    }

    /// Reads what follows a quantifier. A lazy `?` is the same in both languages; `+` is possessive in Python and a repetition in Rust.
    fn repetition(&mut self, quantifier: &str) -> Result<(), String> {
        self.rest.next_if_eq(&'?');
        match self.rest.peek() {
            Some(c @ ('*' | '+' | '?' | '{')) => Err(format!("`{c}` behind the repetition `{quantifier}`")),
            _ => Ok(()),
        }
    }

    /// Reads the rest of `{2}`, `{2,}` or `{2,3}`, after `{`. Other forms are literal text or another count in one of the languages.
    fn count(&mut self) -> Result<String, String> {
        let mut inside = String::new();
        while let Some(c) = self.rest.next_if(|c| c.is_ascii_digit() || *c == ',') {
            inside.push(c);
        }
        let text = format!("{{{inside}}}");
        let (least, most) = inside.split_once(',').unwrap_or((&inside, ""));
        let good = !least.is_empty() && !most.contains(',') && self.rest.next_if_eq(&'}').is_some();
        if good { Ok(text) } else { Err(format!("`{text}`")) }
    }

    /// Reads the rest of a character class, after `[`.
    fn class(&mut self) -> Result<(), String> {
        self.rest.next_if_eq(&'^');
        let mut members = 0;
        while let Some(c) = self.rest.next() {
            match c {
                ']' if members > 0 => return Ok(()),
                '\\' => match self.rest.next() {
                    Some('d' | 'D' | 'w' | 'W' | 's' | 'S') => {}
                    Some(c) if literal_when_escaped(c) => {}
                    other => return Err(format!("`\\{}` in `[…]`", other.unwrap_or(' '))),
                },
                // `[`, `&&`, `--`, `~~` and `||` are set operations in Rust.
                '-' if self.rest.peek() != Some(&'-') => {}
                c if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '/' | ' ') => {}
                c => return Err(format!("`{c}` in `[…]`")),
            }
            members += 1;
        }
        Err("a `[` is not closed".into())
    }
}

/// Whether an escaped character stands for itself in both languages: all punctuation except `\<` and `\>`, word boundaries in Rust.
fn literal_when_escaped(c: char) -> bool {
    c.is_ascii_punctuation() && !matches!(c, '<' | '>')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_patterns_must_match_the_whole_name() {
        let name = "model.layers.11.self_attn.q_proj";
        let yes = [
            r".*self_attn\.(q_proj|v_proj)",
            r"model\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj))",
            r"(?:.*?(?:text|layers).*?(?:self_attn).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.x)",
            r"model.layers.1[0-9].+",
            r"^.*q_proj$",
            r"(?P<all>.*)",
            r"[^z]+",
            r"(|.*)",
        ];
        for pattern in yes {
            assert!(PythonRegex::whole(pattern).unwrap().matches(name), "{pattern}");
        }
        for pattern in ["q_proj", r"model\.layers\.1", ".*v_proj", "a{2,3}"] {
            assert!(!PythonRegex::whole(pattern).unwrap().matches(name), "{pattern}");
        }
    }

    #[test]
    fn rank_patterns_match_the_end_of_a_name_at_a_dot() {
        let matches = |pattern: &str, name: &str| PythonRegex::ending(pattern).unwrap().matches(name);
        let name = "model.layers.1.self_attn.q_proj";
        for pattern in
            ["q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", name, ".*q_proj", r"^model\..*"]
        {
            assert!(matches(pattern, name), "{pattern}");
        }
        assert!(!matches("proj", name) && !matches("q_pro", name) && !matches("layers.1", name));
        assert!(matches("attn.q_proj|k_proj", "model.k_proj"));
        // An unescaped dot matches any character.
        assert!(matches("layers.1.self_attn.q_proj", "model.layers.1xself_attn.q_proj"));
    }

    #[test]
    fn patterns_that_rust_reads_differently_are_refused_by_name() {
        let refused = [
            ("(?!a).*", "`(?!`"),
            ("(?<=a)b", "`(?<`"),
            ("(?i)Q_PROJ", "`(?i`"),
            ("(?<name>a)", "`(?<`"),
            ("(?>a)b", "`(?>`"),
            ("(?P=name)", "`(?P`"),
            (r"(a)\1", r"`\1`"),
            (r"a\Z", r"`\Z`"),
            (r"\<a", r"`\<`"),
            (r"\bq\b*", "nothing to repeat"),
            ("a++", "`+` behind the repetition `+`"),
            ("a{1,2}+", "`+` behind the repetition `{1,2}`"),
            ("a**", "`*` behind the repetition `*`"),
            ("a{,3}", "`{,3}`"),
            ("a{b}", "`{}`"),
            ("[a&&b]", "`&` in `[…]`"),
            ("[[a]]", "`[` in `[…]`"),
            ("[a--b]", "`-` in `[…]`"),
            ("*a", "nothing to repeat"),
            ("(a", "not closed"),
            ("a)", "without its partner"),
            ("[a", "not closed"),
            ("[]a]", "`]` in `[…]`"),
            (r"\x41", r"`\x`"),
            ("a{99999999}", "exceeds"),
        ];
        for (pattern, named) in refused {
            let reason = PythonRegex::whole(pattern).unwrap_err();
            assert!(reason.contains(named), "{pattern}: {reason}");
        }
    }
}
