//! The chat template of a tokenizer folder, chosen as transformers chooses: template files take precedence over
//! tokenizer_config.json, and of several named templates the one called `default` is used.

use std::collections::BTreeMap;
use std::path::Path;

use dyad_proto::Fault;
use dyad_proto::pairs::{Message, Role};
use serde_json::{Map, Value};

use crate::files;
use crate::special::SpecialTokens;
use crate::template::{Cause, Given, Moment, Template, TemplateError};

const DEFAULT: &str = "default";

/// A template, and the file that it comes from.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    template: Template,
    origin: String,
    /// Names and texts of the special tokens, which templates can use as variables.
    special_tokens: Vec<(String, String)>,
    now: Moment,
}

impl ChatTemplate {
    pub(crate) fn load(
        dir: &Path,
        config: &Map<String, Value>,
        special: &SpecialTokens,
        now: Moment,
    ) -> Result<Self, Fault> {
        let (source, origin) = source(dir, config)?;
        let template = Template::parse(&source).map_err(|error| refused(&origin, &error))?;
        let special_tokens =
            special.named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect();
        Ok(Self { template, origin, special_tokens, now })
    }

    /// Renders a conversation, with `answer` as its last message.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        answer: Option<&Message>,
        add_generation_prompt: bool,
    ) -> Result<String, Fault> {
        let turns: Vec<(&str, &str)> = messages
            .iter()
            .chain(answer)
            .map(|message| (role_name(message.role), message.content.as_str()))
            .collect();
        let special = self.special_tokens.iter().map(|(name, text)| (name.as_str(), Given::Text(text)));
        let context: Vec<(&str, Given<'_>)> = special
            .chain([
                ("messages", Given::Messages(&turns)),
                ("tools", Given::None),
                ("documents", Given::None),
                ("add_generation_prompt", Given::Bool(add_generation_prompt)),
            ])
            .collect();
        self.template.render(&context, &self.now).map_err(|error| refused(&self.origin, &error))
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

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

/// Returns the source of the template, and the name of its file.
fn source(dir: &Path, config: &Map<String, Value>) -> Result<(String, String), Fault> {
    let mut named = BTreeMap::new();
    let file = dir.join("chat_template.jinja");
    if let Some(source) = files::text(&file)? {
        named.insert(DEFAULT.to_owned(), (source, file.display().to_string()));
    }
    additional(dir, &mut named)?;
    if named.is_empty() {
        from_config(dir, config, &mut named)?;
    }
    if let Some(chosen) = named.remove(DEFAULT) {
        return Ok(chosen);
    }
    let names: Vec<String> = named.into_keys().collect();
    if !names.is_empty() {
        return Err(Fault::input(format!(
            "the tokenizer in {} has several chat templates and none is called default: {}",
            dir.display(),
            names.join(", ")
        ))
        .hint("save the one to train with as chat_template.jinja"));
    }
    let hint = match dir.join("chat_template.json").exists() {
        true => "chat_template.json is read for processors only: save its template as chat_template.jinja",
        false => {
            "add chat_template.jinja, or `chat_template` in tokenizer_config.json; instruct models ship one"
        }
    };
    Err(Fault::input(format!("the tokenizer in {} has no chat template", dir.display())).hint(hint))
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
