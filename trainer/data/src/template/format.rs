//! Formatting of text with placeholders: `%` and `str.format`.

use std::rc::Rc;

use super::access;
use super::error::TemplateError;
use super::functions::Args;
use super::text;
use super::value::{Number, Outcome, Value, find};

/// Layout of a formatted value.
#[derive(Clone, Debug)]
struct Placeholder {
    fill: char,
    /// `<`, `>`, `^` or `=` (pads after the sign).
    align: Option<char>,
    sign: char,
    alternate: bool,
    width: usize,
    group: Option<char>,
    precision: Option<usize>,
    kind: char,
}

/// Largest width and precision.
const WIDEST: usize = 1 << 20;

fn bad(kind: char, value: &Value) -> TemplateError {
    TemplateError::failed(format!("the format '{kind}' cannot take a value of type '{}'", value.kind()))
}

/// `text % values`
pub(super) fn percent(text: &str, values: &Value) -> Outcome<String> {
    let mut given = match values {
        Value::Tuple(items) | Value::Group(items) => items.to_vec(),
        single => vec![single.clone()],
    }
    .into_iter();
    let is_mapping = matches!(values, Value::Dict(_) | Value::List(_) | Value::View(..) | Value::Range(..));
    let mut named = false;
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let mut by_name = None;
        if let Some(after) = rest.strip_prefix('(') {
            let end = after.find(')').ok_or_else(|| TemplateError::failed("incomplete format key"))?;
            let Value::Dict(pairs) = values else {
                return Err(TemplateError::failed("format requires a mapping"));
            };
            let key = Value::from(&after[..end]);
            by_name = Some(
                find(pairs, &key)?.cloned().ok_or_else(|| TemplateError::failed("a key of % is missing"))?,
            );
            (rest, named) = (&after[end + 1..], true);
        }
        let layout = placeholder(&mut rest)?;
        if layout.kind == '%' {
            out.push('%');
            continue;
        }
        let value = by_name.or_else(|| given.next());
        let value = value.ok_or_else(|| TemplateError::failed("not enough arguments for format string"))?;
        out.push_str(&percent_one(&value, layout)?);
    }
    if !is_mapping && !named && given.next().is_some() {
        return Err(TemplateError::failed("not all arguments converted during string formatting"));
    }
    out.push_str(rest);
    Ok(out)
}

fn placeholder(rest: &mut &str) -> Outcome<Placeholder> {
    let mut layout = Placeholder {
        fill: ' ',
        align: None,
        sign: '-',
        alternate: false,
        width: 0,
        group: None,
        precision: None,
        kind: 's',
    };
    let mut characters = rest.chars().peekable();
    while let Some(&flag) = characters.peek() {
        match flag {
            '-' => layout.align = Some('<'),
            '+' => layout.sign = '+',
            ' ' if layout.sign != '+' => layout.sign = ' ',
            ' ' => {}
            '#' => layout.alternate = true,
            '0' => layout.fill = '0',
            _ => break,
        }
        characters.next();
    }
    if layout.fill == '0' && layout.align.is_some() {
        layout.fill = ' ';
    }
    let mut number = || {
        let mut digits = String::new();
        while let Some(digit) = characters.next_if(char::is_ascii_digit) {
            digits.push(digit);
        }
        digits
    };
    layout.width = width(&number())?;
    let mut after = characters.clone();
    if after.next() == Some('.') {
        characters = after;
        let mut digits = String::new();
        while let Some(digit) = characters.next_if(char::is_ascii_digit) {
            digits.push(digit);
        }
        layout.precision = Some(width(&digits)?);
    }
    while characters.next_if(|letter| matches!(letter, 'h' | 'l' | 'L')).is_some() {}
    layout.kind = characters.next().ok_or_else(|| TemplateError::failed("incomplete format"))?;
    *rest = &rest[rest.len() - characters.map(char::len_utf8).sum::<usize>()..];
    Ok(layout)
}

fn width(digits: &str) -> Outcome<usize> {
    match digits.parse() {
        _ if digits.is_empty() => Ok(0),
        Ok(width) if width <= WIDEST => Ok(width),
        _ => Err(TemplateError::unsupported("a width that large")),
    }
}

fn percent_one(value: &Value, mut layout: Placeholder) -> Outcome<String> {
    let number = value.number();
    match layout.kind {
        's' | 'r' | 'a' | 'c' => {
            let mut shown = String::new();
            match (layout.kind, value) {
                ('s', value) => value.print(&mut shown)?,
                ('r', value) => value.repr(&mut shown)?,
                ('c', Value::Str(text)) if text.chars().count() == 1 => shown.push_str(text),
                ('c', Value::Int(code)) => shown.extend(u32::try_from(*code).ok().and_then(char::from_u32)),
                ('a', _) => return Err(TemplateError::unsupported("the format '%a'")),
                (kind, value) => return Err(bad(kind, value)),
            }
            layout.fill = ' ';
            Ok(pad(cut(&shown, layout.precision), "", &layout, '>'))
        }
        'd' | 'i' | 'u' => {
            let whole = match number {
                Some(Number::Int(value)) => value,
                Some(Number::Float(value)) if value.abs() < 9e18 => value.trunc() as i64,
                _ => return Err(bad(layout.kind, value)),
            };
            let digits = layout.precision.unwrap_or(0);
            let shown = format!("{:0digits$}", whole.unsigned_abs());
            Ok(signed(&shown, whole < 0, "", &zero_padded(layout)))
        }
        'o' | 'x' | 'X' => {
            let Some(Number::Int(whole)) = number else { return Err(bad(layout.kind, value)) };
            let (shown, prefix) = radix(whole.unsigned_abs(), layout.kind);
            let digits = layout.precision.unwrap_or(0);
            let prefix = if layout.alternate { prefix } else { "" };
            Ok(signed(&format!("{shown:0>digits$}"), whole < 0, prefix, &zero_padded(layout)))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let Some(number) = number else { return Err(bad(layout.kind, value)) };
            let number = number.float();
            let shown = float(number.abs(), layout.kind, layout.precision.unwrap_or(6), layout.alternate);
            Ok(signed(&shown, number.is_sign_negative() && !number.is_nan(), "", &zero_padded(layout)))
        }
        kind => Err(TemplateError::failed(format!("unsupported format character '{kind}'"))),
    }
}

fn zero_padded(mut layout: Placeholder) -> Placeholder {
    if layout.fill == '0' {
        layout.align = Some('=');
    }
    layout
}

fn radix(value: u64, kind: char) -> (String, &'static str) {
    match kind {
        'o' => (format!("{value:o}"), "0o"),
        'x' => (format!("{value:x}"), "0x"),
        'X' => (format!("{value:X}"), "0X"),
        _ => (format!("{value:b}"), "0b"),
    }
}

fn cut(text: &str, precision: Option<usize>) -> &str {
    let end = precision.and_then(|precision| text.char_indices().nth(precision));
    &text[..end.map_or(text.len(), |(at, _)| at)]
}

/// Formats a non-negative number as C does.
fn float(value: f64, kind: char, precision: usize, alternate: bool) -> String {
    let shown = if value.is_nan() {
        "nan".to_owned()
    } else if value.is_infinite() {
        "inf".to_owned()
    } else {
        match kind.to_ascii_lowercase() {
            'f' => fixed(value, precision, alternate),
            'e' => exponential(value, precision, alternate),
            _ => {
                let precision = precision.max(1);
                let scientific = format!("{value:.*e}", precision - 1);
                let exponent: i32 =
                    scientific.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
                let is_fixed = exponent >= -4 && exponent < precision as i32;
                let shown = match is_fixed {
                    true => fixed(value, (precision as i32 - 1 - exponent) as usize, alternate),
                    false => exponential(value, precision - 1, alternate),
                };
                if alternate { shown } else { trimmed(&shown) }
            }
        }
    };
    if kind.is_ascii_uppercase() { shown.to_uppercase() } else { shown }
}

fn fixed(value: f64, precision: usize, alternate: bool) -> String {
    format!("{value:.precision$}{}", if alternate && precision == 0 { "." } else { "" })
}

fn exponential(value: f64, precision: usize, alternate: bool) -> String {
    let shown = format!("{value:.precision$e}");
    let (digits, exponent) = shown.split_once('e').unwrap_or((&shown, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    let dot = if alternate && precision == 0 { "." } else { "" };
    format!("{digits}{dot}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Removes trailing zeros of the fraction.
fn trimmed(shown: &str) -> String {
    let (digits, exponent) = shown.find('e').map_or((shown, ""), |at| shown.split_at(at));
    let digits =
        if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    format!("{digits}{exponent}")
}

fn signed(digits: &str, negative: bool, prefix: &str, layout: &Placeholder) -> String {
    let sign = match (negative, layout.sign) {
        (true, _) => "-",
        (false, '+') => "+",
        (false, ' ') => " ",
        _ => "",
    };
    pad(digits, &format!("{sign}{prefix}"), layout, '>')
}

fn pad(body: &str, head: &str, layout: &Placeholder, default: char) -> String {
    let missing = layout.width.saturating_sub(body.chars().count() + head.chars().count());
    let fill = |count: usize| std::iter::repeat_n(layout.fill, count).collect::<String>();
    match layout.align.unwrap_or(default) {
        '<' => format!("{head}{body}{}", fill(missing)),
        '^' => format!("{}{head}{body}{}", fill(missing / 2), fill(missing - missing / 2)),
        '=' => format!("{head}{}{body}", fill(missing)),
        _ => format!("{}{head}{body}", fill(missing)),
    }
}

/// `text.format(…)`; `mapping` replaces the named arguments in `format_map`.
pub(super) fn braces(text: &str, args: &Args, mapping: Option<&Value>) -> Outcome<String> {
    let mut out = String::new();
    let mut rest = text;
    let mut next = Some(0);
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if rest.starts_with(brace) {
            out.push_str(brace);
            rest = &rest[1..];
            continue;
        }
        let end = rest.find('}').filter(|_| brace == "{");
        let end = end.ok_or_else(|| TemplateError::failed(format!("single '{brace}' in a format")))?;
        let field = &rest[..end];
        if field.contains('{') {
            return Err(TemplateError::unsupported("a placeholder within a placeholder"));
        }
        rest = &rest[end + 1..];
        let (name, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = name.split_once('!').map_or((name, None), |(name, how)| (name, Some(how)));
        let mut value = lookup(name, args, mapping, &mut next)?;
        match conversion {
            None => {}
            Some("s") => value = Value::Str(value.text()?),
            Some("r") => {
                let mut shown = String::new();
                value.repr(&mut shown)?;
                value = Value::from(shown);
            }
            Some(how) => return Err(TemplateError::unsupported(format!("the conversion '!{how}'"))),
        }
        out.push_str(&laid_out(&value, spec)?);
    }
    out.push_str(rest);
    Ok(out)
}

fn lookup(name: &str, args: &Args, mapping: Option<&Value>, next: &mut Option<usize>) -> Outcome<Value> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut path) = name.split_at(end);
    let missing = || TemplateError::failed(format!("no value for the placeholder '{{{name}}}'"));
    let index = match (first.is_empty(), first.parse::<usize>()) {
        (true, _) => {
            let index = next.filter(|_| true).ok_or_else(missing)?;
            *next = Some(index + 1);
            Some(index)
        }
        (false, Ok(index)) => {
            if next.is_some_and(|next| next > 0) {
                return Err(TemplateError::failed("placeholders with and without numbers"));
            }
            *next = None;
            Some(index)
        }
        (false, Err(_)) => None,
    };
    let mut value = match (index, mapping) {
        (Some(index), _) => args.positional.get(index).cloned().ok_or_else(missing)?,
        (None, Some(Value::Dict(pairs))) => find(pairs, &Value::from(first))?.cloned().ok_or_else(missing)?,
        (None, _) => args
            .named
            .iter()
            .find(|(known, _)| &**known == first)
            .map(|(_, v)| v.clone())
            .ok_or_else(missing)?,
    };
    while !path.is_empty() {
        if let Some(rest) = path.strip_prefix('.') {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            value = access::attribute(&value, &rest[..end])?;
            path = &rest[end..];
        } else {
            let end = path.find(']').ok_or_else(missing)?;
            let key = &path[1..end];
            let key = key.parse().map_or_else(|_| Value::from(key), Value::Int);
            value = access::item(&value, &key)?;
            path = &path[end + 1..];
        }
    }
    Ok(value)
}

fn laid_out(value: &Value, spec: &str) -> Outcome<String> {
    if spec.is_empty() {
        return value.text().map(|text| text.to_string());
    }
    let layout = specification(spec)?;
    match (value, layout.kind) {
        (Value::Str(text), 's' | '\0') => {
            if layout.sign != '-' || layout.alternate || layout.group.is_some() || layout.align == Some('=') {
                return Err(bad('s', value));
            }
            Ok(pad(cut(text, layout.precision), "", &layout, '<'))
        }
        (Value::Bool(_), '\0') => Err(TemplateError::unsupported("a layout of True or False")),
        (Value::Int(_) | Value::Bool(_), 'd' | 'x' | 'X' | 'o' | 'b' | '\0')
            if layout.precision.is_none() =>
        {
            let whole = value.integer()?;
            let (shown, prefix) = match layout.kind {
                'd' | '\0' => (whole.unsigned_abs().to_string(), ""),
                kind => radix(whole.unsigned_abs(), kind),
            };
            if layout.group.is_some() && (!prefix.is_empty() || layout.fill == '0') {
                return Err(TemplateError::unsupported("groups of digits in this layout"));
            }
            let prefix = if layout.alternate { prefix } else { "" };
            Ok(signed(&grouped(&shown, layout.group), whole < 0, prefix, &layout))
        }
        (
            Value::Float(_) | Value::Int(_) | Value::Bool(_),
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%' | '\0',
        ) => {
            let Some(number) = value.number().map(Number::float) else { return Err(bad(layout.kind, value)) };
            if layout.group.is_some() && layout.fill == '0' {
                return Err(TemplateError::unsupported("groups of digits in this layout"));
            }
            let shown = match (layout.kind, layout.precision) {
                ('\0', None) => text::float(number.abs()),
                ('\0', Some(_)) => {
                    return Err(TemplateError::unsupported("a precision without a kind of number"));
                }
                ('%', precision) => {
                    float(number.abs() * 100.0, 'f', precision.unwrap_or(6), layout.alternate) + "%"
                }
                (kind, precision) => float(number.abs(), kind, precision.unwrap_or(6), layout.alternate),
            };
            let negative = number.is_sign_negative() && !number.is_nan();
            Ok(signed(&grouped(&shown, layout.group), negative, "", &layout))
        }
        (_, kind) => Err(bad(if kind == '\0' { 's' } else { kind }, value)),
    }
}

fn specification(spec: &str) -> Outcome<Placeholder> {
    let characters: Vec<char> = spec.chars().collect();
    let is_align = |at: usize| characters.get(at).copied().filter(|align| "<>^=".contains(*align));
    let (fill, align, mut at) = match (is_align(1), is_align(0)) {
        (Some(align), _) => (characters[0], Some(align), 2),
        (None, Some(align)) => (' ', Some(align), 1),
        (None, None) => (' ', None, 0),
    };
    let mut layout = Placeholder {
        fill,
        align,
        sign: '-',
        alternate: false,
        width: 0,
        group: None,
        precision: None,
        kind: '\0',
    };
    let mut take = |wanted: &str| {
        let found = characters.get(at).copied().filter(|found| wanted.contains(*found));
        at += usize::from(found.is_some());
        found
    };
    layout.sign = take("+- ").unwrap_or('-');
    layout.alternate = take("#").is_some();
    if take("0").is_some() && align.is_none() {
        (layout.fill, layout.align) = ('0', Some('='));
    }
    let mut digits = String::new();
    while let Some(digit) = take("0123456789") {
        digits.push(digit);
    }
    layout.width = width(&digits)?;
    layout.group = take(",_");
    if take(".").is_some() {
        let mut digits = String::new();
        while let Some(digit) = take("0123456789") {
            digits.push(digit);
        }
        layout.precision = Some(width(&digits)?);
    }
    layout.kind = take("sdxXobeEfFgG%").unwrap_or('\0');
    match at == characters.len() {
        true => Ok(layout),
        false => Err(TemplateError::unsupported(format!("the layout ':{spec}'"))),
    }
}

fn grouped(digits: &str, group: Option<char>) -> String {
    let Some(group) = group else { return digits.to_owned() };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let mut out = String::new();
    for (at, digit) in digits[..end].chars().enumerate() {
        if at > 0 && (end - at) % 3 == 0 {
            out.push(group);
        }
        out.push(digit);
    }
    out + &digits[end..]
}

/// `format` as a filter: `text % arguments`.
pub(super) fn filter(text: &Value, args: Args) -> Outcome<Value> {
    if !args.positional.is_empty() && !args.named.is_empty() {
        return Err(TemplateError::failed("can't handle positional and keyword arguments at the same time"));
    }
    let values = match args.named.is_empty() {
        true => Value::tuple(args.positional),
        false => Value::Dict(Rc::new(
            args.named.into_iter().map(|(name, value)| (Value::Str(name), value)).collect(),
        )),
    };
    percent(&text.text()?, &values).map(Value::from)
}
