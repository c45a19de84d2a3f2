//! Global functions, the `loop` variable, and binding of arguments.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use dyad_proto::counted;

use super::error::TemplateError;
use super::value::function::{Function, Loop};
use super::value::{Outcome, Pairs, Value, put};

/// Functions that every template can call.
pub(super) const GLOBALS: [&str; 8] =
    ["range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now", "lipsum"];

/// Most numbers of a range in the sandbox.
const LONGEST_RANGE: i64 = 100_000;

impl Loop {
    /// `loop.name`
    pub(super) fn attribute(&self, name: &str) -> Option<Value> {
        let (index, length) = (self.index.get(), self.items.len());
        let int = |value: usize| Some(Value::Int(value as i64));
        match name {
            "index" => int(index + 1),
            "index0" => int(index),
            "revindex" => int(length - index),
            "revindex0" => int(length - index - 1),
            "length" => int(length),
            "first" => Some(Value::Bool(index == 0)),
            "last" => Some(Value::Bool(index + 1 == length)),
            "depth" => Some(Value::Int(self.depth + 1)),
            "depth0" => Some(Value::Int(self.depth)),
            "previtem" => Some(match index.checked_sub(1) {
                Some(before) => self.items[before].clone(),
                None => Value::undefined("there is no previous item"),
            }),
            "nextitem" => Some(
                self.items
                    .get(index + 1)
                    .cloned()
                    .unwrap_or_else(|| Value::undefined("there is no next item")),
            ),
            _ => None,
        }
    }

    pub(super) fn method(&self, name: &str, args: Args) -> Outcome<Value> {
        let values = args.positional("loop", 0, usize::MAX)?;
        if name == "cycle" {
            if values.is_empty() {
                return Err(TemplateError::failed("no items for cycling given"));
            }
            return Ok(values[self.index.get() % values.len()].clone());
        }
        let values = Value::tuple(values);
        let same = match &*self.changed.borrow() {
            Some(last) => last.equals(&values)?,
            None => false,
        };
        self.changed.replace(Some(values));
        Ok(Value::Bool(!same))
    }
}

/// Arguments of a call.
#[derive(Clone, Debug, Default)]
pub(super) struct Args {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(Rc<str>, Value)>,
}

impl Args {
    /// Assigns the arguments to the named parameters; the first `required` parameters must have a value.
    pub(super) fn bind<const N: usize>(
        self,
        what: &str,
        names: [&str; N],
        required: usize,
    ) -> Outcome<[Option<Value>; N]> {
        if self.positional.len() > N {
            return Err(TemplateError::failed(format!("{what} takes at most {}", counted(N, "argument"))));
        }
        let mut values = [const { None }; N];
        for (slot, value) in values.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            let Some(at) = names.iter().position(|known| **known == *name) else {
                return Err(TemplateError::failed(format!("{what} has no argument '{name}'")));
            };
            if values[at].replace(value).is_some() {
                return Err(TemplateError::failed(format!("{what} got two values for '{name}'")));
            }
        }
        match names.iter().zip(&values).take(required).find(|(_, value)| value.is_none()) {
            Some((name, _)) => Err(TemplateError::failed(format!("{what} needs the argument '{name}'"))),
            None => Ok(values),
        }
    }

    /// Returns at least `least` and at most `most` positional arguments; named arguments are an error.
    pub(super) fn positional(self, what: &str, least: usize, most: usize) -> Outcome<Vec<Value>> {
        if !self.named.is_empty() {
            return Err(TemplateError::failed(format!("{what} takes no named arguments")));
        }
        if self.positional.len() < least || self.positional.len() > most {
            return Err(TemplateError::failed(format!(
                "{what} got {}",
                counted(self.positional.len(), "argument")
            )));
        }
        Ok(self.positional)
    }
}

/// Calls a global function that needs neither the clock nor the template.
pub(super) fn call_global(name: &str, args: Args) -> Outcome<Value> {
    match name {
        "range" => range(&args.positional("range", 1, 3)?),
        "dict" => dict(args).map(|pairs| Value::Dict(pairs.into())),
        "namespace" => namespace(args),
        "cycler" => {
            let items = args.positional("cycler", 0, usize::MAX)?;
            if items.is_empty() {
                return Err(TemplateError::failed("at least one item has to be provided to cycler"));
            }
            Ok(Value::Function(Function::Cycler(Rc::new((items, Cell::new(0))))))
        }
        "joiner" => {
            let [separator] = args.bind("joiner", ["sep"], 0)?;
            let separator = separator.map_or(Ok(", ".into()), |separator| separator.as_str().cloned())?;
            Ok(Value::Function(Function::Joiner(Rc::new((separator, Cell::new(false))))))
        }
        _ => Err(TemplateError::unsupported(format!("the function '{name}'"))),
    }
}

fn range(args: &[Value]) -> Outcome<Value> {
    let mut numbers = args.iter().map(Value::integer).collect::<Outcome<Vec<_>>>()?.into_iter();
    let (first, second, step) = (numbers.next().unwrap_or(0), numbers.next(), numbers.next().unwrap_or(1));
    let (start, stop) = second.map_or((0, first), |stop| (first, stop));
    if step == 0 {
        return Err(TemplateError::failed("range() arg 3 must not be zero"));
    }
    // In i128, because the difference of two i64 may overflow.
    let distance = (i128::from(stop) - i128::from(start)) * i128::from(step.signum());
    if distance > i128::from(LONGEST_RANGE) * i128::from(step.unsigned_abs()) {
        return Err(TemplateError::failed("a range of more than 100000 numbers"));
    }
    if distance <= 0 && (start.unsigned_abs() | stop.unsigned_abs()) > 1 << 62 {
        return Err(TemplateError::unsupported("a range of numbers that large"));
    }
    Ok(Value::Range(start, stop, step))
}

pub(super) fn dict(args: Args) -> Outcome<Pairs> {
    let mut pairs = Pairs::new();
    if args.positional.len() > 1 {
        return Err(TemplateError::failed("dict takes at most one argument without a name"));
    }
    match args.positional.first() {
        None => {}
        Some(Value::Dict(other)) => pairs = (**other).clone(),
        Some(other) => {
            for pair in other.items()? {
                let [key, value] = <[Value; 2]>::try_from(pair.items()?)
                    .map_err(|_| TemplateError::failed("dict needs pairs of a key and a value"))?;
                put(&mut pairs, key, value)?;
            }
        }
    }
    for (name, value) in args.named {
        put(&mut pairs, Value::Str(name), value)?;
    }
    Ok(pairs)
}

fn namespace(args: Args) -> Outcome<Value> {
    let mut attributes = Vec::new();
    for (name, value) in dict(args)? {
        let name = name.as_str()?.clone();
        if name.starts_with('_') {
            return Err(TemplateError::failed(format!("a namespace cannot have an attribute '{name}'")));
        }
        attributes.push((name, value));
    }
    Ok(Value::Namespace(Rc::new(RefCell::new(attributes))))
}

/// Calls `next` or `reset` of a cycler; any other name returns the current item.
pub(super) fn cycler_method((items, at): &(Vec<Value>, Cell<usize>), name: &str) -> Value {
    let index = at.get();
    match name {
        "next" => at.set((index + 1) % items.len()),
        "reset" => {
            at.set(0);
            return Value::None;
        }
        _ => {}
    }
    items[index].clone()
}

pub(super) fn joiner((separator, used): &(Rc<str>, Cell<bool>)) -> Value {
    if used.replace(true) { Value::Str(separator.clone()) } else { Value::from("") }
}
