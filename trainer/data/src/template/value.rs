//! Python's values, as far as templates use them. Only namespaces are mutable: transformers' sandbox forbids other changes.

pub(super) mod frame;
pub(super) mod function;

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::rc::Rc;

use self::function::Function;
use super::error::TemplateError;
use super::text;

pub(super) type Outcome<T> = Result<T, TemplateError>;
pub(super) type Pairs = Vec<(Value, Value)>;

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// Message that says what is missing.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Rc<str>),
    /// Text from an escaping filter. In jinja2 it would escape other text that is joined with it.
    Markup(Rc<str>),
    List(Rc<[Value]>),
    Tuple(Rc<[Value]>),
    /// An item of `groupby`: a tuple of key and list, which also have names.
    Group(Rc<[Value]>),
    Dict(Rc<Pairs>),
    Range(i64, i64, i64),
    /// Keys, values or items of a dictionary.
    View(&'static str, Rc<[Value]>),
    Iterator(Rc<Iterator>),
    Namespace(Rc<RefCell<Attributes>>),
    Function(Function),
}

/// Names and values of a namespace.
pub(super) type Attributes = Vec<(Rc<str>, Value)>;

/// An iterator, which can be consumed once.
#[derive(Debug)]
pub(super) struct Iterator {
    items: Vec<Value>,
    at: Cell<usize>,
}

impl Iterator {
    /// All items, including those that are already consumed.
    pub(super) fn items(&self) -> &[Value] {
        &self.items
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text.into())
    }
}

impl From<Vec<Value>> for Value {
    fn from(items: Vec<Value>) -> Self {
        Self::List(items.into())
    }
}

impl Value {
    pub(super) fn undefined(what: impl AsRef<str>) -> Self {
        Self::Undefined(what.as_ref().into())
    }

    pub(super) fn iterator(items: Vec<Value>) -> Self {
        Self::Iterator(Rc::new(Iterator { items, at: Cell::new(0) }))
    }

    pub(super) fn tuple(items: Vec<Value>) -> Self {
        Self::Tuple(items.into())
    }

    /// Python's name of the type.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Markup(_) => "Markup",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Group(_) => "_GroupTuple",
            Self::Dict(_) => "dict",
            Self::Range(..) => "range",
            Self::View(kind, _) => kind,
            Self::Iterator(_) => "generator",
            Self::Namespace(_) => "Namespace",
            Self::Function(_) => "function",
        }
    }

    pub(super) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    pub(super) fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) | Self::Markup(text) => !text.is_empty(),
            Self::List(items) | Self::Tuple(items) | Self::Group(items) | Self::View(_, items) => {
                !items.is_empty()
            }
            Self::Dict(pairs) => !pairs.is_empty(),
            Self::Range(..) => self.length().is_some_and(|length| length > 0),
            Self::Iterator(_) | Self::Namespace(_) | Self::Function(_) => true,
        }
    }

    /// `len`; `None` if the type has no length.
    pub(super) fn length(&self) -> Option<usize> {
        match self {
            Self::Undefined(_) => Some(0),
            Self::Str(text) | Self::Markup(text) => Some(text.chars().count()),
            Self::List(items) | Self::Tuple(items) | Self::Group(items) | Self::View(_, items) => {
                Some(items.len())
            }
            Self::Dict(pairs) => Some(pairs.len()),
            Self::Range(start, stop, step) => Some(range_length(*start, *stop, *step)),
            _ => None,
        }
    }

    /// The items that a loop iterates over; consumes an iterator.
    pub(super) fn items(&self) -> Outcome<Vec<Value>> {
        Ok(match self {
            Self::Undefined(_) => Vec::new(),
            Self::Str(text) => text.chars().map(|c| Self::from(c.encode_utf8(&mut [0; 4]) as &str)).collect(),
            Self::List(items) | Self::Tuple(items) | Self::Group(items) | Self::View(_, items) => {
                items.to_vec()
            }
            Self::Dict(pairs) => pairs.iter().map(|(key, _)| key.clone()).collect(),
            Self::Range(start, stop, step) => {
                let length = range_length(*start, *stop, *step) as i64;
                (0..length).map(|at| Self::Int(start + at * step)).collect()
            }
            Self::Iterator(iterator) => {
                let at = iterator.at.replace(iterator.items.len());
                iterator.items[at..].to_vec()
            }
            Self::Markup(_) => return Err(markup()),
            _ => return Err(TemplateError::failed(format!("'{}' is not iterable", self.kind()))),
        })
    }

    /// The first item; of an iterator, consumes the next item.
    pub(super) fn first(&self) -> Outcome<Option<Value>> {
        if let Self::Iterator(iterator) = self {
            let at = iterator.at.get();
            iterator.at.set((at + 1).min(iterator.items.len()));
            return Ok(iterator.items.get(at).cloned());
        }
        Ok(self.items()?.into_iter().next())
    }

    /// `str(value)`, appended.
    pub(super) fn print(&self, out: &mut String) -> Outcome<()> {
        match self {
            Self::Undefined(_) => Ok(()),
            Self::Str(text) | Self::Markup(text) => {
                out.push_str(text);
                Ok(())
            }
            _ => self.repr(out),
        }
    }

    /// `str(value)`.
    pub(super) fn text(&self) -> Outcome<Rc<str>> {
        if let Self::Str(text) | Self::Markup(text) = self {
            return Ok(text.clone());
        }
        let mut out = String::new();
        self.print(&mut out)?;
        Ok(out.into())
    }

    /// `repr(value)`, appended.
    pub(super) fn repr(&self, out: &mut String) -> Outcome<()> {
        match self {
            Self::Undefined(_) => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(value) => out.push_str(if *value { "True" } else { "False" }),
            Self::Int(value) => out.push_str(&value.to_string()),
            Self::Float(value) => out.push_str(&text::float(*value)),
            Self::Str(text) => text::repr(text, out),
            Self::List(items) => sequence(items, ("[", "]"), out)?,
            Self::Tuple(items) | Self::Group(items) => {
                sequence(items, ("(", if items.len() == 1 { ",)" } else { ")" }), out)?;
            }
            Self::View(kind, items) => {
                out.push_str(kind);
                sequence(items, ("([", "])"), out)?;
            }
            Self::Dict(pairs) => {
                out.push('{');
                for (at, (key, value)) in pairs.iter().enumerate() {
                    out.push_str(if at > 0 { ", " } else { "" });
                    key.repr(out)?;
                    out.push_str(": ");
                    value.repr(out)?;
                }
                out.push('}');
            }
            Self::Range(start, stop, 1) => out.push_str(&format!("range({start}, {stop})")),
            Self::Range(start, stop, step) => out.push_str(&format!("range({start}, {stop}, {step})")),
            Self::Markup(_) | Self::Iterator(_) | Self::Namespace(_) | Self::Function(_) => {
                return Err(TemplateError::unsupported(format!("printing a {}", self.kind())));
            }
        }
        Ok(())
    }

    /// The value as a number; a bool counts as a whole number.
    pub(super) fn number(&self) -> Option<Number> {
        match self {
            Self::Bool(value) => Some(Number::Int(i64::from(*value))),
            Self::Int(value) => Some(Number::Int(*value)),
            Self::Float(value) => Some(Number::Float(*value)),
            _ => None,
        }
    }

    /// The value as a whole number; fails for other types.
    pub(super) fn integer(&self) -> Outcome<i64> {
        match self.number() {
            Some(Number::Int(value)) => Ok(value),
            _ => Err(TemplateError::failed(format!("'{}' is no whole number", self.kind()))),
        }
    }

    /// The value as a text; fails for other types.
    pub(super) fn as_str(&self) -> Outcome<&Rc<str>> {
        match self {
            Self::Str(text) => Ok(text),
            Self::Markup(_) => Err(markup()),
            _ => Err(TemplateError::failed(format!("'{}' is no text", self.kind()))),
        }
    }

    /// `==`
    pub(super) fn equals(&self, other: &Self) -> Outcome<bool> {
        if let (Some(left), Some(right)) = (self.number(), other.number()) {
            return Ok(left.compare(right) == Some(Ordering::Equal));
        }
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(left) | Self::Markup(left), Self::Str(right) | Self::Markup(right)) => left == right,
            (Self::List(left), Self::List(right))
            | (Self::Tuple(left) | Self::Group(left), Self::Tuple(right) | Self::Group(right)) => {
                all_equal(left, right)?
            }
            (Self::Dict(left), Self::Dict(right)) => {
                let mut same = left.len() == right.len();
                for (key, value) in left.iter() {
                    same = same
                        && match find(right, key)? {
                            Some(other) => value.equals(other)?,
                            None => false,
                        };
                }
                same
            }
            (Self::Range(..), Self::Range(..)) => all_equal(&self.items()?, &other.items()?)?,
            (Self::View(..) | Self::Iterator(_) | Self::Namespace(_) | Self::Function(_), _)
            | (_, Self::View(..) | Self::Iterator(_) | Self::Namespace(_) | Self::Function(_))
                if self.kind() == other.kind() =>
            {
                return Err(TemplateError::unsupported(format!("comparing values of type {}", self.kind())));
            }
            _ => false,
        })
    }

    /// `<`, `<=`, `>` and `>=`; `None` if one of the values is NaN.
    pub(super) fn compare(&self, other: &Self) -> Outcome<Option<Ordering>> {
        if let (Some(left), Some(right)) = (self.number(), other.number()) {
            return Ok(left.compare(right));
        }
        match (self, other) {
            (Self::Str(left), Self::Str(right)) => Ok(Some(left.cmp(right))),
            (Self::List(left), Self::List(right))
            | (Self::Tuple(left) | Self::Group(left), Self::Tuple(right) | Self::Group(right)) => {
                for (left, right) in left.iter().zip(right.iter()) {
                    if !left.equals(right)? {
                        return left.compare(right);
                    }
                }
                Ok(Some(left.len().cmp(&right.len())))
            }
            (Self::Undefined(what), _) | (_, Self::Undefined(what)) => Err(TemplateError::failed(&**what)),
            (Self::Markup(_), _) | (_, Self::Markup(_)) => Err(markup()),
            (Self::View(..), Self::View(..)) => {
                Err(TemplateError::unsupported("comparing views of dictionaries"))
            }
            _ => {
                let kinds = (self.kind(), other.kind());
                Err(TemplateError::failed(format!("'{}' and '{}' cannot be ordered", kinds.0, kinds.1)))
            }
        }
    }

    /// Fails if the value cannot be the key of a dictionary.
    pub(super) fn hashable(&self) -> Outcome<()> {
        match self {
            Self::List(_) | Self::Dict(_) => {
                Err(TemplateError::failed(format!("'{}' cannot be a key", self.kind())))
            }
            Self::Tuple(items) | Self::Group(items) => items.iter().try_for_each(Self::hashable),
            Self::Markup(_) => Err(markup()),
            _ => Ok(()),
        }
    }

    /// `item in self`
    pub(super) fn contains(&self, item: &Self) -> Outcome<bool> {
        match self {
            Self::Str(text) => match item {
                Self::Str(part) => Ok(text.contains(&**part)),
                Self::Markup(_) => Err(markup()),
                _ => Err(TemplateError::failed(format!("'in <string>' needs a text, not '{}'", item.kind()))),
            },
            Self::Dict(pairs) => {
                item.hashable()?;
                Ok(find(pairs, item)?.is_some())
            }
            // Stops after the found item, as Python does; the rest can still be consumed.
            Self::Iterator(_) => {
                while let Some(other) = self.first()? {
                    if other.equals(item)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            _ => {
                for other in self.items()? {
                    if other.equals(item)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }
}

/// A whole number or a float.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Int(i64),
    Float(f64),
}

impl Number {
    pub(super) fn float(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    fn compare(self, other: Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Int(left), Self::Int(right)) => Some(left.cmp(&right)),
            (Self::Float(left), Self::Float(right)) => left.partial_cmp(&right),
            // Exact, as in Python: does not round the whole number to a float.
            (Self::Int(left), Self::Float(right)) => against(left, right),
            (Self::Float(left), Self::Int(right)) => against(right, left).map(Ordering::reverse),
        }
    }
}

fn against(whole: i64, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    if float.abs() >= 9.3e18 {
        return Some(if float > 0.0 { Ordering::Less } else { Ordering::Greater });
    }
    let floor = float.floor();
    Some(i128::from(whole).cmp(&(floor as i128)).then(if float > floor {
        Ordering::Less
    } else {
        Ordering::Equal
    }))
}

pub(super) fn markup() -> TemplateError {
    TemplateError::unsupported("working on what 'escape' or 'safe' returned (only printing it is)")
}

fn range_length(start: i64, stop: i64, step: i64) -> usize {
    let (distance, step) = if step > 0 { (stop - start, step) } else { (start - stop, -step) };
    if distance <= 0 { 0 } else { ((distance - 1) / step + 1) as usize }
}

/// The value of a key.
pub(super) fn find<'p>(pairs: &'p Pairs, key: &Value) -> Outcome<Option<&'p Value>> {
    if let Value::Str(wanted) = key {
        let found = pairs.iter().find(|(key, _)| matches!(key, Value::Str(text) if text == wanted));
        return Ok(found.map(|(_, value)| value));
    }
    for (other, value) in pairs {
        if other.equals(key)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Replaces the value of a key, or appends the pair.
pub(super) fn put(pairs: &mut Pairs, key: Value, value: Value) -> Outcome<()> {
    key.hashable()?;
    for (other, old) in pairs.iter_mut() {
        if other.equals(&key)? {
            *old = value;
            return Ok(());
        }
    }
    pairs.push((key, value));
    Ok(())
}

fn all_equal(left: &[Value], right: &[Value]) -> Outcome<bool> {
    if left.len() != right.len() {
        return Ok(false);
    }
    for (left, right) in left.iter().zip(right) {
        if !left.equals(right)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn sequence(items: &[Value], (open, close): (&str, &str), out: &mut String) -> Outcome<()> {
    out.push_str(open);
    for (at, item) in items.iter().enumerate() {
        out.push_str(if at > 0 { ", " } else { "" });
        item.repr(out)?;
    }
    out.push_str(close);
    Ok(())
}
