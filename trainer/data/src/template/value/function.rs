//! Functions as values. Macros and loops keep the frame in which they were defined.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::Value;
use super::frame::Frame;
use crate::template::ast::{For, Macro};

/// A callable value.
#[derive(Clone, Debug)]
pub(in crate::template) enum Function {
    Global(&'static str),
    /// An object and the name of its method.
    Method(Rc<(Value, String)>),
    Macro(Rc<Closure>),
    Loop(Rc<Loop>),
    Cycler(Rc<(Vec<Value>, Cell<usize>)>),
    Joiner(Rc<(Rc<str>, Cell<bool>)>),
}

/// A macro, and the frame in which it was defined.
#[derive(Debug)]
pub(in crate::template) struct Closure {
    pub(in crate::template) function: Arc<Macro>,
    pub(in crate::template) frame: Rc<Frame>,
}

/// The `loop` variable of a running loop.
#[derive(Debug)]
pub(in crate::template) struct Loop {
    pub(in crate::template) each: Arc<For>,
    /// Frame that contains the loop.
    pub(in crate::template) frame: Rc<Frame>,
    pub(in crate::template) items: Rc<[Value]>,
    pub(in crate::template) index: Cell<usize>,
    pub(in crate::template) depth: i64,
    pub(in crate::template) changed: RefCell<Option<Value>>,
}
