//! How deep a value is. Values are gone through, and dropped, by functions that call themselves, so their depth must have a bound; only
//! attributes of namespaces outlive a pass of a loop, so only they can grow without one.

use std::collections::HashMap;
use std::rc::Rc;

use super::value::Value;

/// Containers within each other. Python itself prints no more than about a thousand.
pub(super) const MOST_DEEP: usize = 1000;
/// How often a namespace may become an attribute of one.
pub(super) const MOST_NAMESPACES: usize = 10_000;

/// What is found below a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Nesting {
    /// Containers within each other; none for a text or number.
    pub(super) depth: usize,
    /// A namespace is among them.
    pub(super) has_namespace: bool,
}

impl Nesting {
    pub(super) fn of(value: &Value) -> Self {
        Self::with(value, &mut HashMap::new())
    }

    /// What is shared is looked at once. A namespace that holds itself adds nothing.
    fn with(value: &Value, seen: &mut HashMap<*const u8, Self>) -> Self {
        let place = match value {
            Value::List(items) | Value::Tuple(items) | Value::Group(items) | Value::View(_, items) => {
                Rc::as_ptr(items).cast::<u8>()
            }
            Value::Dict(pairs) => Rc::as_ptr(pairs).cast(),
            Value::Namespace(attributes) => Rc::as_ptr(attributes).cast(),
            Value::Iterator(iterator) => Rc::as_ptr(iterator).cast(),
            _ => return Self::default(),
        };
        if let Some(known) = seen.get(&place) {
            return *known;
        }
        let is_namespace = matches!(value, Value::Namespace(_));
        seen.insert(place, Self { depth: 0, has_namespace: is_namespace });
        let mut below = Self::default();
        let mut look = |part: &Value| {
            let part = Self::with(part, seen);
            below.depth = below.depth.max(part.depth);
            below.has_namespace |= part.has_namespace;
        };
        match value {
            Value::List(items) | Value::Tuple(items) | Value::Group(items) | Value::View(_, items) => {
                items.iter().for_each(&mut look);
            }
            Value::Dict(pairs) => pairs.iter().for_each(|(key, value)| {
                look(key);
                look(value);
            }),
            Value::Namespace(attributes) => attributes.borrow().iter().for_each(|(_, value)| look(value)),
            Value::Iterator(iterator) => iterator.items().iter().for_each(&mut look),
            _ => {}
        }
        let found = Self { depth: below.depth + 1, has_namespace: below.has_namespace || is_namespace };
        seen.insert(place, found);
        found
    }
}
