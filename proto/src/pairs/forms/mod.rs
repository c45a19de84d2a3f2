//! Forms of data: how one JSON object says a preference pair. All lines of a file are of one form, that of its first line.

mod hosted;
mod trl;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{PreferencePair, RecordError};

/// A form of data.
#[derive(Debug)]
pub struct Form {
    /// What it is called.
    pub name: &'static str,
    /// Its fields, as errors list them.
    pub fields: &'static str,
    /// Whether an object is meant to be of this form.
    recognises: fn(&Map<String, Value>) -> bool,
    /// Reads a line, every rule checked.
    parse: fn(&str, &mut PassedOver) -> Result<PreferencePair, RecordError>,
    /// Checks every rule, and keeps nothing.
    check: fn(&str, &mut PassedOver) -> Result<(), RecordError>,
}

/// Names of fields that are not read, where the form allows for others.
pub(super) type PassedOver = BTreeSet<String>;

/// Every form; the first that recognises an object reads it.
const FORMS: [&Form; 2] = [&hosted::FORM, &trl::FORM];

impl Form {
    /// The form of a line. What is of no form is read as the first, whose errors say what was expected.
    pub(super) fn of(line: &str) -> &'static Self {
        Self::recognised(line).unwrap_or(FORMS[0])
    }

    /// The form of a line, if it is of one.
    pub(super) fn recognised(line: &str) -> Option<&'static Self> {
        let Ok(Value::Object(record)) = serde_json::from_str(line) else { return None };
        FORMS.into_iter().find(|form| (form.recognises)(&record))
    }

    /// Reads a line and checks every rule.
    pub fn parse(&self, line: &str) -> Result<PreferencePair, RecordError> {
        (self.parse)(line, &mut PassedOver::new())
    }

    /// Checks every rule, keeps nothing, and adds fields that are not read.
    pub(super) fn check(&self, line: &str, passed_over: &mut PassedOver) -> Result<(), RecordError> {
        (self.check)(line, passed_over)
    }
}

/// Reads a line of any form.
pub fn parse(line: &str) -> Result<PreferencePair, RecordError> {
    Form::of(line).parse(line)
}
