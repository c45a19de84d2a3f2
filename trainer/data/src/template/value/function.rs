//! Functions as values. A macro and a loop hold the names around them, and those hold values.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::Value;
use super::frame::Frame;
use crate::template::ast::{For, Macro};

/// What can be called.
#[derive(Clone, Debug)]
pub(in crate::template) enum Function {
    Global(&'static str),
    /// A method and what it belongs to.
    Method(Rc<(Value, String)>),
    Macro(Rc<Closure>),
    Loop(Rc<Loop>),
    Cycler(Rc<(Vec<Value>, Cell<usize>)>),
    Joiner(Rc<(Rc<str>, Cell<bool>)>),
}

/// A macro and where it was defined.
#[derive(Debug)]
pub(in crate::template) struct Closure {
    pub(in crate::template) function: Arc<Macro>,
    pub(in crate::template) frame: Rc<Frame>,
}

/// A loop that runs.
#[derive(Debug)]
pub(in crate::template) struct Loop {
    pub(in crate::template) each: Arc<For>,
    /// Where the loop stands.
    pub(in crate::template) frame: Rc<Frame>,
    pub(in crate::template) items: Rc<[Value]>,
    pub(in crate::template) index: Cell<usize>,
    pub(in crate::template) depth: i64,
    pub(in crate::template) changed: RefCell<Option<Value>>,
}
