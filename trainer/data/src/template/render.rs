//! Renders statements.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use dyad_proto::counted;

use super::ast::*;
use super::error::TemplateError;
use super::functions::Args;
use super::nesting::{MOST_DEEP, MOST_NAMESPACES, Nesting};
use super::parser::Parsed;
use super::strftime::Moment;
use super::value::frame::Frame;
use super::value::function::{Closure, Function, Loop};
use super::value::{Outcome, Value};

/// Most levels of nested calls; jinja2 stops at Python's recursion limit, which is near this.
const CALLS: usize = 200;
/// Bytes of stack that a call may need, and the size of a new stack segment if fewer are left.
const CALL_BYTES: usize = 1 << 20;
const MORE_BYTES: usize = 8 << 20;

/// State of one rendering.
pub(super) struct Renderer<'t> {
    pub(super) template: &'t Parsed,
    /// Values from the conversation, by number of the name.
    pub(super) context: Vec<Option<Value>>,
    pub(super) loop_name: Option<Name>,
    pub(super) now: &'t Moment,
    /// Levels of nested calls.
    pub(super) depth: Cell<usize>,
    /// How often a value with a namespace was assigned to an attribute.
    pub(super) namespaces: Cell<usize>,
    /// Number of blocks and calls whose text is collected before it becomes part of the whole text.
    pub(super) buffers: Cell<usize>,
    /// Byte ranges of what generation blocks wrote.
    pub(super) generated: RefCell<Outcome<Vec<Range<usize>>>>,
}

/// How rendering continues after a statement.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

impl Renderer<'_> {
    pub(super) fn root(&self, out: &mut String) -> Outcome<()> {
        let root = &self.template.root;
        self.run(&root.body, &Frame::new(None, Some(root)), out)?;
        Ok(())
    }

    fn run(&self, body: &[Stmt], frame: &Rc<Frame>, out: &mut String) -> Outcome<Flow> {
        for stmt in body {
            let flow = self.statement(stmt, frame, out).map_err(|error| error.at(stmt.line))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&self, stmt: &Stmt, frame: &Rc<Frame>, out: &mut String) -> Outcome<Flow> {
        match &stmt.kind {
            StmtKind::Data(text) => out.push_str(text),
            StmtKind::Output(value) => {
                self.eval(value, frame)?.print(out).map_err(|error| error.at(value.line))?;
            }
            StmtKind::Set(target, value) => self.assign(target, self.eval(value, frame)?, frame)?,
            StmtKind::SetBlock(target, filter, scope) => {
                let text = Value::from(self.scoped(scope, frame)?);
                let value = match filter {
                    Some(filter) => {
                        self.filtered(filter, Some(text), &Frame::new(Some(frame), Some(scope)))?
                    }
                    None => text,
                };
                self.assign(target, value, frame)?;
            }
            StmtKind::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.eval(test, frame)?.truth() {
                        return self.run(body, frame, out);
                    }
                }
                return self.run(otherwise, frame, out);
            }
            StmtKind::For(each) => {
                let items = self.eval(&each.items, frame)?;
                if !each.recursive {
                    return self.each(each, &items, (frame, 0), out);
                }
                let (text, flow) = self.buffered(|out| self.each(each, &items, (frame, 0), out))?;
                out.push_str(&text);
                return Ok(flow);
            }
            StmtKind::With(values, scope) => {
                let inner = Frame::new(Some(frame), Some(scope));
                for (target, value) in values {
                    self.assign(target, self.eval(value, frame)?, &inner)?;
                }
                return self.run(&scope.body, &inner, out);
            }
            StmtKind::Macro(name, function) => frame.set(*name, Some(closure(function, frame))),
            StmtKind::CallBlock(function, call) => {
                self.call_expr(call, frame, Some(closure(function, frame)))?.print(out)?;
            }
            StmtKind::FilterBlock(filter, scope) => {
                let text = Value::from(self.scoped(scope, frame)?);
                self.filtered(filter, Some(text), &Frame::new(Some(frame), Some(scope)))?.print(out)?;
            }
            StmtKind::Generation(scope) => {
                let text = self.scoped(scope, frame)?;
                self.mark(stmt.line, out.len()..out.len() + text.len());
                out.push_str(&text);
            }
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    /// Renders statements in their own scope.
    fn scoped(&self, scope: &Scope, frame: &Rc<Frame>) -> Outcome<String> {
        let inner = Frame::new(Some(frame), Some(scope));
        let (out, flow) = self.buffered(|out| self.run(&scope.body, &inner, out))?;
        match flow {
            Flow::Next => Ok(out),
            _ => Err(TemplateError::unsupported("leaving a block with break or continue")),
        }
    }

    /// Collects text that only later becomes part of the whole text.
    fn buffered<T>(&self, write: impl FnOnce(&mut String) -> Outcome<T>) -> Outcome<(String, T)> {
        let mut out = String::new();
        self.buffers.set(self.buffers.get() + 1);
        let done = write(&mut out);
        self.buffers.set(self.buffers.get() - 1);
        Ok((out, done?))
    }

    /// Records the range of a generation block.
    fn mark(&self, line: u32, range: Range<usize>) {
        let mut generated = self.generated.borrow_mut();
        if self.buffers.get() > 0 {
            let what = "the place of a generation block within a macro, a call, a filter, an assignment or another such block";
            *generated = Err(TemplateError::unsupported(what).at(line));
        } else if let Ok(ranges) = &mut *generated {
            ranges.push(range);
        }
    }

    fn assign(&self, target: &Target, value: Value, frame: &Frame) -> Outcome<()> {
        match target {
            Target::Name(name) => frame.set(*name, Some(value)),
            Target::Attr(name, attribute) => self.set_attribute(*name, attribute, value, frame)?,
            Target::Tuple(targets) => {
                let items = value.items()?;
                if items.len() != targets.len() {
                    let message =
                        format!("cannot take {} as {}", counted(items.len(), "value"), targets.len());
                    return Err(TemplateError::failed(message));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item, frame)?;
                }
            }
        }
        Ok(())
    }

    fn set_attribute(&self, name: Name, attribute: &str, value: Value, frame: &Frame) -> Outcome<()> {
        let Value::Namespace(attributes) = self.lookup(name, frame) else {
            return Err(TemplateError::failed("cannot assign attribute on non-namespace object"));
        };
        if attribute.starts_with('_') {
            return Err(TemplateError::failed(format!("a namespace cannot have an attribute '{attribute}'")));
        }
        self.refuse_deep(&value)?;
        let mut attributes = attributes.borrow_mut();
        match attributes.iter_mut().find(|(known, _)| **known == *attribute) {
            Some((_, old)) => *old = value,
            None => attributes.push((attribute.into(), value)),
        }
        Ok(())
    }

    /// Fails if a value is nested too deeply to be traversed, as when a loop adds a level in every iteration.
    fn refuse_deep(&self, value: &Value) -> Outcome<()> {
        let nesting = Nesting::of(value);
        if nesting.depth > MOST_DEEP {
            return Err(TemplateError::unsupported(format!(
                "a value of more than {MOST_DEEP} lists within each other"
            )));
        }
        self.namespaces.set(self.namespaces.get() + usize::from(nesting.has_namespace));
        if self.namespaces.get() > MOST_NAMESPACES {
            return Err(TemplateError::unsupported(format!(
                "more than {MOST_NAMESPACES} namespaces within each other"
            )));
        }
        Ok(())
    }

    pub(super) fn lookup(&self, name: Name, frame: &Frame) -> Value {
        let word = &self.template.names[name as usize];
        let undefined = || Value::undefined(format!("'{word}' is undefined"));
        match frame.get(name) {
            Some(value) => value.unwrap_or_else(undefined),
            None => self.context[name as usize].clone().unwrap_or_else(undefined),
        }
    }

    /// Runs a loop; `depth` is its level of recursion.
    pub(super) fn each(
        &self,
        each: &Arc<For>,
        items: &Value,
        (frame, depth): (&Rc<Frame>, i64),
        out: &mut String,
    ) -> Outcome<Flow> {
        let mut items = items.items()?;
        if let Some(test) = &each.test {
            let mut kept = Vec::new();
            for item in items {
                let inner = Frame::new(Some(frame), None);
                self.assign(&each.target, item.clone(), &inner)?;
                if self.eval(test, &inner)?.truth() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        let state = Rc::new(Loop {
            each: each.clone(),
            frame: frame.clone(),
            items: items.into(),
            index: Cell::new(0),
            depth,
            changed: RefCell::default(),
        });
        // As in jinja2, the else block runs unless the body of an iteration ran to its end, without `break` or `continue`.
        let mut rounds = 0;
        for index in 0..state.items.len() {
            state.index.set(index);
            let inner = Frame::new(Some(frame), Some(&each.body));
            if let Some(name) = self.loop_name {
                inner.set(name, Some(Value::Function(Function::Loop(state.clone()))));
            }
            self.assign(&each.target, state.items[index].clone(), &inner)?;
            match self.run(&each.body.body, &inner, out)? {
                Flow::Next => rounds += 1,
                Flow::Break => break,
                Flow::Continue => {}
            }
        }
        if rounds > 0 {
            return Ok(Flow::Next);
        }
        self.run(&each.otherwise.body, &Frame::new(Some(frame), Some(&each.otherwise)), out)
    }

    pub(super) fn recurse(&self, state: &Loop, args: Args) -> Outcome<Value> {
        if !state.each.recursive {
            return Err(TemplateError::failed("the loop must have the 'recursive' marker to be called"));
        }
        let [items] = args.bind("loop", ["iterable"], 1)?;
        let items = items.unwrap_or(Value::None);
        let level = (&state.frame, state.depth + 1);
        let each = || self.buffered(|out| self.each(&state.each, &items, level, out));
        Ok(Value::from(self.deeper(each)?.0))
    }

    fn deeper<T>(&self, run: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        if self.depth.get() >= CALLS {
            return Err(TemplateError::unsupported(format!(
                "more than {CALLS} calls of macros and loops within each other"
            )));
        }
        self.depth.set(self.depth.get() + 1);
        let done = stacker::maybe_grow(CALL_BYTES, MORE_BYTES, run);
        self.depth.set(self.depth.get() - 1);
        done
    }

    pub(super) fn call_macro(&self, closure: &Closure, args: Args) -> Outcome<Value> {
        self.deeper(|| self.called(closure, args))
    }

    fn called(&self, closure: &Closure, args: Args) -> Outcome<Value> {
        let function = &closure.function;
        let frame = Frame::new(Some(&closure.frame), Some(&function.body));
        self.bind(function, args, &frame)?;
        for (name, word, default) in &function.parameters {
            if matches!(frame.get(*name), Some(None)) {
                let value = match default {
                    Some(default) => self.eval(default, &frame)?,
                    None => Value::undefined(format!("parameter '{word}' was not provided")),
                };
                frame.set(*name, Some(value));
            }
        }
        Ok(Value::from(self.buffered(|out| self.run(&function.body.body, &frame, out))?.0))
    }

    /// Assigns the arguments to the parameters; a parameter without an argument stays undefined.
    fn bind(&self, function: &Macro, args: Args, frame: &Frame) -> Outcome<()> {
        let what = &function.name;
        let Args { positional, mut named } = args;
        let mut given = positional.into_iter();
        for (number, word, _) in &function.parameters {
            let by_name = named.iter().position(|(name, _)| **name == **word);
            let value = match (given.next(), by_name) {
                (Some(_), Some(_)) => {
                    return Err(TemplateError::failed(format!("macro '{what}' got two values for '{word}'")));
                }
                (None, Some(at)) => Some(named.remove(at).1),
                (value, None) => value,
            };
            frame.set(*number, value);
        }
        if let Some(name) = function.caller {
            let at = named.iter().position(|(name, _)| &**name == "caller");
            let caller = at.map(|at| named.remove(at).1);
            frame.set(name, Some(caller.unwrap_or_else(|| Value::undefined("No caller defined"))));
        }
        match function.kwargs {
            Some(name) => {
                let pairs = named.into_iter().map(|(name, value)| (Value::Str(name), value)).collect();
                frame.set(name, Some(Value::Dict(Rc::new(pairs))));
            }
            None => {
                if let Some((name, _)) = named.first() {
                    return Err(TemplateError::failed(format!("macro '{what}' has no argument '{name}'")));
                }
            }
        }
        match (function.varargs, given.as_slice().len()) {
            (Some(name), _) => frame.set(name, Some(Value::tuple(given.collect()))),
            (None, 0) => {}
            (None, _) => return Err(TemplateError::failed(format!("macro '{what}' got too many arguments"))),
        }
        Ok(())
    }
}

fn closure(function: &Arc<Macro>, frame: &Rc<Frame>) -> Value {
    let (function, frame) = (function.clone(), frame.clone());
    Value::Function(Function::Macro(Rc::new(Closure { function, frame })))
}
