//! Typed reading of JSON fields; an error names the field and its value.

use std::ops::RangeInclusive;

use dyad_proto::Fault;
use serde_json::{Map, Value};

/// Larger than any size of a model; a product of two does not overflow.
const LARGEST: i64 = 1 << 31;

/// The fields of a JSON object. Reading treats a null as an absent field.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there, null or not.
    pub(super) fn mentions(self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn is_null(self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_null)
    }

    fn typed<T>(
        self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            Fault::input(format!("{name} = {value}: expected {expected}"))
                .hint("config.json is damaged, or not of this model")
        })
    }

    /// A count of at least 1.
    pub(super) fn size(self, name: &str, default: i64) -> Result<i64, Fault> {
        let sized = |value: &Value| value.as_i64().filter(|size| (1..=LARGEST).contains(size));
        Ok(self.typed(name, "a whole number of at least 1", sized)?.unwrap_or(default))
    }

    pub(super) fn integer(self, name: &str) -> Result<Option<i64>, Fault> {
        self.typed(name, "a whole number", Value::as_i64)
    }

    /// A number from 0 to 1.
    pub(super) fn part(self, name: &str, default: f64) -> Result<f64, Fault> {
        Ok(self.within(name, 0.0..=1.0)?.unwrap_or(default))
    }

    /// A number within `range`. Numbers outside occur in no model and would break float32 arithmetic.
    pub(super) fn within(self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Fault> {
        let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
        self.typed(name, &expected, |value| value.as_f64().filter(|number| range.contains(number)))
    }

    pub(super) fn flag(self, name: &str) -> Result<bool, Fault> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(super) fn text(self, name: &str) -> Result<Option<String>, Fault> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn list(self, name: &str) -> Result<Option<&'a Vec<Value>>, Fault> {
        self.typed(name, "a list", Value::as_array)
    }

    pub(super) fn object(self, name: &str) -> Result<Option<Fields<'a>>, Fault> {
        Ok(self.typed(name, "an object", Value::as_object)?.map(Fields))
    }
}
