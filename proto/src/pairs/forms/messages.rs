//! Whole conversations for supervised fine-tuning: `messages`. Every message of the assistant is trained.
//!
//! ```json
//! {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
//!               {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you", "weight": 0}]}
//! ```

use serde_json::{Map, Value};

use super::{Form, PassedOver, around};
use crate::pairs::{Content, Conversation, Example, Kind, RecordError, broken, columns, fields};
use crate::run_config::DatasetFormat;

const COLUMNS: [&str; 5] = ["messages", "tools", "parallel_tool_calls", "chat_template_kwargs", "weight"];

pub(super) const FORM: Form = Form {
    format: DatasetFormat::Messages,
    name: "conversation",
    fields: "`messages`",
    kind: Kind::Answer,
    recognises: |record| record.contains_key("messages"),
    read,
    quick: None,
};

fn read(record: &Map<String, Value>, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
    columns::pass_over(record, &COLUMNS, passed_over)?;
    columns::parallel_tool_calls(record.get("parallel_tool_calls"), "parallel_tool_calls")?;
    let chosen = fields::messages(record.get("messages"), "messages")?;
    if chosen.is_empty() {
        return broken("messages", "empty; expected at least one message");
    }
    fields::trained(&chosen, "messages", 0)?;
    let content = Content::Conversation(Conversation { chosen, ..around(record)? });
    Ok(Example { weight: columns::weight(record)?, ..Example::new(content) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_needs_a_message_to_train_on() {
        let line = |last: &str| {
            format!(r#"{{"messages": [{{"role": "user", "content": "a"}}{last}], "tools": []}}"#)
        };
        let error = |last: &str| FORM.parse(&line(last)).unwrap_err().to_string();
        let found = FORM.parse(&line(r#", {"role": "assistant", "content": "b", "weight": 1}"#)).unwrap();
        let Content::Conversation(said) = found.content else { panic!("no conversation") };
        assert_eq!((said.prompt.len(), said.chosen.len(), said.tools), (0, 2, None));
        assert_eq!(error(""), "messages: no message of the assistant: nothing is left to train on");
        assert_eq!(
            error(r#", {"role": "assistant", "content": "b", "weight": 0}"#),
            "messages: every message of the assistant has weight 0: nothing is left to train on"
        );
        assert_eq!(
            error(r#", {"role": "assistant", "content": ""}"#),
            "messages[1].content: empty; an output needs text to train on"
        );
        assert_eq!(
            FORM.parse(r#"{"messages": []}"#).unwrap_err().to_string(),
            "messages: empty; expected at least one message"
        );
    }
}
