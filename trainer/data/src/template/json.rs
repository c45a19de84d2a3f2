//! The filter `tojson` as in transformers: Python's `json.dumps` with its arguments.

use std::fmt::Write;

use super::error::TemplateError;
use super::functions::Args;
use super::text;
use super::value::{Outcome, Value};

struct Style {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

pub(super) fn filter(value: &Value, args: Args) -> Outcome<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ascii, indent, separators, sorted] = args.bind("tojson", names, 0)?;
    let truth = |value: Option<Value>| value.is_some_and(|value| value.truth());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.to_string()),
        Some(other) => Some(" ".repeat(other.integer()?.clamp(0, 1 << 16) as usize)),
    };
    let (item, key) = match separators {
        None | Some(Value::None) => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => match pair.items()?.as_slice() {
            [item, key] => (item.as_str()?.to_string(), key.as_str()?.to_string()),
            _ => return Err(TemplateError::failed("'separators' needs two texts")),
        },
    };
    let mut out = String::new();
    write(value, &Style { ascii: truth(ascii), indent, item, key, sorted: truth(sorted) }, 0, &mut out)?;
    Ok(Value::from(out))
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Outcome<()> {
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Int(value) => out.push_str(&value.to_string()),
        Value::Float(value) => out.push_str(&number(*value)),
        Value::Str(text) => string(text, style.ascii, out),
        Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
            out.push('[');
            for (at, item) in items.iter().enumerate() {
                separate(at, style, depth, out);
                write(item, style, depth + 1, out)?;
            }
            close(']', items.is_empty(), style, depth, out);
        }
        Value::Dict(pairs) => {
            let mut order: Vec<usize> = (0..pairs.len()).collect();
            if style.sorted {
                let keys: Vec<Value> = pairs.iter().map(|(key, _)| key.clone()).collect();
                super::sequences::sort_by(&mut order, &keys)?;
            }
            out.push('{');
            for (at, &index) in order.iter().enumerate() {
                let (key, value) = &pairs[index];
                separate(at, style, depth, out);
                string(&key_text(key)?, style.ascii, out);
                out.push_str(&style.key);
                write(value, style, depth + 1, out)?;
            }
            close('}', pairs.is_empty(), style, depth, out);
        }
        Value::Markup(_) => return Err(super::value::markup()),
        _ => {
            return Err(TemplateError::failed(format!(
                "Object of type {} is not JSON serializable",
                value.kind()
            )));
        }
    }
    Ok(())
}

fn number(value: f64) -> String {
    match value {
        _ if value.is_nan() => "NaN".to_owned(),
        _ if value.is_infinite() => if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        _ => text::float(value),
    }
}

fn key_text(key: &Value) -> Outcome<String> {
    match key {
        Value::Str(text) => Ok(text.to_string()),
        Value::None => Ok("null".to_owned()),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Int(value) => Ok(value.to_string()),
        Value::Float(value) => Ok(number(*value)),
        _ => Err(TemplateError::failed(format!("a key of JSON cannot be of type '{}'", key.kind()))),
    }
}

fn line(style: &Style, depth: usize, out: &mut String) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(indent));
    }
}

fn separate(at: usize, style: &Style, depth: usize, out: &mut String) {
    if at > 0 {
        out.push_str(&style.item);
    }
    line(style, depth + 1, out);
}

fn close(bracket: char, empty: bool, style: &Style, depth: usize, out: &mut String) {
    if !empty {
        line(style, depth, out);
    }
    out.push(bracket);
}

fn string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\0'..='\x1f' => escape(character, out),
            ' '..='~' => out.push(character),
            _ if ascii => escape(character, out),
            _ => out.push(character),
        }
    }
    out.push('"');
}

fn escape(character: char, out: &mut String) {
    for unit in character.encode_utf16(&mut [0; 2]) {
        let _ = write!(out, "\\u{unit:04x}");
    }
}
