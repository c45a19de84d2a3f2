//! Forms of data: how a JSON object describes a preference pair. All lines of a file have the form of its first line.

mod hosted;
mod trl;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{PreferencePair, RecordError};

/// A form of data.
#[derive(Debug)]
pub struct Form {
    /// Name of the form, for messages.
    pub name: &'static str,
    /// List of its fields, for messages.
    pub fields: &'static str,
    /// Whether an object is meant to have this form.
    recognises: fn(&Map<String, Value>) -> bool,
    /// Checks all rules of a line and returns the pair.
    parse: fn(&str, &mut PassedOver) -> Result<PreferencePair, RecordError>,
    /// Checks all rules of a line without returning the pair.
    check: fn(&str, &mut PassedOver) -> Result<(), RecordError>,
}

/// Names of fields that are not read, in forms that permit further fields.
pub(super) type PassedOver = BTreeSet<String>;

/// Every form; the first that recognises an object reads it.
const FORMS: [&Form; 2] = [&hosted::FORM, &trl::FORM];

impl Form {
    /// The form of a line; the first form if none recognises it, because its errors say what was expected.
    pub(super) fn of(line: &str) -> &'static Self {
        Self::recognised(line).unwrap_or(FORMS[0])
    }

    /// The form that recognises a line, if any.
    pub(super) fn recognised(line: &str) -> Option<&'static Self> {
        let Ok(Value::Object(record)) = serde_json::from_str(line) else { return None };
        FORMS.into_iter().find(|form| (form.recognises)(&record))
    }

    /// Reads a line and checks all rules.
    pub fn parse(&self, line: &str) -> Result<PreferencePair, RecordError> {
        (self.parse)(line, &mut PassedOver::new())
    }

    /// Checks all rules of a line; adds the names of unread fields to `passed_over`.
    pub(super) fn check(&self, line: &str, passed_over: &mut PassedOver) -> Result<(), RecordError> {
        (self.check)(line, passed_over)
    }
}

/// Reads a line of any form.
pub fn parse(line: &str) -> Result<PreferencePair, RecordError> {
    Form::of(line).parse(line)
}
