//! Methods of Python's strings, lists and dictionaries.

use std::rc::Rc;

use super::error::TemplateError;
use super::format;
use super::functions::Args;
use super::text::{self, is_space};
use super::value::{Outcome, Pairs, Value, find, put};

/// Calls a method that [`super::access::own`] returned.
pub(super) fn call(object: &Value, name: &str, args: Args) -> Outcome<Value> {
    match object {
        Value::Str(text) => of_text(text, name, args),
        Value::Dict(pairs) => of_dict(pairs, name, args),
        _ => of_sequence(object, name, args),
    }
}

fn of_dict(pairs: &Rc<Pairs>, name: &str, args: Args) -> Outcome<Value> {
    if name == "get" {
        let given = args.positional("get", 1, 2)?;
        given[0].hashable()?;
        let found = find(pairs, &given[0])?.cloned();
        return Ok(found.or_else(|| given.get(1).cloned()).unwrap_or(Value::None));
    }
    if name == "fromkeys" {
        let given = args.positional("fromkeys", 1, 2)?;
        let mut made = Pairs::new();
        for key in given[0].items()? {
            put(&mut made, key, given.get(1).cloned().unwrap_or(Value::None))?;
        }
        return Ok(Value::Dict(made.into()));
    }
    args.positional(name, 0, 0)?;
    Ok(match name {
        "copy" => Value::Dict(pairs.clone()),
        "keys" => Value::View("dict_keys", pairs.iter().map(|(key, _)| key.clone()).collect()),
        "values" => Value::View("dict_values", pairs.iter().map(|(_, value)| value.clone()).collect()),
        _ => Value::View("dict_items", items(pairs).into()),
    })
}

/// Pairs as tuples.
pub(super) fn items(pairs: &Pairs) -> Vec<Value> {
    pairs.iter().map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()])).collect()
}

fn of_sequence(object: &Value, name: &str, args: Args) -> Outcome<Value> {
    match name {
        "copy" => args.positional("copy", 0, 0).map(|_| object.clone()),
        "count" => {
            let wanted = args.positional("count", 1, 1)?;
            let mut count = 0;
            for item in object.items()? {
                count += i64::from(item.equals(&wanted[0])?);
            }
            Ok(Value::Int(count))
        }
        _ => {
            let given = args.positional("index", 1, 3)?;
            let items = object.items()?;
            let bounds = Bounds::of(&given, 1, items.len())?;
            for (at, item) in items.iter().enumerate().take(bounds.end).skip(bounds.start) {
                if item.equals(&given[0])? {
                    return Ok(Value::Int(at as i64));
                }
            }
            Err(TemplateError::failed("the item is not in the list"))
        }
    }
}

/// Optional start and end arguments, with the rules of slices, in items or characters.
struct Bounds {
    start: usize,
    end: usize,
}

impl Bounds {
    fn of(given: &[Value], at: usize, length: usize) -> Outcome<Self> {
        let bound = |at: usize, default: usize| match given.get(at) {
            None | Some(Value::None) => Ok(default),
            Some(value) => {
                let value = value.integer()?;
                let value = if value < 0 { value.saturating_add(length as i64).max(0) } else { value };
                Ok(usize::try_from(value).unwrap_or(usize::MAX))
            }
        };
        Ok(Self { start: bound(at, 0)?, end: bound(at + 1, length)?.min(length) })
    }

    /// The part of a text within the bounds, and the number of characters before it.
    fn part<'t>(&self, text: &'t str) -> Option<(&'t str, usize)> {
        let bounds = text::boundaries(text);
        let start = *bounds.get(self.start)?;
        (self.start <= self.end).then(|| (&text[start..bounds[self.end]], self.start))
    }
}

fn of_text(text: &Rc<str>, name: &str, args: Args) -> Outcome<Value> {
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let given = args.positional(name, 0, 1)?;
            strip(text, name != "rstrip", name != "lstrip", given.first())
        }
        "split" | "rsplit" => {
            let [separator, most] = args.bind(name, ["sep", "maxsplit"], 0)?;
            split(text, name == "rsplit", separator, most)
        }
        "startswith" | "endswith" => ends(text, name == "startswith", &args.positional(name, 1, 3)?),
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, &args.positional(name, 1, 3)?),
        "replace" => {
            let given = args.positional("replace", 2, 3)?;
            let count = given.get(2).map_or(Ok(-1), Value::integer)?;
            Ok(Value::from(replace(text, given[0].as_str()?, given[1].as_str()?, count)))
        }
        "join" => {
            let given = args.positional("join", 1, 1)?;
            let items = given[0].items()?;
            let parts =
                items.iter().map(|item| item.as_str().map(|part| &**part)).collect::<Outcome<Vec<_>>>()?;
            Ok(Value::from(parts.join(text)))
        }
        "format" => format::braces(text, &args, None).map(Value::from),
        "format_map" => {
            let given = args.positional("format_map", 1, 1)?;
            format::braces(text, &Args::default(), Some(&given[0])).map(Value::from)
        }
        "splitlines" => {
            let [keep] = args.bind("splitlines", ["keepends"], 0)?;
            let lines = text::lines(text, keep.is_some_and(|keep| keep.truth()));
            Ok(Value::from(lines.into_iter().map(Value::from).collect::<Vec<_>>()))
        }
        "partition" | "rpartition" => partition(text, name == "rpartition", &args.positional(name, 1, 1)?[0]),
        "removeprefix" | "removesuffix" => {
            let given = args.positional(name, 1, 1)?;
            let part = given[0].as_str()?;
            let rest =
                if name == "removeprefix" { text.strip_prefix(&**part) } else { text.strip_suffix(&**part) };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        "center" | "ljust" | "rjust" | "zfill" => justify(text, name, &args.positional(name, 1, 2)?),
        "expandtabs" => {
            let [size] = args.bind("expandtabs", ["tabsize"], 0)?;
            Ok(Value::from(expand(text, size.map_or(Ok(8), |size| size.integer())?)))
        }
        "encode" | "maketrans" | "translate" => {
            Err(TemplateError::unsupported(format!("the method '{name}' of a text")))
        }
        _ => {
            args.positional(name, 0, 0)?;
            plain(text, name)
        }
    }
}

/// Methods without arguments.
fn plain(text: &str, name: &str) -> Outcome<Value> {
    let all = |is: &dyn Fn(char) -> Outcome<bool>| -> Outcome<Value> {
        for character in text.chars() {
            if !is(character)? {
                return Ok(Value::Bool(false));
            }
        }
        Ok(Value::Bool(!text.is_empty()))
    };
    match name {
        "upper" => Ok(Value::from(text.to_uppercase())),
        "lower" => Ok(Value::from(text.to_lowercase())),
        "casefold" if text.is_ascii() => Ok(Value::from(text.to_ascii_lowercase())),
        "capitalize" => capitalize(text).map(Value::from),
        "title" => title(text).map(Value::from),
        "swapcase" => {
            let swapped = text.chars().map(|c| {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect::<String>()
                }
            });
            // The lower case of a sigma differs at the end of a word.
            match text.contains('Σ') {
                true => Err(TemplateError::unsupported("swapping the case of 'Σ'")),
                false => Ok(Value::from(swapped.collect::<String>())),
            }
        }
        "isspace" => all(&|character| Ok(is_space(character))),
        "isalpha" => all(&text::is_letter),
        "isalnum" => all(&|character| {
            Ok(if character.is_numeric() {
                text::is_digit(character, true)?
            } else {
                text::is_letter(character)?
            })
        }),
        "isdigit" => all(&|character| text::is_digit(character, false)),
        "isnumeric" => all(&|character| text::is_digit(character, true)),
        "isdecimal" => all(&|character| match character.is_ascii() {
            true => Ok(character.is_ascii_digit()),
            false => text::is_digit(character, false),
        }),
        "isascii" => Ok(Value::Bool(text.is_ascii())),
        "isprintable" => Ok(Value::Bool(text.chars().all(text::is_printable))),
        "islower" => Ok(Value::Bool(is_cased(text, char::is_lowercase, char::is_uppercase))),
        "isupper" => Ok(Value::Bool(is_cased(text, char::is_uppercase, char::is_lowercase))),
        "istitle" if text.is_ascii() => Ok(Value::Bool(is_title(text))),
        "isidentifier" if text.is_ascii() => {
            let starts = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            Ok(Value::Bool(starts && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')))
        }
        _ => Err(TemplateError::unsupported(format!("the method '{name}' on this text"))),
    }
}

pub(super) fn is_cased(text: &str, wanted: fn(char) -> bool, other: fn(char) -> bool) -> bool {
    text.chars().any(wanted) && !text.chars().any(other)
}

fn is_title(text: &str) -> bool {
    let (mut cased, mut inside) = (false, false);
    for character in text.chars() {
        let fits = match (character.is_ascii_uppercase(), character.is_ascii_lowercase()) {
            (true, _) => !inside,
            (_, true) => inside,
            _ => true,
        };
        if !fits {
            return false;
        }
        inside = character.is_ascii_alphabetic();
        cased |= inside;
    }
    cased
}

/// `str.capitalize`
pub(super) fn capitalize(text: &str) -> Outcome<String> {
    let mut out = String::with_capacity(text.len());
    if let Some(first) = text.chars().next() {
        text::title(first, &mut out)?;
        out.push_str(&text[first.len_utf8()..].to_lowercase());
    }
    Ok(out)
}

/// `str.title`: words are runs of characters that have case.
fn title(text: &str) -> Outcome<String> {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for character in text.chars() {
        let cased = character.is_uppercase() || character.is_lowercase();
        match (cased, inside) {
            (true, false) => text::title(character, &mut out)?,
            (true, true) if character == 'Σ' => return Err(TemplateError::unsupported("title case of 'Σ'")),
            (true, true) => out.extend(character.to_lowercase()),
            _ => text::title(character, &mut out)?,
        }
        inside = cased;
    }
    Ok(out)
}

pub(super) fn strip(text: &str, left: bool, right: bool, characters: Option<&Value>) -> Outcome<Value> {
    let set = match characters {
        None | Some(Value::None) => None,
        Some(characters) => Some(characters.as_str()?),
    };
    let goes = |character: char| set.map_or_else(|| is_space(character), |set| set.contains(character));
    let text = if left { text.trim_start_matches(goes) } else { text };
    Ok(Value::from(if right { text.trim_end_matches(goes) } else { text }))
}

fn split(text: &str, from_right: bool, separator: Option<Value>, most: Option<Value>) -> Outcome<Value> {
    let most = most.map_or(Ok(-1), |most| most.integer())?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator {
        None | Some(Value::None) => words(text, from_right, most),
        Some(separator) => {
            let separator = separator.as_str()?;
            if separator.is_empty() {
                return Err(TemplateError::failed("empty separator"));
            }
            let pieces = most.saturating_add(1);
            match from_right {
                true => text.rsplitn(pieces, &**separator).collect(),
                false => text.splitn(pieces, &**separator).collect(),
            }
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>()))
}

/// Splits at runs of white space.
fn words(text: &str, from_right: bool, most: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let trim = |text| {
        if from_right {
            str::trim_end_matches(text, is_space)
        } else {
            str::trim_start_matches(text, is_space)
        }
    };
    let mut rest = trim(text);
    while !rest.is_empty() {
        if parts.len() == most {
            let other = if from_right { rest.trim_start_matches(is_space) } else { rest };
            // The last piece keeps the spaces at the far end of the text.
            parts.push(if from_right { rest } else { other });
            break;
        }
        let (part, after) = match from_right {
            true => match rest.char_indices().rev().find(|&(_, c)| is_space(c)) {
                Some((at, space)) => (&rest[at + space.len_utf8()..], &rest[..at]),
                None => (rest, ""),
            },
            false => rest.find(is_space).map_or((rest, ""), |at| rest.split_at(at)),
        };
        parts.push(part);
        rest = trim(after);
    }
    parts
}

fn ends(text: &str, start: bool, given: &[Value]) -> Outcome<Value> {
    let bounds = Bounds::of(given, 1, text.chars().count())?;
    let Some((part, _)) = bounds.part(text) else { return Ok(Value::Bool(false)) };
    let is = |wanted: &Value| -> Outcome<bool> {
        let wanted = wanted.as_str()?;
        Ok(if start { part.starts_with(&**wanted) } else { part.ends_with(&**wanted) })
    };
    match &given[0] {
        Value::Tuple(all) | Value::Group(all) => {
            for wanted in all.iter() {
                if is(wanted)? {
                    return Ok(Value::Bool(true));
                }
            }
            Ok(Value::Bool(false))
        }
        wanted => is(wanted).map(Value::Bool),
    }
}

fn search(text: &str, name: &str, given: &[Value]) -> Outcome<Value> {
    let wanted = given[0].as_str()?;
    let part = Bounds::of(given, 1, text.chars().count())?.part(text);
    if name == "count" {
        let count = part.map_or(0, |(part, _)| match wanted.is_empty() {
            true => part.chars().count() + 1,
            false => part.matches(&**wanted).count(),
        });
        return Ok(Value::Int(count as i64));
    }
    let found = part.and_then(|(part, before)| {
        let at = if name.starts_with('r') { part.rfind(&**wanted) } else { part.find(&**wanted) };
        at.map(|at| (before + part[..at].chars().count()) as i64)
    });
    match found {
        Some(at) => Ok(Value::Int(at)),
        None if name.ends_with("find") => Ok(Value::Int(-1)),
        None => Err(TemplateError::failed("substring not found")),
    }
}

/// `str.replace`
pub(super) fn replace(text: &str, old: &str, new: &str, count: i64) -> String {
    match usize::try_from(count) {
        Ok(count) => text.replacen(old, new, count),
        Err(_) => text.replace(old, new),
    }
}

fn partition(text: &str, from_right: bool, separator: &Value) -> Outcome<Value> {
    let separator = separator.as_str()?;
    if separator.is_empty() {
        return Err(TemplateError::failed("empty separator"));
    }
    let cut = if from_right { text.rsplit_once(&**separator) } else { text.split_once(&**separator) };
    let parts = match (cut, from_right) {
        (Some((before, after)), _) => [before, separator, after],
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
    };
    Ok(Value::tuple(parts.into_iter().map(Value::from).collect()))
}

fn justify(text: &str, name: &str, given: &[Value]) -> Outcome<Value> {
    let width = usize::try_from(given[0].integer()?).unwrap_or(0);
    if width > 1 << 20 {
        return Err(TemplateError::unsupported("a text that wide"));
    }
    let fill = match given.get(1) {
        Some(fill) if name != "zfill" => fill.as_str()?.to_string(),
        Some(_) => return Err(TemplateError::failed("zfill takes one argument")),
        None => if name == "zfill" { "0" } else { " " }.to_owned(),
    };
    if fill.chars().count() != 1 {
        return Err(TemplateError::failed("The fill character must be exactly one character long"));
    }
    let missing = width.saturating_sub(text.chars().count());
    let left = match name {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, body) = match text.strip_prefix(['+', '-']) {
        Some(body) if name == "zfill" => text.split_at(text.len() - body.len()),
        _ => ("", text),
    };
    Ok(Value::from(format!("{sign}{}{body}{}", fill.repeat(left), fill.repeat(missing - left))))
}

fn expand(text: &str, size: i64) -> String {
    let (mut out, mut column) = (String::with_capacity(text.len()), 0);
    for character in text.chars() {
        match character {
            '\t' if size > 0 => {
                let fill = (size - column % size).min(1 << 16);
                out.push_str(&" ".repeat(fill as usize));
                column += fill;
            }
            '\t' => {}
            _ => {
                out.push(character);
                column = if matches!(character, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}
