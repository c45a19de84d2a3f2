//! `strftime_now`: formats the date of the run, with the directives of Python on Linux.

use chrono::{Datelike, NaiveDateTime, Timelike};

use super::error::TemplateError;
use super::value::Outcome;

/// The run's date and time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(pub(crate) NaiveDateTime);

/// glibc's flags and the width of a field.
struct Field {
    flag: Option<char>,
    upper: bool,
    swap: bool,
    width: usize,
}

impl Moment {
    /// Formats the local date and time.
    pub(super) fn format(&self, format: &str) -> Outcome<String> {
        let mut out = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            out.push_str(&rest[..at]);
            let (text, after) = self.directive(&rest[at + 1..])?;
            out.push_str(&text);
            rest = after;
        }
        out.push_str(rest);
        Ok(out)
    }

    fn directive<'f>(&self, text: &'f str) -> Outcome<(String, &'f str)> {
        let mut field = Field { flag: None, upper: false, swap: false, width: 0 };
        let mut characters = text.chars();
        let mut next = || characters.next();
        let mut letter = next();
        while let Some(flag @ ('-' | '_' | '0' | '^' | '#')) = letter {
            match flag {
                '^' => field.upper = true,
                '#' => field.swap = true,
                _ => field.flag = Some(flag),
            }
            letter = next();
        }
        while let Some(digit) = letter.and_then(|letter| letter.to_digit(10)) {
            field.width = field.width * 10 + digit as usize;
            if field.width > 1000 {
                return Err(TemplateError::unsupported("a date field that wide"));
            }
            letter = next();
        }
        let modified = matches!(letter, Some('E' | 'O'));
        if modified {
            letter = next();
        }
        let Some(letter) = letter else {
            return Err(TemplateError::unsupported("a date format that ends within a directive"));
        };
        let consumed = text.len() - characters.as_str().len();
        let rest = &text[consumed..];
        let plain = field.flag.is_none() && !field.upper && !field.swap && field.width == 0 && !modified;
        // Python replaces these three itself, and only without flags and width.
        if plain && matches!(letter, 'f' | 'z' | 'Z') {
            return Ok((if letter == 'f' { "000000" } else { "" }.to_owned(), rest));
        }
        match self.value(letter, &field)? {
            Some(value) if !modified || "cCxXyYdeHImMSuUVwWy".contains(letter) => Ok((value, rest)),
            _ => {
                let directive = &text[..consumed];
                Err(TemplateError::unsupported(format!("the date directive '%{directive}'")))
            }
        }
    }

    fn value(&self, letter: char, field: &Field) -> Outcome<Option<String>> {
        let now = &self.0;
        let (year, hour) = (now.year(), now.hour());
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        let monday = now.weekday().num_days_from_monday();
        let sunday = now.weekday().num_days_from_sunday();
        let number = |value: i64, digits: usize, pad: char| Some(field.number(value, digits, pad));
        let words = |text: String| Some(field.words(text));
        let composed =
            |format: &str| -> Outcome<Option<String>> { Ok(Some(field.words(self.format(format)?))) };
        Ok(match letter {
            'a' => words(now.format("%a").to_string()),
            'A' => words(now.format("%A").to_string()),
            'b' | 'h' => words(now.format("%b").to_string()),
            'B' => words(now.format("%B").to_string()),
            'p' => Some(field.case(if hour < 12 { "AM" } else { "PM" }.to_owned(), true)),
            'P' => words(if hour < 12 { "am" } else { "pm" }.to_owned()),
            'c' => composed("%a %b %e %H:%M:%S %Y")?,
            'x' | 'D' => composed("%m/%d/%y")?,
            'X' | 'T' => composed("%H:%M:%S")?,
            'R' => composed("%H:%M")?,
            'r' => composed("%I:%M:%S %p")?,
            'F' if field.flag.is_none() && field.width == 0 => composed("%Y-%m-%d")?,
            'n' => words("\n".to_owned()),
            't' => words("\t".to_owned()),
            '%' => words("%".to_owned()),
            // glibc does not pad years; padding changes nothing, because the year of a run has four digits.
            'Y' => number(i64::from(year), 4, '0'),
            'C' => number(i64::from(year / 100), 2, '0'),
            'y' => number(i64::from(year % 100), 2, '0'),
            'G' => number(i64::from(now.iso_week().year()), 4, '0'),
            'g' => number(i64::from(now.iso_week().year() % 100), 2, '0'),
            'V' => number(i64::from(now.iso_week().week()), 2, '0'),
            'm' => number(i64::from(now.month()), 2, '0'),
            'd' => number(i64::from(now.day()), 2, '0'),
            'e' => number(i64::from(now.day()), 2, ' '),
            'H' => number(i64::from(hour), 2, '0'),
            'I' => number(i64::from(twelve), 2, '0'),
            'k' => number(i64::from(hour), 2, ' '),
            'l' => number(i64::from(twelve), 2, ' '),
            'M' => number(i64::from(now.minute()), 2, '0'),
            'S' => number(i64::from(now.second()), 2, '0'),
            'j' => number(i64::from(now.ordinal()), 3, '0'),
            'U' => number(i64::from((now.ordinal0() + 7 - sunday) / 7), 2, '0'),
            'W' => number(i64::from((now.ordinal0() + 7 - monday) / 7), 2, '0'),
            'u' => number(i64::from(monday + 1), 1, '0'),
            'w' => number(i64::from(sunday), 1, '0'),
            _ => None,
        })
    }
}

impl Field {
    fn number(&self, value: i64, digits: usize, pad: char) -> String {
        let pad = match self.flag {
            Some('-') => return self.wide(value.to_string(), '\0'),
            Some('_') => ' ',
            Some(_) => '0',
            None => pad,
        };
        let shown = value.to_string();
        let fill = digits.max(self.width).saturating_sub(shown.len());
        format!("{}{shown}", pad.to_string().repeat(fill))
    }

    fn words(&self, text: String) -> String {
        self.case(text, false)
    }

    fn case(&self, text: String, to_lower: bool) -> String {
        let text = match (self.swap, self.upper) {
            (true, _) if to_lower => text.to_lowercase(),
            (true, _) | (_, true) => text.to_uppercase(),
            _ => text,
        };
        self.wide(text, if self.flag == Some('0') { '0' } else { ' ' })
    }

    fn wide(&self, text: String, pad: char) -> String {
        match pad {
            '\0' => text,
            _ => format!("{}{text}", pad.to_string().repeat(self.width.saturating_sub(text.chars().count()))),
        }
    }
}
