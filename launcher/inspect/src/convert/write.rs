//! One record in another form. Pure.

use dyad_proto::pairs::{Content, Conversation, Example, Json, Message, MessageContent, PlainText};
use dyad_proto::run_config::DatasetFormat;
use serde_json::{Map, Value, json};

/// A form to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target(DatasetFormat);

/// Names of the forms, those of `dataset_format`.
const NAMES: [(&str, DatasetFormat); 6] = [
    ("preference_openai", DatasetFormat::PreferenceOpenai),
    ("preference", DatasetFormat::Preference),
    ("unpaired_preference", DatasetFormat::UnpairedPreference),
    ("prompt_completion", DatasetFormat::PromptCompletion),
    ("messages", DatasetFormat::Messages),
    ("text", DatasetFormat::Text),
];

impl Target {
    /// The form of a name.
    pub fn parse(name: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(known, _)| *known == name).map(|(_, format)| Self(*format));
        found.ok_or_else(|| format!("expected one of {}", NAMES.map(|(name, _)| name).join(", ")))
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, format)| *format == self.0).map_or("", |(name, _)| name)
    }
}

/// What a record becomes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Written {
    /// Records of the other form; none if the whole record is lost.
    pub(super) records: Vec<Value>,
    /// What they do not say.
    pub(super) lost: Vec<String>,
}

/// Writes a record; the error says what the other form cannot say at all.
pub(super) fn record(example: &Example, target: Target) -> Result<Written, String> {
    let mut written = match target.0 {
        DatasetFormat::PreferenceOpenai => hosted(example)?,
        DatasetFormat::Preference | DatasetFormat::Auto => preference(example)?,
        DatasetFormat::UnpairedPreference => unpaired(example)?,
        DatasetFormat::PromptCompletion => answer(example, prompt_completion)?,
        DatasetFormat::Messages => answer(example, whole_conversation)?,
        DatasetFormat::Text => answer(example, whole_text)?,
    };
    if example.weight != 1.0 {
        for value in &mut written.records {
            value["weight"] = json!(example.weight);
        }
    }
    Ok(written)
}

const ONE_ANSWER: &str = "it has one answer, and a pair needs two";
const NO_PROMPT: &str = "it is one whole text or conversation, without a prompt of its own";
const NEEDS_TEMPLATE: &str = "it has messages, which become text only by a chat template";
const NO_MESSAGES: &str = "it is plain text, which has no messages";

fn one(value: Value) -> Written {
    Written { records: vec![value], lost: Vec::new() }
}

fn hosted(example: &Example) -> Result<Written, String> {
    let Content::Conversation(said) = &example.content else { return Err(NO_MESSAGES.into()) };
    if said.rejected.is_empty() {
        return Err(ONE_ANSWER.into());
    }
    let mut input = object(json!({ "messages": messages(&said.prompt) }));
    if let Some(tools) = &said.tools {
        input.insert("tools".into(), tools.value());
    }
    let mut written = one(json!({
        "input": input, "preferred_output": messages(&said.chosen), "non_preferred_output": messages(&said.rejected),
    }));
    if said.chat_template_kwargs.is_some() {
        written.lost.push("chat_template_kwargs".into());
    }
    Ok(written)
}

fn preference(example: &Example) -> Result<Written, String> {
    match &example.content {
        Content::Conversation(said) if said.rejected.is_empty() => Err(ONE_ANSWER.into()),
        Content::Conversation(said) => {
            let record = json!({
                "prompt": messages(&said.prompt), "chosen": messages(&said.chosen), "rejected": messages(&said.rejected),
            });
            Ok(one(with_tools(record, said)))
        }
        Content::Text(PlainText { prompt, chosen, rejected: Some(rejected) }) => Ok(one(
            json!({ "prompt": prompt.as_deref().unwrap_or_default(), "chosen": chosen, "rejected": rejected }),
        )),
        Content::Text(_) => Err(ONE_ANSWER.into()),
    }
}

/// A pair becomes two records, one desirable and one not.
fn unpaired(example: &Example) -> Result<Written, String> {
    let (desirable, undesirable) = match &example.content {
        Content::Conversation(said) => {
            let rejected = Conversation { chosen: said.rejected.clone(), ..said.clone() };
            let rejected = (!said.rejected.is_empty()).then_some(Content::Conversation(rejected));
            (example.content.clone(), rejected)
        }
        Content::Text(text) => {
            let other =
                |rejected: &String| Content::Text(PlainText { chosen: rejected.clone(), ..text.clone() });
            (example.content.clone(), text.rejected.as_ref().map(other))
        }
    };
    let labelled = |content: &Content, label: bool| {
        let mut record = prompt_completion(content)?;
        record["label"] = json!(label);
        Ok::<Value, String>(record)
    };
    let first = labelled(&desirable, example.label.unwrap_or(true))?;
    let second = undesirable.map(|content| labelled(&content, false)).transpose()?;
    let mut written = Written { records: std::iter::once(first).chain(second).collect(), lost: Vec::new() };
    if example.label.is_none() && written.records.len() == 1 {
        written.lost.push("that it has no label: true is written".into());
    }
    Ok(written)
}

/// Records with one answer: of a pair the preferred one, of labelled answers the desirable ones.
fn answer(example: &Example, write: fn(&Content) -> Result<Value, String>) -> Result<Written, String> {
    if example.label == Some(false) {
        return Ok(Written {
            records: Vec::new(),
            lost: vec!["the whole record, whose label is false".into()],
        });
    }
    let mut written = one(write(&example.content)?);
    let pair = match &example.content {
        Content::Conversation(said) => !said.rejected.is_empty(),
        Content::Text(text) => text.rejected.is_some(),
    };
    if pair {
        written.lost.push("the rejected output".into());
    }
    if example.label == Some(true) {
        written.lost.push("the label true".into());
    }
    Ok(written)
}

fn prompt_completion(content: &Content) -> Result<Value, String> {
    match content {
        Content::Conversation(said) if said.prompt.is_empty() => Err(NO_PROMPT.into()),
        Content::Conversation(said) => {
            let record = json!({ "prompt": messages(&said.prompt), "completion": messages(&said.chosen) });
            Ok(with_tools(record, said))
        }
        Content::Text(PlainText { prompt: Some(prompt), chosen, .. }) => {
            Ok(json!({ "prompt": prompt, "completion": chosen }))
        }
        Content::Text(_) => Err(NO_PROMPT.into()),
    }
}

/// In the form of messages every message of the assistant is trained, so those of the prompt get weight 0.
fn whole_conversation(content: &Content) -> Result<Value, String> {
    let Content::Conversation(said) = content else { return Err(NO_MESSAGES.into()) };
    let history = said.prompt.iter().map(|message| {
        let mut value = self::message(message);
        if message.is_trained() {
            value["weight"] = json!(0);
        }
        value
    });
    let all: Vec<Value> = history.chain(said.chosen.iter().map(message)).collect();
    Ok(with_tools(json!({ "messages": all }), said))
}

fn whole_text(content: &Content) -> Result<Value, String> {
    match content {
        Content::Text(PlainText { prompt: None, chosen, .. }) => Ok(json!({ "text": chosen })),
        Content::Text(_) => Err("it has a prompt, of which no token is trained, and all of a text is".into()),
        Content::Conversation(_) => Err(NEEDS_TEMPLATE.into()),
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

fn with_tools(mut record: Value, said: &Conversation) -> Value {
    let around = [("tools", &said.tools), ("chat_template_kwargs", &said.chat_template_kwargs)];
    for (key, json) in around {
        if let Some(json) = json {
            record[key] = json.value();
        }
    }
    record
}

fn messages(messages: &[Message]) -> Value {
    messages.iter().map(message).collect()
}

/// A message by the names of the hosted API. Arguments of calls become JSON text again, as there.
fn message(message: &Message) -> Value {
    let Message { role, content, reasoning, tool_calls, tool_call_id, name, weight } = message;
    let mut value = object(json!({ "role": role.name() }));
    let content = match content {
        None => Value::Null,
        Some(MessageContent::Text(text)) => json!(text),
        Some(MessageContent::Parts(parts)) => {
            parts.iter().map(|part| json!({ "type": "text", "text": part })).collect()
        }
    };
    value.insert("content".into(), content);
    let texts = [("reasoning_content", reasoning), ("tool_call_id", tool_call_id), ("name", name)];
    for (key, text) in texts {
        if let Some(text) = text {
            value.insert(key.into(), json!(text));
        }
    }
    if !tool_calls.is_empty() {
        value.insert("tool_calls".into(), tool_calls.iter().map(call).collect());
    }
    if let Some(weight) = weight {
        value.insert("weight".into(), json!(u8::from(*weight)));
    }
    Value::Object(value)
}

fn call(call: &Json) -> Value {
    let mut value = call.value();
    let function = if value.get("function").is_some() { &mut value["function"] } else { &mut value };
    if let Some(arguments) = function.get("arguments").filter(|arguments| !arguments.is_string()) {
        function["arguments"] = json!(arguments.to_string());
    }
    value
}

#[cfg(test)]
mod tests {
    use dyad_proto::pairs::forms;

    use super::*;

    fn converted(line: &str, name: &str) -> Result<(Vec<String>, Vec<String>), String> {
        let written = record(&forms::parse(line).unwrap(), Target::parse(name).unwrap())?;
        Ok((written.records.iter().map(Value::to_string).collect(), written.lost))
    }

    const HOSTED: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}],"tools":[{"type":"function","function":{"name":"f"}}]},"preferred_output":[{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{\"b\":1,\"a\":2}"}}]}],"non_preferred_output":[{"role":"assistant","content":"No"}],"weight":0.5}"#;

    /// Every pair of forms that can say a record says the same after two conversions.
    #[test]
    fn pairs_survive_a_way_through_the_other_form_of_pairs() {
        let (there, lost) = converted(HOSTED, "preference").unwrap();
        assert!(lost.is_empty());
        let (back, lost) = converted(&there[0], "preference_openai").unwrap();
        assert_eq!((back, lost), (vec![HOSTED.to_owned()], vec![]));
        let text = r#"{"prompt":"a","chosen":"b","rejected":"c"}"#;
        assert_eq!(converted(text, "preference").unwrap().0, [text]);
        assert_eq!(forms::parse(&there[0]), forms::parse(HOSTED));
    }

    #[test]
    fn a_pair_becomes_two_labelled_answers_and_one_answer_alone() {
        let text = r#"{"prompt":"a","chosen":"b","rejected":"c","weight":2}"#;
        let (records, lost) = converted(text, "unpaired_preference").unwrap();
        let expected = [
            r#"{"prompt":"a","completion":"b","label":true,"weight":2.0}"#,
            r#"{"prompt":"a","completion":"c","label":false,"weight":2.0}"#,
        ];
        assert_eq!(
            (records.iter().map(String::as_str).collect::<Vec<_>>(), lost),
            (expected.to_vec(), vec![])
        );
        let (records, lost) = converted(text, "prompt_completion").unwrap();
        assert_eq!(records, [r#"{"prompt":"a","completion":"b","weight":2.0}"#]);
        assert_eq!(lost, ["the rejected output"]);
        assert_eq!(converted(expected[0], "prompt_completion").unwrap().1, ["the label true"]);
        assert_eq!(
            converted(expected[1], "prompt_completion").unwrap(),
            (vec![], vec!["the whole record, whose label is false".to_owned()])
        );
    }

    #[test]
    fn history_is_not_trained_in_the_form_of_messages() {
        let line = r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}],"completion":[{"role":"assistant","content":"d"}]}"#;
        let expected = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0},{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#;
        assert_eq!(converted(line, "messages").unwrap().0, [expected]);
    }

    #[test]
    fn what_a_form_cannot_say_is_an_error() {
        let (text, chat) = (
            r#"{"prompt":"a","completion":"b"}"#,
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        );
        for (line, name, what) in [
            (text, "preference", ONE_ANSWER),
            (text, "messages", NO_MESSAGES),
            (text, "preference_openai", NO_MESSAGES),
            (text, "text", "of which no token is trained"),
            (chat, "preference", ONE_ANSWER),
            (chat, "prompt_completion", NO_PROMPT),
            (chat, "text", NEEDS_TEMPLATE),
            (r#"{"text":"a"}"#, "prompt_completion", NO_PROMPT),
        ] {
            assert!(converted(line, name).unwrap_err().contains(what), "{line} {name}");
        }
    }
}
