//! Variables of a running template, by scope.

use std::cell::RefCell;
use std::rc::Rc;

use super::Value;
use crate::template::ast::{Name, Scope};

/// Variables of one running scope. A name with `None` is undefined here, even if an outer scope has a value for it.
#[derive(Debug, Default)]
pub(in crate::template) struct Frame {
    names: RefCell<Vec<(Name, Option<Value>)>>,
    outer: Option<Rc<Frame>>,
}

impl Frame {
    pub(in crate::template) fn new(outer: Option<&Rc<Frame>>, scope: Option<&Scope>) -> Rc<Self> {
        let unset = scope.map_or(&[] as &[Name], |scope| &scope.unset);
        let names = unset.iter().map(|&name| (name, None)).collect();
        Rc::new(Self { names: RefCell::new(names), outer: outer.cloned() })
    }

    pub(in crate::template) fn set(&self, name: Name, value: Option<Value>) {
        let mut names = self.names.borrow_mut();
        match names.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => names.push((name, value)),
        }
    }

    /// Looks up a name in this and the outer scopes; `None` if no scope has it, `Some(None)` if it is undefined.
    pub(in crate::template) fn get(&self, name: Name) -> Option<Option<Value>> {
        let mut frame = self;
        loop {
            if let Some((_, value)) = frame.names.borrow().iter().find(|(known, _)| *known == name) {
                return Some(value.clone());
            }
            frame = frame.outer.as_ref()?;
        }
    }
}
