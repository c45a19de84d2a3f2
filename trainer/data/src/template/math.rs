//! Python's arithmetic.

use super::ast::Math;
use super::error::TemplateError;
use super::format;
use super::value::{Number, Outcome, Value, markup};

/// Longest text (bytes) or list (items) that a product may build.
const LONGEST: usize = 1 << 24;

fn beyond() -> TemplateError {
    TemplateError::unsupported("a whole number beyond 64 bits")
}

pub(super) fn negative(value: &Value) -> Outcome<Value> {
    match value.number() {
        Some(Number::Int(value)) => value.checked_neg().map(Value::Int).ok_or_else(beyond),
        Some(Number::Float(value)) => Ok(Value::Float(-value)),
        None => Err(refused(value, "-")),
    }
}

pub(super) fn positive(value: &Value) -> Outcome<Value> {
    match value.number() {
        Some(Number::Int(value)) => Ok(Value::Int(value)),
        Some(Number::Float(value)) => Ok(Value::Float(value)),
        None => Err(refused(value, "+")),
    }
}

fn refused(value: &Value, operator: &str) -> TemplateError {
    match value {
        Value::Undefined(what) => TemplateError::failed(&**what),
        Value::Markup(_) => markup(),
        _ => TemplateError::failed(format!("'{operator}' cannot be applied to '{}'", value.kind())),
    }
}

pub(super) fn apply(operation: Math, left: &Value, right: &Value) -> Outcome<Value> {
    for value in [left, right] {
        match value {
            // `text % undefined` is allowed: the undefined value prints as an empty text.
            Value::Undefined(what) if !(operation == Math::Mod && matches!(left, Value::Str(_))) => {
                return Err(TemplateError::failed(&**what));
            }
            Value::Markup(_) => return Err(markup()),
            _ => {}
        }
    }
    if let (Some(left), Some(right)) = (left.number(), right.number()) {
        return match (left, right) {
            (Number::Int(left), Number::Int(right)) => whole(operation, left, right),
            (left, right) => float(operation, left.float(), right.float()),
        };
    }
    match (operation, left, right) {
        (Math::Add, Value::Str(left), Value::Str(right)) => Ok(Value::from(format!("{left}{right}"))),
        (Math::Add, Value::List(left), Value::List(right)) => Ok(Value::from([&**left, &**right].concat())),
        (Math::Add, Value::Tuple(left) | Value::Group(left), Value::Tuple(right) | Value::Group(right)) => {
            Ok(Value::tuple([&**left, &**right].concat()))
        }
        (Math::Mul, items, times) if times.number().is_some() => repeat(items, times),
        (Math::Mul, times, items) if times.number().is_some() => repeat(items, times),
        (Math::Mod, Value::Str(text), values) => format::percent(text, values).map(Value::from),
        (Math::Sub, Value::View(..), _) => {
            Err(TemplateError::unsupported("the difference of views of dictionaries"))
        }
        _ => {
            let operator = sign(operation);
            let message =
                format!("'{operator}' cannot be applied to '{}' and '{}'", left.kind(), right.kind());
            Err(TemplateError::failed(message))
        }
    }
}

fn sign(operation: Math) -> &'static str {
    match operation {
        Math::Add => "+",
        Math::Sub => "-",
        Math::Mul => "*",
        Math::Div => "/",
        Math::FloorDiv => "//",
        Math::Mod => "%",
        Math::Pow => "**",
    }
}

fn repeat(items: &Value, times: &Value) -> Outcome<Value> {
    let times = usize::try_from(times.integer()?.max(0)).unwrap_or(usize::MAX);
    let fits = |length: usize| match length.checked_mul(times) {
        Some(total) if total <= LONGEST => Ok(()),
        _ => Err(TemplateError::unsupported("a text or list that long")),
    };
    match items {
        Value::Str(text) => fits(text.len()).map(|()| Value::from(text.repeat(times))),
        Value::List(items) => fits(items.len()).map(|()| Value::from(vec![&**items; times].concat())),
        Value::Tuple(items) | Value::Group(items) => {
            fits(items.len()).map(|()| Value::tuple(vec![&**items; times].concat()))
        }
        _ => Err(refused(items, "*")),
    }
}

fn whole(operation: Math, left: i64, right: i64) -> Outcome<Value> {
    let zero = || TemplateError::failed("division by zero");
    let divisible = |value: Option<i64>| match value {
        _ if right == 0 => Err(zero()),
        Some(value) => Ok(Value::Int(value)),
        None => Err(beyond()),
    };
    match operation {
        Math::Add => left.checked_add(right).map(Value::Int).ok_or_else(beyond),
        Math::Sub => left.checked_sub(right).map(Value::Int).ok_or_else(beyond),
        Math::Mul => left.checked_mul(right).map(Value::Int).ok_or_else(beyond),
        // Python divides whole numbers exactly; float division is exact only up to 2^53.
        Math::Div if left.unsigned_abs().max(right.unsigned_abs()) > 1 << 53 => Err(beyond()),
        Math::Div => float(operation, left as f64, right as f64),
        // Python rounds down; the machine rounds towards zero.
        Math::FloorDiv => divisible(left.checked_div(right).map(|quotient| {
            quotient - i64::from(left.wrapping_rem(right) != 0 && (left < 0) != (right < 0))
        })),
        Math::Mod => divisible(
            left.checked_rem(right)
                .map(|rest| if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }),
        ),
        Math::Pow => match u32::try_from(right) {
            Ok(power) => left.checked_pow(power).map(Value::Int).ok_or_else(beyond),
            Err(_) if right < 0 => float(operation, left as f64, right as f64),
            Err(_) => Err(beyond()),
        },
    }
}

fn float(operation: Math, left: f64, right: f64) -> Outcome<Value> {
    let by_zero = right == 0.0 && matches!(operation, Math::Div | Math::FloorDiv | Math::Mod);
    if by_zero || operation == Math::Pow && left == 0.0 && right < 0.0 {
        return Err(TemplateError::failed("division by zero"));
    }
    let modulo = || {
        let rest = left % right;
        if rest != 0.0 && (rest < 0.0) != (right < 0.0) {
            rest + right
        } else if rest == 0.0 {
            0f64.copysign(right)
        } else {
            rest
        }
    };
    Ok(Value::Float(match operation {
        Math::Add => left + right,
        Math::Sub => left - right,
        Math::Mul => left * right,
        Math::Div => left / right,
        Math::Mod => modulo(),
        Math::FloorDiv => {
            let quotient = (left - modulo()) / right;
            let floor = quotient.floor();
            if quotient == 0.0 {
                0f64.copysign(left / right)
            } else if quotient - floor > 0.5 {
                floor + 1.0
            } else {
                floor
            }
        }
        Math::Pow if left < 0.0 && right.fract() != 0.0 => {
            return Err(TemplateError::unsupported("a complex number"));
        }
        Math::Pow => left.powf(right),
    }))
}
