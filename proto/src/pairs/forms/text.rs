//! Whole texts for supervised fine-tuning: `text`. All tokens are trained.
//!
//! ```json
//! {"text": "The sky is blue."}
//! ```

use serde_json::{Map, Value};

use super::{Form, PassedOver};
use crate::pairs::{Content, Example, Kind, PlainText, RecordError, columns, fields};
use crate::run_config::DatasetFormat;

pub(super) const FORM: Form = Form {
    format: DatasetFormat::Text,
    name: "text",
    fields: "`text`",
    kind: Kind::Answer,
    recognises: |record| record.contains_key("text"),
    read,
    quick: None,
};

fn read(record: &Map<String, Value>, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
    columns::pass_over(record, &["text", "weight"], passed_over)?;
    let chosen = fields::text(record.get("text"), "text")?.to_owned();
    fields::output(&chosen, "text")?;
    let content = Content::Text(PlainText { prompt: None, chosen, rejected: None });
    Ok(Example { weight: columns::weight(record)?, ..Example::new(content) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_no_prompt() {
        let found = FORM.parse(r#"{"text": "a", "meta": {"x": 1}, "weight": 2}"#).unwrap();
        let text = PlainText { prompt: None, chosen: "a".into(), rejected: None };
        assert_eq!(found, Example { weight: 2.0, ..Example::new(Content::Text(text)) });
        let error = |line: &str| FORM.parse(line).unwrap_err().to_string();
        assert_eq!(error(r#"{"text": " "}"#), "text: empty; an output needs text to train on");
        assert_eq!(error(r#"{"text": ["a"]}"#), "text: expected a string, found a list");
    }
}
