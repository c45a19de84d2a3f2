//! Attributes, items and slices, looked up in the same order as in jinja2's sandbox.

use std::rc::Rc;

use super::error::TemplateError;
use super::text::boundaries;
use super::value::function::Function;
use super::value::{Outcome, Value, find, markup};

const OF_STR: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const OF_LIST: [&str; 3] = ["copy", "count", "index"];
/// The sandbox hides methods that change a value.
const OF_LIST_UNSAFE: [&str; 8] = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const OF_DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const OF_DICT_UNSAFE: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const OF_NUMBER: [&str; 14] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "denominator",
    "from_bytes",
    "fromhex",
    "hex",
    "imag",
    "is_integer",
    "numerator",
    "real",
    "to_bytes",
    "mapping",
];

/// The attribute `name` of the Python type; `None` if the type has no such attribute.
pub(super) fn own(object: &Value, name: &str) -> Outcome<Option<Value>> {
    if name.starts_with("__") {
        return Err(TemplateError::unsupported(format!("the attribute '{name}'")));
    }
    let method = || Some(Value::Function(Function::Method(Rc::new((object.clone(), name.to_owned())))));
    let hidden = || {
        let what = format!("access to attribute '{name}' of '{}' object is unsafe.", object.kind());
        Some(Value::undefined(what))
    };
    Ok(match object {
        Value::Undefined(what) => return Err(TemplateError::failed(&**what)),
        Value::Markup(_) => return Err(markup()),
        Value::Str(_) if OF_STR.contains(&name) => method(),
        Value::List(_) if OF_LIST.contains(&name) => method(),
        Value::List(_) if OF_LIST_UNSAFE.contains(&name) => hidden(),
        Value::Dict(_) if OF_DICT.contains(&name) => method(),
        Value::Dict(_) if OF_DICT_UNSAFE.contains(&name) => hidden(),
        Value::Tuple(_) | Value::Range(..) | Value::Group(_) if matches!(name, "count" | "index") => method(),
        Value::Range(start, ..) if name == "start" => Some(Value::Int(*start)),
        Value::Range(_, stop, _) if name == "stop" => Some(Value::Int(*stop)),
        Value::Range(_, _, step) if name == "step" => Some(Value::Int(*step)),
        Value::Group(items) if name == "grouper" => Some(items[0].clone()),
        Value::Group(items) if name == "list" => Some(items[1].clone()),
        Value::Namespace(attributes) => {
            attributes.borrow().iter().find(|(known, _)| **known == *name).map(|(_, value)| value.clone())
        }
        Value::Function(Function::Loop(_)) if matches!(name, "cycle" | "changed") => method(),
        Value::Function(Function::Loop(state)) => state.attribute(name),
        Value::Function(Function::Cycler(_)) if matches!(name, "next" | "reset") => method(),
        Value::Function(Function::Cycler(cycler)) if name == "current" => {
            Some(super::functions::cycler_method(cycler, name))
        }
        Value::Bool(_) | Value::Int(_) | Value::Float(_) if OF_NUMBER.contains(&name) => {
            return Err(TemplateError::unsupported(format!("the attribute '{name}' of a number")));
        }
        Value::View(..) | Value::Iterator(_) | Value::Function(_) => {
            return Err(TemplateError::unsupported(format!("the attribute '{name}' of a {}", object.kind())));
        }
        _ => None,
    })
}

/// `object.name`
pub(super) fn attribute(object: &Value, name: &str) -> Outcome<Value> {
    if let Some(value) = own(object, name)? {
        return Ok(value);
    }
    if let Value::Dict(pairs) = object
        && let Some(value) = find(pairs, &Value::from(name))?
    {
        return Ok(value.clone());
    }
    Ok(missing(object, name))
}

fn missing(object: &Value, name: &str) -> Value {
    Value::undefined(match object {
        Value::None => format!("'None' has no attribute '{name}'"),
        _ => format!("'{} object' has no attribute '{name}'", object.kind()),
    })
}

/// `object[key]`
pub(super) fn item(object: &Value, key: &Value) -> Outcome<Value> {
    if let Value::Undefined(what) = object {
        return Err(TemplateError::failed(&**what));
    }
    if let Some(value) = subscript(object, key)? {
        return Ok(value);
    }
    let Value::Str(name) = key else {
        let mut word = String::new();
        key.repr(&mut word)?;
        return Ok(Value::undefined(format!("'{} object' has no element {word}", object.kind())));
    };
    match own(object, name)? {
        Some(value) => Ok(value),
        None => Ok(missing(object, name)),
    }
}

fn subscript(object: &Value, key: &Value) -> Outcome<Option<Value>> {
    let at = |length: usize| {
        let index = key.integer().ok()?;
        let index = if index < 0 { index + length as i64 } else { index };
        usize::try_from(index).ok().filter(|&index| index < length)
    };
    Ok(match object {
        // An unhashable key is not an error: jinja2 treats the item as missing.
        Value::Dict(pairs) if key.hashable().is_ok() => find(pairs, key)?.cloned(),
        Value::List(items) | Value::Tuple(items) | Value::Group(items) => {
            at(items.len()).map(|at| items[at].clone())
        }
        Value::Range(start, _, step) => {
            let at = at(object.length().unwrap_or(0));
            at.map(|at| Value::Int(start + at as i64 * step))
        }
        Value::Str(text) if key.number().is_some() => {
            let bounds = boundaries(text);
            at(bounds.len() - 1).map(|at| Value::from(&text[bounds[at]..bounds[at + 1]]))
        }
        Value::Markup(_) => return Err(markup()),
        _ => None,
    })
}

/// `object[start:stop:step]`
pub(super) fn slice(object: &Value, parts: &[Value; 3]) -> Outcome<Value> {
    let chosen = |length: usize| -> Outcome<Vec<usize>> { indices(length, parts) };
    let pick = |items: &[Value]| -> Outcome<Vec<Value>> {
        Ok(chosen(items.len())?.into_iter().map(|at| items[at].clone()).collect())
    };
    match object {
        Value::List(items) => pick(items).map(Value::from),
        Value::Tuple(items) | Value::Group(items) => pick(items).map(Value::tuple),
        Value::Str(text) => {
            let bounds = boundaries(text);
            let chosen = chosen(bounds.len() - 1)?;
            Ok(Value::from(
                chosen.into_iter().map(|at| &text[bounds[at]..bounds[at + 1]]).collect::<String>(),
            ))
        }
        Value::Undefined(what) => Err(TemplateError::failed(&**what)),
        Value::Range(..) => Err(TemplateError::unsupported("a slice of a range")),
        Value::Markup(_) => Err(markup()),
        // jinja2 raises an error, or returns nothing if the whole expression is constant.
        _ => Err(TemplateError::unsupported(format!("a slice of a {}", object.kind()))),
    }
}

/// The indices of Python's `range(*slice.indices(length))`.
fn indices(length: usize, parts: &[Value; 3]) -> Outcome<Vec<usize>> {
    let part = |at: usize| match &parts[at] {
        Value::None => Ok(None),
        value => value.integer().map(Some),
    };
    let (length, step) = (length as i64, part(2)?.unwrap_or(1));
    if step == 0 {
        return Err(TemplateError::failed("slice step cannot be zero"));
    }
    let (lower, upper) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |value: Option<i64>, default: i64| match value {
        None => default,
        Some(value) if value < 0 => (value.saturating_add(length)).max(lower),
        Some(value) => value.min(upper),
    };
    let start = clamp(part(0)?, if step > 0 { lower } else { upper });
    let stop = clamp(part(1)?, if step > 0 { upper } else { lower });
    let mut chosen = Vec::new();
    let mut at = start;
    while if step > 0 { at < stop } else { at > stop } {
        chosen.push(at as usize);
        at = match at.checked_add(step) {
            Some(at) => at,
            None => break,
        };
    }
    Ok(chosen)
}
