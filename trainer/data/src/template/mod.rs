//! Chat templates as transformers renders them: jinja2 with Python's values, in the environment of
//! `transformers.utils.chat_template_utils`.
//!
//! - DAT-T1: a template that renders here gives the same text there. An unsupported construct is an error that names it.
//!
//! No crate guarantees this: minijinja has its own rules for printing, joining, comparing and dividing, and a template's source does
//! not show whether they matter. `trainer/data/tests/templates.rs` compares this engine with jinja2 itself.

mod access;
mod ast;
mod error;
mod eval;
mod expressions;
mod filters;
mod format;
mod functions;
mod json;
mod lexer;
mod math;
mod methods;
mod nesting;
mod parser;
mod render;
mod scope;
mod sequences;
mod strftime;
mod tests;
mod text;
mod value;

use std::cell::Cell;
use std::rc::Rc;

use parser::Parsed;
use render::Renderer;

pub(crate) use error::{Cause, TemplateError};
pub(crate) use strftime::Moment;
use value::Value;

/// A parsed template.
#[derive(Debug)]
pub(crate) struct Template {
    parsed: Parsed,
    loop_name: Option<ast::Name>,
    /// For each name of the template, the global function of that name, if there is one.
    globals: Vec<Option<&'static str>>,
}

impl Template {
    pub(crate) fn parse(source: &str) -> Result<Self, TemplateError> {
        let parsed = parser::parse(source)?;
        let number = |word: &str| parsed.names.iter().position(|name| name == word).map(|at| at as ast::Name);
        let global = |name: &String| functions::GLOBALS.into_iter().find(|global| global == name);
        Ok(Self { loop_name: number("loop"), globals: parsed.names.iter().map(global).collect(), parsed })
    }

    /// Renders the template; `context` gives values to names, and the last value of a name counts.
    pub(crate) fn render(
        &self,
        context: &[(&str, Given<'_>)],
        now: &Moment,
    ) -> Result<String, TemplateError> {
        let value = |(at, name): (usize, &String)| {
            let given = context.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.value());
            given.or_else(|| {
                self.globals[at].map(|global| Value::Function(value::function::Function::Global(global)))
            })
        };
        let renderer = Renderer {
            template: &self.parsed,
            context: self.parsed.names.iter().enumerate().map(value).collect(),
            loop_name: self.loop_name,
            now,
            depth: Cell::new(0),
            namespaces: Cell::new(0),
        };
        let mut out = String::new();
        renderer.root(&mut out)?;
        Ok(out)
    }
}

/// A value from the conversation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Given<'a> {
    None,
    Bool(bool),
    Text(&'a str),
    /// Role and content of each message.
    Messages(&'a [(&'a str, &'a str)]),
}

impl Given<'_> {
    fn value(&self) -> Value {
        match self {
            Self::None => Value::None,
            Self::Bool(value) => Value::Bool(*value),
            Self::Text(text) => Value::from(*text),
            Self::Messages(messages) => {
                let message = |(role, content): &(&str, &str)| {
                    let pairs = vec![
                        (Value::from("role"), Value::from(*role)),
                        (Value::from("content"), Value::from(*content)),
                    ];
                    Value::Dict(Rc::new(pairs))
                };
                Value::from(messages.iter().map(message).collect::<Vec<_>>())
            }
        }
    }
}
