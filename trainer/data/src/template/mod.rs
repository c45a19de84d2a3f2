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

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use parser::Parsed;
use render::Renderer;
use serde_json::Value as Json;

pub(crate) use error::{Cause, TemplateError};
pub(crate) use strftime::Moment;
use value::Value;
use value::function::Function;

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

    /// Whether the template has a `{% generation %}` tag.
    pub(crate) fn marks_generation(&self) -> bool {
        self.parsed.marks_generation
    }

    /// Renders the template; `context` gives values to names, and the last value of a name counts.
    pub(crate) fn render(
        &self,
        context: &[(&str, Given<'_>)],
        now: &Moment,
    ) -> Result<Output, TemplateError> {
        let value = |(at, name): (usize, &String)| -> Result<Option<Value>, TemplateError> {
            match context.iter().rev().find(|(known, _)| known == name) {
                Some((_, given)) => given.value().map(Some),
                None => Ok(self.globals[at].map(|name| Value::Function(Function::Global(name)))),
            }
        };
        let renderer = Renderer {
            template: &self.parsed,
            context: self.parsed.names.iter().enumerate().map(value).collect::<Result<_, _>>()?,
            loop_name: self.loop_name,
            now,
            depth: Cell::new(0),
            namespaces: Cell::new(0),
            buffers: Cell::new(0),
            generated: RefCell::new(Ok(Vec::new())),
        };
        let mut text = String::new();
        renderer.root(&mut text)?;
        Ok(Output { text, generated: renderer.generated.into_inner() })
    }
}

/// What a template wrote.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) text: String,
    /// Byte ranges of what `{% generation %}` blocks wrote, in order. An error if transformers would not know such a place: there a
    /// block starts where the text ends that has left all macros, calls, filters and assignments.
    pub(crate) generated: Result<Vec<Range<usize>>, TemplateError>,
}

/// A value from the conversation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Given<'a> {
    None,
    Bool(bool),
    Text(&'a str),
    Json(&'a Json),
    List(&'a [Json]),
}

impl Given<'_> {
    fn value(&self) -> Result<Value, TemplateError> {
        Ok(match self {
            Self::None => Value::None,
            Self::Bool(value) => Value::Bool(*value),
            Self::Text(text) => Value::from(*text),
            Self::Json(json) => from_json(json, 0)?,
            Self::List(items) => list(items, 0)?,
        })
    }
}

fn list(items: &[Json], depth: usize) -> Result<Value, TemplateError> {
    let items = items.iter().map(|item| from_json(item, depth + 1)).collect::<Result<Vec<_>, _>>()?;
    Ok(Value::from(items))
}

/// The value that Python's `json.loads` makes: objects keep the order of their keys, and `1` differs from `1.0`.
fn from_json(json: &Json, depth: usize) -> Result<Value, TemplateError> {
    if depth > nesting::MOST_DEEP {
        let what = format!("a value of more than {} lists within each other", nesting::MOST_DEEP);
        return Err(TemplateError::unsupported(what));
    }
    Ok(match json {
        Json::Null => Value::None,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Value::Int(whole),
            (None, Some(float)) if number.is_f64() => Value::Float(float),
            _ => return Err(TemplateError::unsupported(format!("{number}, a whole number beyond 64 bits,"))),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => list(items, depth)?,
        Json::Object(fields) => {
            let pair = |(key, value): (&String, &Json)| {
                Ok((Value::from(key.as_str()), from_json(value, depth + 1)?))
            };
            Value::Dict(Rc::new(fields.iter().map(pair).collect::<Result<Vec<_>, TemplateError>>()?))
        }
    })
}
