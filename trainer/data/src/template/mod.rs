//! Chat templates as transformers renders them: jinja2 with Python's values, in the environment of
//! `transformers.utils.chat_template_utils`.
//!
//! - DAT-T1: what renders here renders to the same text there. What is not known here is an error that names it.
//!
//! There is no jinja2 in Rust of which this can be said: minijinja prints, joins, compares and divides by rules of its own,
//! and nothing of that can be told from a template's text. `trainer/data/tests/templates.rs` holds it against jinja2 itself.

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

/// A template that can be rendered.
#[derive(Debug)]
pub(crate) struct Template {
    parsed: Parsed,
    loop_name: Option<ast::Name>,
    /// Functions that every template knows, where the template names them.
    globals: Vec<Option<&'static str>>,
}

impl Template {
    pub(crate) fn parse(source: &str) -> Result<Self, TemplateError> {
        let parsed = parser::parse(source)?;
        let number = |word: &str| parsed.names.iter().position(|name| name == word).map(|at| at as ast::Name);
        let global = |name: &String| functions::GLOBALS.into_iter().find(|global| global == name);
        Ok(Self { loop_name: number("loop"), globals: parsed.names.iter().map(global).collect(), parsed })
    }

    /// Text of the template; `context` gives values to names, the last one wins.
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

/// What a conversation gives to a template.
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
