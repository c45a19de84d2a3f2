//! Evaluates expressions.

use std::cmp::Ordering;
use std::rc::Rc;

use super::access::{attribute, item, slice};
use super::ast::*;
use super::error::{Cause, TemplateError};
use super::functions::{self, Args};
use super::render::Renderer;
use super::value::frame::Frame;
use super::value::function::Function;
use super::value::{Outcome, Pairs, Value, put};
use super::{filters, math, methods, tests};

impl Renderer<'_> {
    pub(super) fn eval(&self, expr: &Expr, frame: &Rc<Frame>) -> Outcome<Value> {
        self.value(expr, frame).map_err(|error| error.at(expr.line))
    }

    fn value(&self, expr: &Expr, frame: &Rc<Frame>) -> Outcome<Value> {
        let eval = |expr| self.eval(expr, frame);
        Ok(match &expr.kind {
            ExprKind::Const(Const::None) => Value::None,
            ExprKind::Const(Const::Bool(value)) => Value::Bool(*value),
            ExprKind::Const(Const::Int(value)) => Value::Int(*value),
            ExprKind::Const(Const::Float(value)) => Value::Float(*value),
            ExprKind::Const(Const::Str(text)) => Value::from(text.as_str()),
            ExprKind::Name(name) => self.lookup(*name, frame),
            ExprKind::Attr(object, name) => attribute(&eval(object)?, name)?,
            ExprKind::Item(object, key) => item(&eval(object)?, &eval(key)?)?,
            ExprKind::Slice(object, parts) => {
                let part = |at: usize| parts[at].as_ref().map_or(Ok(Value::None), eval);
                slice(&eval(object)?, &[part(0)?, part(1)?, part(2)?])?
            }
            ExprKind::Call(..) => self.call_expr(expr, frame, None)?,
            ExprKind::Filter(..) => self.filtered(expr, None, frame)?,
            ExprKind::Test(object, name, arguments) => {
                let object = eval(object)?;
                Value::Bool(tests::call(name, &object, self.arguments(arguments, frame)?)?)
            }
            ExprKind::Not(object) => Value::Bool(!eval(object)?.truth()),
            ExprKind::Neg(object) => math::negative(&eval(object)?)?,
            ExprKind::Pos(object) => math::positive(&eval(object)?)?,
            ExprKind::Math(operation, left, right) => math::apply(*operation, &eval(left)?, &eval(right)?)?,
            ExprKind::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    eval(part)?.print(&mut text)?;
                }
                Value::from(text)
            }
            ExprKind::Compare(first, others) => self.comparison(first, others, frame)?,
            ExprKind::And(left, right) => {
                let left = eval(left)?;
                if left.truth() { eval(right)? } else { left }
            }
            ExprKind::Or(left, right) => {
                let left = eval(left)?;
                if left.truth() { left } else { eval(right)? }
            }
            ExprKind::Cond(test, value, other) => match (eval(test)?.truth(), other) {
                (true, _) => eval(value)?,
                (false, Some(other)) => eval(other)?,
                (false, None) => {
                    let line = expr.line;
                    Value::undefined(format!("the inline if-expression on line {line} has no else section"))
                }
            },
            ExprKind::List(items) => Value::from(self.values(items, frame)?),
            ExprKind::Tuple(items) => Value::tuple(self.values(items, frame)?),
            ExprKind::Dict(items) => {
                let mut pairs = Pairs::new();
                for (key, value) in items {
                    put(&mut pairs, eval(key)?, eval(value)?)?;
                }
                Value::Dict(Rc::new(pairs))
            }
        })
    }

    fn values(&self, items: &[Expr], frame: &Rc<Frame>) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.eval(item, frame)).collect()
    }

    /// A chained comparison: compares each value with the previous one, until one comparison fails.
    fn comparison(&self, first: &Expr, others: &[(Comparison, Expr)], frame: &Rc<Frame>) -> Outcome<Value> {
        let mut left = self.eval(first, frame)?;
        for (comparison, right) in others {
            let right = self.eval(right, frame)?;
            if !compare(*comparison, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn arguments(&self, arguments: &Arguments, frame: &Rc<Frame>) -> Outcome<Args> {
        let mut positional = self.values(&arguments.positional, frame)?;
        if let Some(rest) = &arguments.rest {
            positional.extend(self.eval(rest, frame)?.items()?);
        }
        let mut named = Vec::with_capacity(arguments.named.len());
        for (name, value) in &arguments.named {
            named.push((name.as_str().into(), self.eval(value, frame)?));
        }
        if let Some(rest) = &arguments.named_rest {
            let Value::Dict(pairs) = self.eval(rest, frame)? else {
                return Err(TemplateError::failed("what follows ** in a call has to be a dictionary"));
            };
            for (name, value) in pairs.iter() {
                named.push((name.as_str()?.clone(), value.clone()));
            }
        }
        for (at, (name, _)) in named.iter().enumerate() {
            if named[..at].iter().any(|(other, _)| other == name) {
                return Err(TemplateError::failed(format!("two values for the argument '{name}'")));
            }
        }
        Ok(Args { positional, named })
    }

    /// Applies filters; the innermost filter of a filter block has no input and takes the text `block`.
    pub(super) fn filtered(&self, expr: &Expr, block: Option<Value>, frame: &Rc<Frame>) -> Outcome<Value> {
        let ExprKind::Filter(input, name, arguments) = &expr.kind else {
            return Err(TemplateError::failed("a filter was expected"));
        };
        let input = match (input, block) {
            (Some(input), None) => self.eval(input, frame)?,
            (Some(input), block) => self.filtered(input, block, frame)?,
            (None, block) => block.unwrap_or(Value::None),
        };
        let arguments = self.arguments(arguments, frame)?;
        filters::call(name, &input, arguments).map_err(|error| error.at(expr.line))
    }

    pub(super) fn call_expr(&self, expr: &Expr, frame: &Rc<Frame>, caller: Option<Value>) -> Outcome<Value> {
        let ExprKind::Call(callee, arguments) = &expr.kind else {
            return Err(TemplateError::failed("a call was expected"));
        };
        let callee = self.eval(callee, frame)?;
        let mut args = self.arguments(arguments, frame)?;
        args.named.extend(caller.map(|caller| ("caller".into(), caller)));
        self.call(&callee, args).map_err(|error| error.at(expr.line))
    }

    fn call(&self, callee: &Value, args: Args) -> Outcome<Value> {
        let function = match callee {
            Value::Function(function) => function,
            Value::Undefined(what) => return Err(TemplateError::failed(&**what)),
            _ => return Err(TemplateError::failed(format!("'{}' cannot be called", callee.kind()))),
        };
        match function {
            Function::Global("raise_exception") => {
                let [message] = args.bind("raise_exception", ["message"], 1)?;
                let message = message.unwrap_or(Value::None).text()?;
                Err(TemplateError::new(Cause::Raised, &*message))
            }
            Function::Global("strftime_now") => {
                let [format] = args.bind("strftime_now", ["format"], 1)?;
                Ok(Value::from(self.now.format(format.unwrap_or(Value::None).as_str()?)?))
            }
            Function::Global(name) => functions::call_global(name, args),
            Function::Macro(closure) => self.call_macro(closure, args),
            Function::Loop(state) => self.recurse(state, args),
            Function::Joiner(joiner) => args.positional("joiner", 0, 0).map(|_| functions::joiner(joiner)),
            Function::Cycler(_) => Err(TemplateError::failed("a cycler cannot be called")),
            Function::Method(method) => match &**method {
                (Value::Function(Function::Loop(state)), name) => state.method(name, args),
                (Value::Function(Function::Cycler(cycler)), name) => {
                    args.positional(name, 0, 0).map(|_| functions::cycler_method(cycler, name))
                }
                (object, name) => methods::call(object, name, args),
            },
        }
    }
}

/// Compares two values.
pub(super) fn compare(comparison: Comparison, left: &Value, right: &Value) -> Outcome<bool> {
    let ordered = |is: fn(Ordering) -> bool| Ok(left.compare(right)?.is_some_and(is));
    match comparison {
        Comparison::Eq => left.equals(right),
        Comparison::Ne => left.equals(right).map(|equal| !equal),
        Comparison::Lt => ordered(Ordering::is_lt),
        Comparison::Le => ordered(Ordering::is_le),
        Comparison::Gt => ordered(Ordering::is_gt),
        Comparison::Ge => ordered(Ordering::is_ge),
        Comparison::In => right.contains(left),
        Comparison::NotIn => right.contains(left).map(|contains| !contains),
    }
}
