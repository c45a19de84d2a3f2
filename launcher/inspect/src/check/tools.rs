//! Tools of a record: whether calls name them, and whether arguments follow their JSON schemas.

use std::collections::HashMap;

use dyad_proto::pairs::Json;
use dyad_proto::plain;
use jsonschema::Validator;
use serde_json::Value;

use super::finding::{Problem, Severity};

/// Most errors that are named for one call.
const MOST_ERRORS: usize = 3;

/// The tools of one list.
#[derive(Debug, Default)]
pub(super) struct Tools {
    /// Validator of the arguments by the tool's name; `None` for a tool without a schema, or with one that cannot be read.
    by_name: HashMap<String, Option<Validator>>,
    /// Problems of the definitions. Fields begin after the list's own, e.g. `[0].function.name`.
    problems: Vec<(String, String)>,
}

impl Tools {
    fn read(list: &Json) -> Self {
        let mut tools = Self::default();
        let list = list.value();
        for (at, tool) in list.as_array().into_iter().flatten().enumerate() {
            let (prefix, function) = match tool.get("function") {
                Some(function) => (format!("[{at}].function"), function),
                None => (format!("[{at}]"), tool),
            };
            let Some(name) = function.get("name").and_then(Value::as_str) else {
                tools
                    .problems
                    .push((format!("{prefix}.name"), "missing; expected the name of the tool".into()));
                continue;
            };
            let validator =
                function.get("parameters").filter(|schema| !schema.is_null()).and_then(|schema| {
                    let problem = |error: String| {
                        (format!("{prefix}.parameters"), format!("no valid JSON schema: {error}"))
                    };
                    jsonschema::validator_for(schema)
                        .map_err(|error| tools.problems.push(problem(error.to_string())))
                        .ok()
                });
            if tools.by_name.insert(name.to_owned(), validator).is_some() {
                let twice = format!("the tool \"{}\" is there twice", plain::quoted(name));
                tools.problems.push((format!("{prefix}.name"), twice));
            }
        }
        tools
    }

    /// Problems of the definitions.
    pub(super) fn problems<'t>(&'t self, field: &'t str) -> impl Iterator<Item = Problem> + 't {
        let problem = move |(place, what): &(String, String)| {
            Problem::new(Severity::Warning, format!("{field}{place}"), what)
        };
        self.problems.iter().map(problem)
    }

    /// Problems of a call.
    pub(super) fn check(&self, call: &Value, field: &str) -> Vec<Problem> {
        let (prefix, function) = match call.get("function") {
            Some(function) => (format!("{field}.function"), function),
            None => (field.to_owned(), call),
        };
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        let warn = |field: String, what: String| Problem::new(Severity::Warning, field, what);
        let Some(validator) = self.by_name.get(name) else {
            let known = self.by_name.len();
            let mut names: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
            names.sort_unstable();
            let what = match known {
                0 => format!("calls \"{}\", but the record has no tools", plain::quoted(name)),
                _ => format!(
                    "no tool is named \"{}\" (expected one of {})",
                    plain::quoted(name),
                    names.join(", ")
                ),
            };
            return vec![warn(format!("{prefix}.name"), what)];
        };
        let (Some(validator), Some(arguments)) = (validator, function.get("arguments")) else {
            return Vec::new();
        };
        let problem = |error: jsonschema::ValidationError<'_>| {
            let at = error.instance_path().to_string().replace('/', ".");
            warn(format!("{prefix}.arguments{at}"), format!("does not follow the tool's schema: {error}"))
        };
        validator.iter_errors(arguments).take(MOST_ERRORS).map(problem).collect()
    }
}

/// Tools that were read before: files repeat the same list in every record.
#[derive(Debug, Default)]
pub(super) struct KnownTools {
    by_list: HashMap<Json, Tools>,
    /// Of records without tools.
    none: Tools,
}

impl KnownTools {
    /// Most lists that are kept; files with another list in every record are read anew each time.
    const MOST: usize = 256;

    pub(super) fn of(&mut self, list: Option<&Json>) -> &Tools {
        let Some(list) = list else { return &self.none };
        if self.by_list.len() >= Self::MOST && !self.by_list.contains_key(list) {
            self.by_list.clear();
        }
        self.by_list.entry(list.clone()).or_insert_with(|| Tools::read(list))
    }
}
