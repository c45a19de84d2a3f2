//! The form of TRL's `KTOTrainer`: `prompt`, `completion` and `label`, which says whether the completion is desirable.
//!
//! ```json
//! {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}], "label": true}
//! ```

use serde_json::{Map, Value};

use super::{Form, PassedOver, given, prompt_completion};
use crate::pairs::fields::kind;
use crate::pairs::{Example, Kind, RecordError, broken, columns};
use crate::run_config::DatasetFormat;

const COLUMNS: [&str; 6] = ["prompt", "completion", "label", "tools", "chat_template_kwargs", "weight"];

pub(super) const FORM: Form = Form {
    format: DatasetFormat::UnpairedPreference,
    name: "KTO",
    fields: "`prompt`, `completion` and `label`",
    kind: Kind::Labelled,
    recognises: |record| {
        record.contains_key("completion")
            && given(record, "label").is_some_and(|label| truth(label).is_some())
    },
    read,
    quick: None,
};

fn read(record: &Map<String, Value>, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
    columns::pass_over(record, &COLUMNS, passed_over)?;
    let content = prompt_completion::content(record)?;
    Ok(Example { weight: columns::weight(record)?, label: Some(label(record)?), content })
}

fn label(record: &Map<String, Value>) -> Result<bool, RecordError> {
    match record.get("label") {
        None => broken("label", "missing"),
        Some(value) => truth(value)
            .map_or_else(|| broken("label", format!("expected true or false, found {}", kind(value))), Ok),
    }
}

/// TRL sums labels up, so 0 and 1 count as well.
fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(label) => Some(*label),
        Value::Number(number) if number.as_i64() == Some(0) => Some(false),
        Value::Number(number) if number.as_i64() == Some(1) => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_true_or_false() {
        let line = |label: &str| format!(r#"{{"prompt": "a", "completion": "b", "label": {label}}}"#);
        for (label, expected) in [("true", true), ("false", false), ("1", true), ("0", false)] {
            assert_eq!(FORM.parse(&line(label)).unwrap().label, Some(expected));
            assert_eq!(Form::of(&line(label)).name, "KTO");
        }
        // Another column of this name is no label.
        assert_eq!(Form::of(&line("\"spam\"")).name, "single answers");
        let error = FORM.parse(&line("\"yes\"")).unwrap_err().to_string();
        assert_eq!(error, "label: expected true or false, found a string");
    }
}
