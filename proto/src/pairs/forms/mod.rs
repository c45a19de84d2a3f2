//! Forms of data: how a JSON object describes a record. All records of a file have the form of its first one.

mod hosted;
mod messages;
mod preference;
mod prompt_completion;
mod text;
mod unpaired;

use serde_json::{Map, Value};

pub(super) use super::columns::PassedOver;
use super::json::refuse_numbers;
use super::{Content, Conversation, Example, Kind, RecordError, columns, fields};
use crate::run_config::DatasetFormat;

/// A form of data.
#[derive(Debug)]
pub struct Form {
    /// Its name in the configuration.
    pub format: DatasetFormat,
    /// Name of the form, for messages.
    pub name: &'static str,
    /// List of its fields, for messages.
    pub fields: &'static str,
    /// What its records are good for.
    pub kind: Kind,
    /// Whether an object is meant to have this form.
    recognises: fn(&Map<String, Value>) -> bool,
    /// Checks all rules of an object and returns the record.
    read: fn(&Map<String, Value>, &mut PassedOver) -> Result<Example, RecordError>,
    /// A faster way for most valid lines.
    quick: Option<Quick>,
}

/// Fast readers of valid lines. For lines that they do not take, the rules decide.
#[derive(Debug)]
struct Quick {
    read: fn(&str) -> Option<Example>,
    takes: fn(&str) -> bool,
}

/// Every form; the first that recognises an object reads it.
const FORMS: [&Form; 6] = [
    &hosted::FORM,
    &preference::FORM,
    &unpaired::FORM,
    &prompt_completion::FORM,
    &messages::FORM,
    &text::FORM,
];

impl Form {
    /// The form of a line; the first form if none recognises it, because its errors say what was expected.
    #[must_use]
    pub fn of(line: &str) -> &'static Self {
        Self::recognised(line).unwrap_or(FORMS[0])
    }

    /// The form that recognises a line, if any.
    #[must_use]
    pub fn recognised(line: &str) -> Option<&'static Self> {
        let Ok(Value::Object(record)) = serde_json::from_str(line) else { return None };
        Self::of_record(&record)
    }

    /// The form that recognises an object, if any.
    #[must_use]
    pub fn of_record(record: &Map<String, Value>) -> Option<&'static Self> {
        FORMS.into_iter().find(|form| (form.recognises)(record))
    }

    /// The form of a configured format; `None` for `auto`.
    #[must_use]
    pub fn of_format(format: DatasetFormat) -> Option<&'static Self> {
        FORMS.into_iter().find(|form| form.format == format)
    }

    /// Reads a line and checks all rules.
    pub fn parse(&self, line: &str) -> Result<Example, RecordError> {
        self.examine(line, &mut PassedOver::new())
    }

    /// Reads a line and checks all rules; adds the names of unread fields to `passed_over`.
    pub fn examine(&self, line: &str, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
        match self.quick.as_ref().and_then(|quick| (quick.read)(line)) {
            Some(example) => Ok(example),
            None => self.by_the_rules(line, passed_over),
        }
    }

    /// Checks all rules of a line; adds the names of unread fields to `passed_over`.
    pub fn check(&self, line: &str, passed_over: &mut PassedOver) -> Result<(), RecordError> {
        match self.quick.as_ref().is_some_and(|quick| (quick.takes)(line)) {
            true => Ok(()),
            false => self.by_the_rules(line, passed_over).map(drop),
        }
    }

    /// Reads an object, such as the row of a table, and checks all rules.
    pub fn read(
        &self,
        record: &Map<String, Value>,
        passed_over: &mut PassedOver,
    ) -> Result<Example, RecordError> {
        (self.read)(record, passed_over)
    }

    fn by_the_rules(&self, line: &str, passed_over: &mut PassedOver) -> Result<Example, RecordError> {
        let example = self.read(&fields::record(line)?, passed_over)?;
        if let Content::Conversation(conversation) = &example.content
            && has_json(conversation)
        {
            refuse_numbers(line, "record")?;
        }
        Ok(example)
    }
}

/// Whether templates get JSON values from the file.
fn has_json(Conversation { prompt, chosen, rejected, tools, chat_template_kwargs }: &Conversation) -> bool {
    let mut messages = [prompt, chosen, rejected].into_iter().flatten();
    tools.is_some()
        || chat_template_kwargs.is_some()
        || messages.any(|message| !message.tool_calls.is_empty())
}

/// Reads a line of any form.
pub fn parse(line: &str) -> Result<Example, RecordError> {
    Form::of(line).parse(line)
}

/// The conversation without its messages: tools, and further variables of the template.
fn around(record: &Map<String, Value>) -> Result<Conversation, RecordError> {
    Ok(Conversation {
        tools: columns::tools(record.get("tools"), "tools")?,
        chat_template_kwargs: columns::chat_template_kwargs(record)?,
        ..Conversation::default()
    })
}

/// Fails if a record of plain text has columns that only templates read.
fn refuse_around_text(record: &Map<String, Value>) -> Result<(), RecordError> {
    for key in ["tools", "chat_template_kwargs"] {
        if record.get(key).is_some_and(fields::is_set) {
            return super::broken(
                key,
                "plain text has no chat template, which would read it; write messages",
            );
        }
    }
    Ok(())
}

/// The value of a field, without null.
fn given<'r>(record: &'r Map<String, Value>, key: &str) -> Option<&'r Value> {
    record.get(key).filter(|value| !value.is_null())
}
