//! Columns that several forms share, and columns that no form reads.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::fields::{self, is_set, kind, misspelt};
use super::json::Json;
use super::{RecordError, broken};
use crate::plain;

/// Names of columns that are not read.
pub(super) type PassedOver = BTreeSet<String>;

/// Maximum number of columns that are named.
const MOST_NAMED: usize = 16;

/// Columns with data that Dyad does not train on.
const MEDIA: [&str; 6] = ["image", "images", "audio", "audios", "video", "videos"];

/// Variables that transformers sets itself or reads as options of `apply_chat_template`.
const NOT_VARIABLES: [&str; 12] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
];

/// Adds the names of columns that the form does not know to `passed_over`. Fails if one is a misspelt name of an absent column.
pub(super) fn pass_over(
    record: &Map<String, Value>,
    known: &[&str],
    passed_over: &mut PassedOver,
) -> Result<(), RecordError> {
    for (key, value) in record {
        if known.contains(&key.as_str()) || value.is_null() {
            continue;
        }
        if MEDIA.contains(&key.as_str()) {
            if is_set(value) {
                return broken(key, "images, audio and video are not supported: Dyad trains on text alone");
            }
            continue;
        }
        if let Some(nearest) = misspelt(key, known).filter(|name| !record.contains_key(*name)) {
            return broken(
                "record",
                format!("unknown field `{}`; did you mean `{nearest}`?", plain::quoted(key)),
            );
        }
        if passed_over.len() < MOST_NAMED {
            passed_over.insert(plain::quoted(key).into_owned());
        }
    }
    Ok(())
}

/// The column `weight`: a factor of the record's loss.
pub(super) fn weight(record: &Map<String, Value>) -> Result<f64, RecordError> {
    match record.get("weight") {
        None | Some(Value::Null) => Ok(1.0),
        Some(value) => match value.as_f64() {
            // Above, float32 gradients overflow.
            Some(weight) if (0.0..=1e6).contains(&weight) => Ok(weight),
            _ => broken("weight", format!("expected a number from 0 to 1000000, found {}", shown(value))),
        },
    }
}

/// Tools: a list of objects, or the same as JSON text. `None` if there are none.
pub(super) fn tools(value: Option<&Value>, field: &str) -> Result<Option<Json>, RecordError> {
    let parsed;
    let value = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => {
            parsed = fields::json(text, field, "a list of tools")?;
            &parsed
        }
        Some(value) => value,
    };
    let Value::Array(items) = value else {
        return broken(field, format!("expected a list of tools, found {}", kind(value)));
    };
    if let Some(at) = items.iter().position(|item| !item.is_object()) {
        return broken(format!("{field}[{at}]"), format!("expected an object, found {}", kind(&items[at])));
    }
    Ok((!items.is_empty()).then(|| Json::of(value)))
}

/// Fails if `parallel_tool_calls` is no boolean. Templates do not read it.
pub(super) fn parallel_tool_calls(value: Option<&Value>, field: &str) -> Result<(), RecordError> {
    match value {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(other) => broken(field, format!("expected true or false, found {}", kind(other))),
    }
}

/// Further variables of the chat template.
pub(super) fn chat_template_kwargs(record: &Map<String, Value>) -> Result<Option<Json>, RecordError> {
    let field = "chat_template_kwargs";
    match record.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value @ Value::Object(entries)) => {
            if let Some(name) = NOT_VARIABLES.iter().find(|name| entries.contains_key(**name)) {
                return broken(field, format!("`{name}` is not a variable that a record may set"));
            }
            Ok((!entries.is_empty()).then(|| Json::of(value)))
        }
        Some(other) => broken(field, format!("expected an object, found {}", kind(other))),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        other => kind(other).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn unread_columns_are_named_and_misspelt_ones_refused() {
        let known = ["prompt", "chosen", "rejected", "tools"];
        let mut passed_over = PassedOver::new();
        let record =
            json!({"prompt": 1, "prompts": 2, "chosen_score": 7.5, "id": "x", "images": [], "y": null});
        pass_over(&object(record), &known, &mut passed_over).unwrap();
        assert_eq!(passed_over.into_iter().collect::<Vec<_>>(), ["chosen_score", "id", "prompts"]);
        for (key, nearest) in
            [("chosn", "chosen"), ("regected", "rejected"), ("Rejecetd", "rejected"), ("tool", "tools")]
        {
            let error = pass_over(&object(json!({ key: 1 })), &known, &mut PassedOver::new()).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("record: unknown field `{key}`; did you mean `{nearest}`?")
            );
        }
        let error = pass_over(&object(json!({"images": ["x"]})), &known, &mut PassedOver::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "images: images, audio and video are not supported: Dyad trains on text alone"
        );
    }

    #[test]
    fn weights_are_numbers_of_at_least_0() {
        let weight =
            |value: Value| weight(&object(json!({ "weight": value }))).map_err(|error| error.to_string());
        assert_eq!((weight(json!(null)), weight(json!(0)), weight(json!(2.5))), (Ok(1.0), Ok(0.0), Ok(2.5)));
        assert_eq!(weight(json!(-1)).unwrap_err(), "weight: expected a number from 0 to 1000000, found -1");
        assert_eq!(
            weight(json!("1")).unwrap_err(),
            "weight: expected a number from 0 to 1000000, found a string"
        );
    }

    #[test]
    fn tools_are_a_list_or_its_json_text() {
        let tools = |value: Value| tools(Some(&value), "tools").map_err(|error| error.to_string());
        let list = json!([{"b": 1, "a": 2}]);
        let expected = Ok(Some(Json::of(&list)));
        assert_eq!((tools(list.clone()), tools(json!(list.to_string()))), (expected.clone(), expected));
        assert_eq!((tools(json!([])), tools(json!(""))), (Ok(None), Ok(None)));
        assert_eq!(
            tools(json!("x")).unwrap_err(),
            "tools: expected JSON of a list of tools (expected value at column 1)"
        );
        assert_eq!(tools(json!(["f"])).unwrap_err(), "tools[0]: expected an object, found a string");
    }

    #[test]
    fn template_variables_cannot_replace_what_transformers_sets() {
        let read = |value: Value| {
            chat_template_kwargs(&object(json!({ "chat_template_kwargs": value })))
                .map_err(|error| error.to_string())
        };
        assert_eq!(
            read(json!({"enable_thinking": false})).unwrap().unwrap().text(),
            r#"{"enable_thinking":false}"#
        );
        assert_eq!(read(json!({})), Ok(None));
        assert!(read(json!({"tools": []})).unwrap_err().contains("`tools` is not a variable"));
        assert!(read(json!("x")).unwrap_err().contains("expected an object"));
    }
}
