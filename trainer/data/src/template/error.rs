//! Why a template cannot be used, or refuses a conversation.

use std::fmt;

/// What kind of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// jinja2 would not read it either.
    Syntax,
    /// jinja2 knows it and this engine does not.
    Unsupported,
    /// jinja2 would fail here as well.
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

    /// `construct` is what is not known here.
    pub(super) fn unsupported(construct: impl fmt::Display) -> Self {
        Self::new(Cause::Unsupported, format!("{construct} is not supported"))
    }

    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(Cause::Failed, message)
    }

    /// The same, with a line if it has none.
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
