//! The chat template of a tokenizer folder, chosen as transformers chooses: template files take precedence over
//! tokenizer_config.json, and of several named templates the one called `default` is used, or `tool_use` if there are tools.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use dyad_proto::Fault;
use serde_json::{Map, Value};

use crate::files;
use crate::rendered::{Chat, Rendered};
use crate::special::SpecialTokens;
use crate::template::{Cause, Given, Moment, Output, Template, TemplateError};

const DEFAULT: &str = "default";
/// The template for conversations with tools, if a tokenizer has one.
const TOOL_USE: &str = "tool_use";

/// Names that a conversation's own variables cannot have: transformers' functions have parameters of these names.
const RESERVED: [&str; 18] = [
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "conversations",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "self",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
];

/// Names of the field with a message's reasoning. The first one is what templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The templates of a tokenizer.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    default: Sourced,
    tool_use: Option<Sourced>,
    /// Names and texts of the special tokens, which templates can use as variables.
    special_tokens: Vec<(String, String)>,
    now: Moment,
}

/// A template, and the file that it comes from.
#[derive(Debug)]
struct Sourced {
    template: Template,
    source: String,
    origin: String,
}

impl Sourced {
    fn parse((source, origin): (String, String)) -> Result<Self, Fault> {
        let template = Template::parse(&source).map_err(|error| refused(&origin, &error))?;
        Ok(Self { template, source, origin })
    }
}

impl ChatTemplate {
    pub(crate) fn load(
        dir: &Path,
        config: &Map<String, Value>,
        special: &SpecialTokens,
        now: Moment,
    ) -> Result<Self, Fault> {
        let mut named = source(dir, config)?;
        let default = named.remove(DEFAULT).ok_or_else(|| no_default(dir, named.keys()))?;
        let special_tokens =
            special.named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect();
        Ok(Self {
            default: Sourced::parse(default)?,
            tool_use: named.remove(TOOL_USE).map(Sourced::parse).transpose()?,
            special_tokens,
            now,
        })
    }

    /// Renders a conversation, and finds the text that generation blocks write.
    pub(crate) fn render_marked(&self, chat: &Chat<'_>) -> Result<Rendered, Fault> {
        let (chosen, Output { text, generated }) = self.render_chat(chat)?;
        let generated = generated.map_err(|error| refused(&chosen.origin, &error))?;
        Ok(Rendered { text, generated })
    }

    /// Renders a conversation.
    pub(crate) fn render_text(&self, chat: &Chat<'_>) -> Result<String, Fault> {
        Ok(self.render_chat(chat)?.1.text)
    }

    /// Whether the template for this conversation has generation blocks.
    pub(crate) fn marks_generation(&self, with_tools: bool) -> bool {
        self.chosen(with_tools).template.marks_generation()
    }

    /// Whether the source of a template has one of these words.
    pub(crate) fn mentions(&self, words: &[&str]) -> bool {
        let sources = || std::iter::once(&self.default).chain(&self.tool_use);
        words.iter().any(|word| sources().any(|sourced| sourced.source.contains(word)))
    }

    fn chosen(&self, with_tools: bool) -> &Sourced {
        self.tool_use.as_ref().filter(|_| with_tools).unwrap_or(&self.default)
    }

    fn render_chat(&self, chat: &Chat<'_>) -> Result<(&Sourced, Output), Fault> {
        let messages = as_given(chat.messages)?;
        objects("documents", chat.documents)?;
        objects("tools", chat.tools)?;
        let variables = chat.variables.into_iter().flatten();
        if let Some((name, _)) = variables.clone().find(|(name, _)| RESERVED.contains(&name.as_str())) {
            return Err(Fault::input(format!("{name} cannot be set as a variable of the chat template"))
                .hint("the name belongs to transformers' apply_chat_template; write tools and documents in fields of their own"));
        }
        let given: Vec<(&str, Given<'_>)> = variables
            .map(|(name, value)| (name.as_str(), Given::Json(value)))
            .chain([
                ("messages", Given::List(&messages)),
                ("tools", chat.tools.map_or(Given::None, Given::Json)),
                ("documents", chat.documents.map_or(Given::None, Given::Json)),
                ("add_generation_prompt", Given::Bool(chat.add_generation_prompt)),
            ])
            .collect();
        let chosen = self.chosen(chat.tools.is_some());
        Ok((chosen, self.run(chosen, &given)?))
    }

    /// Renders with the special tokens as variables; `given` replaces those of the same name.
    fn run(&self, chosen: &Sourced, given: &[(&str, Given<'_>)]) -> Result<Output, Fault> {
        let special = self.special_tokens.iter().map(|(name, text)| (name.as_str(), Given::Text(text)));
        let context: Vec<(&str, Given<'_>)> = special.chain(given.iter().copied()).collect();
        chosen.template.render(&context, &self.now).map_err(|error| refused(&chosen.origin, &error))
    }
}

/// The messages as transformers gives them to a template: without fields that are null, and with the reasoning under the names that
/// templates read.
fn as_given(messages: &[Value]) -> Result<Cow<'_, [Value]>, Fault> {
    if messages.is_empty() {
        return Err(Fault::input("a conversation without messages cannot be rendered")
            .hint("write at least one message"));
    }
    let mut plain = true;
    for message in messages {
        let fields = message.as_object().ok_or_else(|| {
            Fault::input(format!("a message is {message}: expected an object"))
                .hint("write each message as an object with role and content")
        })?;
        plain = plain
            && !fields.iter().any(|(name, value)| value.is_null() || REASONING.contains(&name.as_str()));
    }
    if plain {
        return Ok(Cow::Borrowed(messages));
    }
    let fields = messages.iter().filter_map(Value::as_object);
    Ok(fields.map(|fields| Value::Object(with_reasoning(fields))).collect())
}

fn with_reasoning(fields: &Map<String, Value>) -> Map<String, Value> {
    let filled = fields.iter().filter(|(_, value)| !value.is_null());
    let Some(reasoning) =
        REASONING.iter().find_map(|name| fields.get(*name).filter(|value| !value.is_null()))
    else {
        return filled.map(|(name, value)| (name.clone(), value.clone())).collect();
    };
    // The order of the fields is transformers', too: a template may print a whole message.
    let mut made = Map::new();
    made.insert("thinking".to_owned(), reasoning.clone());
    made.extend(filled.map(|(name, value)| (name.clone(), value.clone())));
    made.insert("reasoning_content".to_owned(), reasoning.clone());
    made
}

/// Fails if a value is not a list of objects.
fn objects(what: &str, value: Option<&Value>) -> Result<(), Fault> {
    let is_list = |value: &Value| value.as_array().is_some_and(|items| items.iter().all(Value::is_object));
    match value {
        Some(value) if !is_list(value) => Err(Fault::input(format!("{what}: expected a list of objects"))
            .hint("chat templates take tools as JSON schemas, and documents as objects with title and text")),
        _ => Ok(()),
    }
}

fn refused(origin: &str, error: &TemplateError) -> Fault {
    match error.cause {
        Cause::Syntax => Fault::input(format!("the chat template in {origin} is broken: {error}"))
            .hint("jinja2 refuses it as well: correct the template"),
        Cause::Unsupported => Fault::input(format!("the chat template in {origin}: {error}"))
            .hint("write this part of the template another way; the conversation is not at fault"),
        Cause::Failed => Fault::input(format!("the chat template in {origin} fails: {error}"))
            .hint("transformers fails on this conversation as well: look at that line of the template"),
        Cause::Raised => {
            Fault::input(format!("the chat template refuses a conversation: {}", one_line(error))).hint(
                "check the order of roles; some templates take no system message or insist on alternation",
            )
        }
    }
}

fn one_line(error: &TemplateError) -> &str {
    error.message.lines().next().unwrap_or_default()
}

/// Returns the sources of the templates by their names, with the names of their files.
fn source(dir: &Path, config: &Map<String, Value>) -> Result<Named, Fault> {
    let mut named = BTreeMap::new();
    let file = dir.join("chat_template.jinja");
    if let Some(source) = files::text(&file)? {
        named.insert(DEFAULT.to_owned(), (source, file.display().to_string()));
    }
    additional(dir, &mut named)?;
    if named.is_empty() {
        from_config(dir, config, &mut named)?;
    }
    Ok(named)
}

fn no_default<'n>(dir: &Path, names: impl Iterator<Item = &'n String>) -> Fault {
    let names: Vec<&str> = names.map(String::as_str).collect();
    if !names.is_empty() {
        return Fault::input(format!(
            "the tokenizer in {} has several chat templates and none is called default: {}",
            dir.display(),
            names.join(", ")
        ))
        .hint("save the one to train with as chat_template.jinja");
    }
    let hint = match dir.join("chat_template.json").exists() {
        true => "chat_template.json is read for processors only: save its template as chat_template.jinja",
        false => {
            "add chat_template.jinja, or `chat_template` in tokenizer_config.json; instruct models ship one"
        }
    };
    Fault::input(format!("the tokenizer in {} has no chat template", dir.display())).hint(hint)
}

type Named = BTreeMap<String, (String, String)>;

fn additional(dir: &Path, named: &mut Named) -> Result<(), Fault> {
    let folder = dir.join("additional_chat_templates");
    if !folder.is_dir() {
        return Ok(());
    }
    let unreadable = |error: std::io::Error| {
        Fault::input(format!("cannot read {}: {error}", folder.display()))
            .hint("make it a folder that this user may read, or remove it")
    };
    for entry in std::fs::read_dir(&folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".jinja")
            && let Some(source) = files::text(&path)?
        {
            named.insert(name.to_owned(), (source, path.display().to_string()));
        }
    }
    Ok(())
}

fn from_config(dir: &Path, config: &Map<String, Value>, named: &mut Named) -> Result<(), Fault> {
    let file = dir.join("tokenizer_config.json");
    let wrong = || {
        Fault::input(format!("{}: chat_template: expected a text or named templates", file.display()))
            .hint("save the tokenizer again with transformers' save_pretrained")
    };
    let mut put = |name: &str, source: Option<&Value>| {
        let source = source.and_then(Value::as_str).ok_or_else(wrong)?.to_owned();
        named.insert(name.to_owned(), (source, file.display().to_string()));
        Ok(())
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(()),
        Some(source @ Value::String(_)) => put(DEFAULT, Some(source)),
        Some(Value::Object(all)) => all.iter().try_for_each(|(name, source)| put(name, Some(source))),
        Some(Value::Array(all)) => all.iter().try_for_each(|one| {
            let name = one.get("name").and_then(Value::as_str).ok_or_else(wrong)?;
            put(name, one.get("template"))
        }),
        Some(_) => Err(wrong()),
    }
}
