//! Errors of templates.

use std::fmt;

/// Kind of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// jinja2 refuses the source as well.
    Syntax,
    /// jinja2 may support it; this engine does not.
    Unsupported,
    /// jinja2 fails here as well.
    Failed,
    /// The template called `raise_exception`.
    Raised,
}

/// An error with the line of the template that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TemplateError {
    pub(crate) cause: Cause,
    /// 0 until it is known.
    pub(crate) line: u32,
    pub(crate) message: String,
}

impl TemplateError {
    pub(super) fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, line: 0, message: message.into() }
    }

    pub(super) fn syntax(message: impl Into<String>) -> Self {
        Self::new(Cause::Syntax, message)
    }

    /// The error for an unsupported construct; `construct` names it.
    pub(super) fn unsupported(construct: impl fmt::Display) -> Self {
        Self::new(Cause::Unsupported, format!("{construct} is not supported"))
    }

    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(Cause::Failed, message)
    }

    /// Sets the line, unless it is known already.
    #[must_use]
    pub(super) fn at(mut self, line: u32) -> Self {
        if self.line == 0 {
            self.line = line;
        }
        self
    }
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.message.lines().next().unwrap_or_default();
        write!(f, "line {}: {message}", self.line)
    }
}
