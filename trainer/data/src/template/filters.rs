//! Filters on single values; those on sequences are in [`super::sequences`].

use super::error::TemplateError;
use super::functions::Args;
use super::methods;
use super::sequences;
use super::text::{self, is_space};
use super::value::{Number, Outcome, Value};
use super::{access, format, json};

pub(super) const NAMES: [&str; 46] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
];

/// Filters of jinja2 that are not supported; chat templates do not need them.
pub(super) const REFUSED: [&str; 8] =
    ["filesizeformat", "pprint", "random", "striptags", "urlencode", "urlize", "wordwrap", "xmlattr"];

pub(super) fn call(name: &str, value: &Value, args: Args) -> Outcome<Value> {
    if name == "map" {
        return map(value, args);
    }
    if sequences::NAMES.contains(&name) {
        return sequences::call(name, value, args);
    }
    // The value as text. Escaped text is refused, because jinja2 would escape the other texts of the filter.
    let soft = || -> Outcome<std::rc::Rc<str>> {
        match value {
            Value::Markup(_) => Err(super::value::markup()),
            _ => value.text(),
        }
    };
    match name {
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"], 0)?;
            let falls = value.is_undefined() || boolean.is_some_and(|is| is.truth()) && !value.truth();
            Ok(if falls { default.unwrap_or_else(|| Value::from("")) } else { value.clone() })
        }
        "tojson" => json::filter(value, args),
        "trim" => {
            let [characters] = args.bind("trim", ["chars"], 0)?;
            methods::strip(&soft()?, true, true, characters.as_ref())
        }
        "replace" => {
            let [old, new, count] = args.bind("replace", ["old", "new", "count"], 2)?;
            let count = match count {
                None | Some(Value::None) => -1,
                Some(count) => count.integer()?,
            };
            let text = |value: Option<Value>| value.unwrap_or(Value::None).text();
            Ok(Value::from(methods::replace(&soft()?, &text(old)?, &text(new)?, count)))
        }
        "format" => format::filter(&Value::Str(soft()?), args),
        "indent" => indent(&soft()?, args),
        "truncate" => truncate(&soft()?, args),
        "center" => {
            let [width] = args.bind("center", ["width"], 0)?;
            let width = vec![width.unwrap_or(Value::Int(80))];
            methods::call(&Value::Str(soft()?), "center", Args { positional: width, named: Vec::new() })
        }
        "int" => int(value, args),
        "float" => {
            let [default] = args.bind("float", ["default"], 0)?;
            Ok(to_float(value)?.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => round(value, args),
        "attr" => {
            let [name] = args.bind("attr", ["name"], 1)?;
            let name = name.unwrap_or(Value::None).text()?;
            let missing = || Value::undefined(format!("'{} object' has no attribute '{name}'", value.kind()));
            Ok(access::own(value, &name)?.unwrap_or_else(missing))
        }
        _ => {
            args.positional(name, 0, 0)?;
            plain(name, value, &soft)
        }
    }
}

fn map(value: &Value, mut args: Args) -> Outcome<Value> {
    if !value.truth() {
        return Ok(Value::iterator(Vec::new()));
    }
    let items = value.items()?;
    if let Some(mapped) = sequences::map_attribute(&items, &args) {
        return mapped;
    }
    let name = sequences::text_argument(&mut args, "map")?;
    sequences::known(&name, &NAMES, "filter")?;
    let mapped = items.iter().map(|item| call(&name, item, args.clone()));
    Ok(Value::iterator(mapped.collect::<Outcome<_>>()?))
}

/// Filters without arguments.
fn plain(name: &str, value: &Value, soft: &dyn Fn() -> Outcome<std::rc::Rc<str>>) -> Outcome<Value> {
    match name {
        "upper" => Ok(Value::from(soft()?.to_uppercase())),
        "lower" => Ok(Value::from(soft()?.to_lowercase())),
        "capitalize" => methods::capitalize(&soft()?).map(Value::from),
        "title" => title(&soft()?).map(Value::from),
        "string" => match value {
            Value::Markup(_) => Ok(value.clone()),
            _ => value.text().map(Value::Str),
        },
        "wordcount" => {
            let text = soft()?;
            let is_word = |character: char| character.is_alphanumeric() || character == '_';
            Ok(Value::Int(text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count() as i64))
        }
        "safe" => Ok(Value::Markup(value.text()?)),
        "e" | "escape" if matches!(value, Value::Markup(_)) => Ok(value.clone()),
        "e" | "escape" | "forceescape" => Ok(Value::Markup(escape(&value.text()?).into())),
        _ => match value.number() {
            Some(Number::Int(value)) => value
                .checked_abs()
                .map(Value::Int)
                .ok_or_else(|| TemplateError::unsupported("a whole number beyond 64 bits")),
            Some(Number::Float(value)) => Ok(Value::Float(value.abs())),
            None => Err(TemplateError::failed(format!("'abs' cannot be applied to '{}'", value.kind()))),
        },
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(character),
        }
    }
    out
}

/// Title case; a word begins after spaces, hyphens and opening brackets.
fn title(text: &str) -> Outcome<String> {
    let begins = |character: char| is_space(character) || "-({[<".contains(character);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = match begins(first) {
            true => rest.find(|c| !begins(c)),
            false => rest.find(begins),
        };
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        out.push_str(&first.to_uppercase().collect::<String>());
        out.push_str(&word[first.len_utf8()..].to_lowercase());
        rest = after;
    }
    Ok(out)
}

fn indent(text: &str, args: Args) -> Outcome<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"], 0)?;
    let truth = |value: Option<Value>| value.is_some_and(|value| value.truth());
    let (first, blank) = (truth(first), truth(blank));
    let indent = match width {
        None => " ".repeat(4),
        Some(Value::Str(text)) => text.to_string(),
        Some(width) => " ".repeat(width.integer()?.clamp(0, 1 << 16) as usize),
    };
    let whole = format!("{text}\n");
    let lines = text::lines(&whole, false);
    let mut out = if first { indent.clone() } else { String::new() };
    for (at, line) in lines.iter().enumerate() {
        if at > 0 {
            out.push('\n');
            out.push_str(if blank || !line.is_empty() { &indent } else { "" });
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

fn truncate(text: &str, args: Args) -> Outcome<Value> {
    let [length, kill, end, leeway] = args.bind("truncate", ["length", "killwords", "end", "leeway"], 0)?;
    let whole = |value: Option<Value>, default: i64| match value {
        None | Some(Value::None) => Ok(default),
        Some(value) => value.integer(),
    };
    let (length, leeway) = (whole(length, 255)?, whole(leeway, 5)?);
    let end = end.map_or(Ok("...".into()), |end| end.as_str().cloned())?;
    let of_end = end.chars().count() as i64;
    if length < of_end || leeway < 0 {
        return Err(TemplateError::failed("'truncate' needs a length not below that of its end, and leeway"));
    }
    if text.chars().count() as i64 <= length + leeway {
        return Ok(Value::from(text));
    }
    let kept: String = text.chars().take((length - of_end) as usize).collect();
    let kept = match kill.is_some_and(|kill| kill.truth()) {
        true => kept.as_str(),
        false => kept.rsplit_once(' ').map_or(kept.as_str(), |(before, _)| before),
    };
    Ok(Value::from(format!("{kept}{end}")))
}

fn int(value: &Value, args: Args) -> Outcome<Value> {
    let [default, base] = args.bind("int", ["default", "base"], 0)?;
    let base = base.map_or(Ok(10), |base| base.integer())?;
    let beyond = || TemplateError::unsupported("a whole number beyond 64 bits");
    let of_float = |value: f64| match value {
        _ if !value.is_finite() => Ok(None),
        _ if value.abs() < 9e18 => Ok(Some(value.trunc() as i64)),
        _ => Err(beyond()),
    };
    let whole = match value {
        Value::Str(text) => match read_int(text, base)? {
            Some(whole) => Some(whole),
            None => to_float(value)?.map_or(Ok(None), of_float)?,
        },
        _ => match value.number() {
            Some(Number::Int(whole)) => Some(whole),
            // Python's `int` raises an error for infinity that the filter does not catch.
            Some(Number::Float(number)) if number.is_infinite() => return Err(beyond()),
            Some(Number::Float(number)) => of_float(number)?,
            None => to_float(value)?.map_or(Ok(None), of_float)?,
        },
    };
    Ok(whole.map_or_else(|| default.unwrap_or(Value::Int(0)), Value::Int))
}

/// `int(text, base)`
fn read_int(text: &str, base: i64) -> Outcome<Option<i64>> {
    let trimmed = text.trim_matches(is_space);
    let (negative, digits) = match trimmed.strip_prefix(['-', '+']) {
        Some(digits) => (trimmed.starts_with('-'), digits),
        None => (false, trimmed),
    };
    let base = match base {
        2..=36 => base as u32,
        _ => return Err(TemplateError::unsupported("a base of numbers outside 2 to 36")),
    };
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "\0",
    };
    let lower = digits.to_lowercase();
    let lower =
        lower.strip_prefix(prefix).map_or(lower.as_str(), |rest| rest.strip_prefix('_').unwrap_or(rest));
    if !lower.is_ascii() && lower.chars().any(char::is_numeric) {
        return Err(TemplateError::unsupported("a number in digits that are not ASCII"));
    }
    let wrong = lower.is_empty() || lower.starts_with('_') || lower.ends_with('_') || lower.contains("__");
    let clean = lower.replace('_', "");
    if wrong || !clean.chars().all(|digit| digit.is_digit(base)) {
        return Ok(None);
    }
    match i64::from_str_radix(&format!("{}{clean}", if negative { "-" } else { "" }), base) {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(TemplateError::unsupported("a whole number beyond 64 bits")),
    }
}

/// `float(value)`; `None` if the text is not a number.
fn to_float(value: &Value) -> Outcome<Option<f64>> {
    let text = match value {
        Value::Str(text) => text,
        Value::Undefined(what) => return Err(TemplateError::failed(&**what)),
        Value::Markup(_) => return Err(super::value::markup()),
        _ => return Ok(value.number().map(Number::float)),
    };
    let text = text.trim_matches(is_space);
    if !text.is_ascii() && text.chars().any(char::is_numeric) {
        return Err(TemplateError::unsupported("a number in digits that are not ASCII"));
    }
    let wrong = |part: &str| part.starts_with('_') || part.ends_with('_');
    if text.contains("__") || text.split(|c: char| !c.is_ascii_digit() && c != '_').any(wrong) {
        return Ok(None);
    }
    Ok(text.replace('_', "").parse().ok())
}

fn round(value: &Value, args: Args) -> Outcome<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"], 0)?;
    let precision = precision.map_or(Ok(0), |precision| precision.integer())?;
    let method = method.map_or(Ok("common".into()), |method| method.as_str().cloned())?;
    let Some(number) = value.number() else {
        return Err(match value {
            Value::Undefined(what) => TemplateError::failed(&**what),
            _ => TemplateError::failed(format!("'round' cannot be applied to '{}'", value.kind())),
        });
    };
    if !(0..=15).contains(&precision) {
        return Err(TemplateError::unsupported("rounding to that many places"));
    }
    let scale = 10f64.powi(precision as i32);
    match (&*method, number) {
        ("common", Number::Int(whole)) => Ok(Value::Int(whole)),
        ("common", Number::Float(number)) => {
            let places = precision as usize;
            Ok(Value::Float(format!("{number:.places$}").parse().unwrap_or(number)))
        }
        ("ceil", number) => Ok(Value::Float((number.float() * scale).ceil() / scale)),
        ("floor", number) => Ok(Value::Float((number.float() * scale).floor() / scale)),
        _ => Err(TemplateError::failed("method must be common, ceil or floor")),
    }
}
