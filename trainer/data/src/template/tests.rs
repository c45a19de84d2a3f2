//! jinja2's tests, after `is`.

use super::ast::Comparison;
use super::ast::Math;
use super::error::TemplateError;
use super::eval::compare;
use super::functions::Args;
use super::methods::is_cased;
use super::value::{Outcome, Value};
use super::{filters, math};

pub(super) const NAMES: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

pub(super) fn call(name: &str, value: &Value, args: Args) -> Outcome<bool> {
    let one = |args: Args| -> Outcome<Value> {
        let [other] = args.bind(name, ["other"], 1)?;
        Ok(other.unwrap_or(Value::None))
    };
    let rest = |by: &Value| math::apply(Math::Mod, value, by)?.equals(&Value::Int(0));
    let comparison = match name {
        "==" | "eq" | "equalto" => Some(Comparison::Eq),
        "!=" | "ne" => Some(Comparison::Ne),
        ">" | "gt" | "greaterthan" => Some(Comparison::Gt),
        ">=" | "ge" => Some(Comparison::Ge),
        "<" | "lt" | "lessthan" => Some(Comparison::Lt),
        "<=" | "le" => Some(Comparison::Le),
        "in" => Some(Comparison::In),
        _ => None,
    };
    if let Some(comparison) = comparison {
        return compare(comparison, value, &one(args)?);
    }
    match name {
        "divisibleby" => return rest(&one(args)?),
        "sameas" => return same(value, &one(args)?),
        _ => {}
    }
    args.positional(name, 0, 0)?;
    Ok(match name {
        "odd" => math::apply(Math::Mod, value, &Value::Int(2))?.equals(&Value::Int(1))?,
        "even" => rest(&Value::Int(2))?,
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "filter" => {
            let name = value.as_str()?;
            filters::NAMES.iter().chain(&filters::REFUSED).any(|known| **known == **name)
        }
        "test" => NAMES.contains(&&**value.as_str()?),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "false" => matches!(value, Value::Bool(false)),
        "true" => matches!(value, Value::Bool(true)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "lower" => is_cased(&value.text()?, char::is_lowercase, char::is_uppercase),
        "upper" => is_cased(&value.text()?, char::is_uppercase, char::is_lowercase),
        "string" => matches!(value, Value::Str(_) | Value::Markup(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "number" => value.number().is_some(),
        "sequence" => match value {
            Value::View(..) => false,
            _ => value.length().is_some(),
        },
        "iterable" => value.length().is_some() || matches!(value, Value::Iterator(_)),
        "callable" => match value {
            Value::Function(super::value::function::Function::Cycler(_)) => false,
            Value::Undefined(_) => true,
            _ => matches!(value, Value::Function(_)),
        },
        _ => matches!(value, Value::Markup(_)),
    })
}

/// Python's `is`; supported only for the singletons None, True and False.
fn same(left: &Value, right: &Value) -> Outcome<bool> {
    let single = |value: &Value| matches!(value, Value::None | Value::Bool(_));
    if single(left) || single(right) {
        return Ok(left.kind() == right.kind() && left.equals(right)?);
    }
    Err(TemplateError::unsupported("'is sameas' of values that are not None, true or false"))
}
