//! Strict schema validation: fields that the schemas do not know are errors.

use std::path::Path;

use serde_json::Value;

/// The extract of the API's schemas in `deploy/kubernetes/schemas`.
pub(crate) struct Schemas(Value);

impl Schemas {
    pub(crate) fn load(deploy: &Path) -> Self {
        let text = std::fs::read_to_string(deploy.join("schemas/schemas.json")).unwrap();
        Self(serde_json::from_str(&text).unwrap())
    }

    /// All schema errors of an object.
    pub(crate) fn errors(&self, object: &Value) -> Vec<String> {
        let of = |key: &str| object[key].as_str().unwrap_or_default();
        let kind = format!("{}/{}", of("apiVersion"), of("kind"));
        let mut errors = Vec::new();
        match self.0["kinds"][&kind].as_str() {
            Some(definition) => self.check(&self.0["definitions"][definition], object, &kind, &mut errors),
            None => errors.push(format!("no schema for {kind}")),
        }
        errors
    }

    fn check(&self, schema: &Value, value: &Value, at: &str, errors: &mut Vec<String>) {
        if let Some(name) = schema["$ref"].as_str() {
            return self.check(&self.0["definitions"][name], value, at, errors);
        }
        if !has_type(schema, value) {
            return errors.push(format!("{at}: {value} is no {}", schema["type"]));
        }
        let allowed = schema["enum"].as_array();
        if allowed.is_some_and(|allowed| !allowed.contains(value)) {
            errors.push(format!("{at}: {value} is none of {}", schema["enum"]));
        }
        for (limit, exceeds) in [("maximum", 1.0), ("minimum", -1.0)] {
            if let (Some(limit), Some(number)) = (schema[limit].as_f64(), value.as_f64())
                && (number - limit) * exceeds > 0.0
            {
                errors.push(format!("{at}: {number} is beyond {limit}"));
            }
        }
        match value {
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.check(&schema["items"], item, &format!("{at}[{index}]"), errors);
                }
            }
            Value::Object(_) => self.check_fields(schema, value, at, errors),
            _ => {}
        }
    }

    fn check_fields(&self, schema: &Value, value: &Value, at: &str, errors: &mut Vec<String>) {
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        errors
            .extend(required.filter(|name| value.get(name).is_none()).map(|name| format!("{at}: no {name}")));
        for (name, inner) in value.as_object().into_iter().flatten() {
            let at = format!("{at}.{name}");
            match (&schema["properties"][name], &schema["additionalProperties"]) {
                (Value::Null, Value::Null) => errors.push(format!("{at}: unknown field")),
                (Value::Null, free) => self.check(free, inner, &at, errors),
                (known, _) => self.check(known, inner, &at, errors),
            }
        }
    }
}

fn has_type(schema: &Value, value: &Value) -> bool {
    if schema["format"] == "int-or-string" {
        return value.is_i64() || value.is_string();
    }
    match schema["type"].as_str() {
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => false,
    }
}
