//! Depth of a value. Values are traversed and dropped recursively, so their depth must be bounded. Only namespace attributes outlive an
//! iteration of a loop, so only they can grow without limit.

use std::collections::HashMap;
use std::rc::Rc;

use super::value::Value;

/// Most levels of nested containers. Python itself prints at most about a thousand.
pub(super) const MOST_DEEP: usize = 1000;
/// How often a value that contains a namespace may be assigned to an attribute.
pub(super) const MOST_NAMESPACES: usize = 10_000;

/// Nesting of a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Nesting {
    /// Levels of nested containers; zero for a text or number.
    pub(super) depth: usize,
    /// Whether one of the containers is a namespace.
    pub(super) has_namespace: bool,
}

impl Nesting {
    pub(super) fn of(value: &Value) -> Self {
        Self::with(value, &mut HashMap::new())
    }

    /// Visits shared containers once. A namespace that contains itself adds no depth.
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
