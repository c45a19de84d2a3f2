//! Tokenizer and chat template of a model folder.

use std::path::Path;

use dyad_proto::Fault;
use dyad_proto::preference::{Message, Role};
use hf_chat_template::{ChatTemplate, Error as TemplateError, FixedClock, TokenField, TokenizerConfig};
use serde::ser::{Serialize, SerializeMap, Serializer};
use tokenizers::Tokenizer;

use crate::quick::{Encoded, QuickEncoder};

/// Renders conversations as the model expects them and turns text into ids.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    /// Where the tokenizer allows for one.
    quick: Option<QuickEncoder>,
    template: ChatTemplate,
    /// Names and texts that templates know beside the conversation.
    special_tokens: Vec<(&'static str, String)>,
    stop_ids: Vec<u32>,
}

impl ChatTokenizer {
    /// Reads `tokenizer.json` and the template from `chat_template.jinja` or `tokenizer_config.json`.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(Fault::input(format!("no tokenizer.json in {}", dir.display())).hint(
                "save the tokenizer with transformers' save_pretrained (fast tokenizers write tokenizer.json)",
            ));
        }
        let mut tokenizer = Tokenizer::from_file(&path)
            .map_err(|error| Fault::input(format!("{}: {error}", path.display())))?;
        // Length is the run's business (max_seq_length), never the file's.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        let config = tokenizer_config(dir)?;
        let stop_ids = stop_ids(dir, &config, &tokenizer);
        Ok(Self {
            quick: QuickEncoder::of(&tokenizer),
            template: template(dir, &config)?,
            special_tokens: special_tokens(&config),
            tokenizer,
            stop_ids,
        })
    }

    /// Text of a conversation, with the opening of the assistant's turn if asked for.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Fault> {
        self.render_turns(messages, None, add_generation_prompt)
    }

    /// Text of a conversation that ends with an answer.
    pub fn render_answered(&self, messages: &[Message], answer: &Message) -> Result<String, Fault> {
        self.render_turns(messages, Some(answer), false)
    }

    fn render_turns(
        &self,
        messages: &[Message],
        answer: Option<&Message>,
        add_generation_prompt: bool,
    ) -> Result<String, Fault> {
        let turns = messages.iter().chain(answer).map(Turn).collect();
        let context = Context { special_tokens: &self.special_tokens, turns, add_generation_prompt };
        self.template.render_context(&context).map_err(|error| {
            Fault::input(format!("the chat template refuses a conversation: {}", one_line(&error))).hint(
                "check the order of roles; some templates take no system message or insist on alternation",
            )
        })
    }

    /// Ids of rendered text. The template holds every special token: none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Fault> {
        Ok(self.encode_like(text.to_owned(), None)?.ids)
    }

    /// The same; `like` is a text that probably starts alike, and spares encoding what both start with.
    pub(crate) fn encode_like(&self, text: String, like: Option<&Encoded>) -> Result<Encoded, Fault> {
        let encoded = match &self.quick {
            Some(quick) => quick.encode(&self.tokenizer, text, like),
            None => self
                .tokenizer
                .encode_fast(text, false)
                .map(|encoding| Encoded::plain(encoding.get_ids().to_vec())),
        };
        encoded.map_err(|error| Fault::input(format!("the tokenizer refuses a text: {error}")))
    }

    /// Text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Fault> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|error| Fault::failed(format!("cannot decode tokens: {error}")))
    }

    /// Every id must have a row in the model's embedding: no other row would be the right one.
    pub fn check_known(&self, ids: impl IntoIterator<Item = u32>, embedding_rows: u32) -> Result<(), Fault> {
        let Some(id) = ids.into_iter().find(|&id| id >= embedding_rows) else { return Ok(()) };
        let token = self.tokenizer.id_to_token(id).unwrap_or_default();
        Err(Fault::input(format!(
            "token {token:?} has id {id}, but the model's embedding has only {embedding_rows} rows"
        ))
        .hint(
            "use the tokenizer that the model was trained with, or resize the embedding (transformers' resize_token_embeddings)",
        ))
    }

    /// Ids that end a generated answer.
    #[must_use]
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }
}

/// What a template is given: the same names in the same order as transformers gives.
struct Context<'a> {
    special_tokens: &'a [(&'static str, String)],
    turns: Vec<Turn<'a>>,
    add_generation_prompt: bool,
}

impl Serialize for Context<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, text) in self.special_tokens {
            map.serialize_entry(name, text)?;
        }
        map.serialize_entry("messages", &self.turns)?;
        map.serialize_entry("add_generation_prompt", &self.add_generation_prompt)?;
        map.end()
    }
}

/// A message as a map, not as a struct: templates may go through its keys.
struct Turn<'a>(&'a Message);

impl Serialize for Turn<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("role", role_name(self.0.role))?;
        map.serialize_entry("content", &self.0.content)?;
        map.end()
    }
}

fn special_tokens(config: &TokenizerConfig) -> Vec<(&'static str, String)> {
    let fields = [
        ("bos_token", &config.bos_token),
        ("eos_token", &config.eos_token),
        ("pad_token", &config.pad_token),
        ("unk_token", &config.unk_token),
    ];
    let text = |(name, field): (_, &Option<TokenField>)| Some((name, field.as_ref()?.as_str()?.to_owned()));
    fields.into_iter().filter_map(text).collect()
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

fn tokenizer_config(dir: &Path) -> Result<TokenizerConfig, Fault> {
    let path = dir.join("tokenizer_config.json");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            serde_json::from_str(&text).map_err(|error| Fault::input(format!("{}: {error}", path.display())))
        }
        Err(_) => Ok(TokenizerConfig::default()),
    }
}

fn template(dir: &Path, config: &TokenizerConfig) -> Result<ChatTemplate, Fault> {
    let file = dir.join("chat_template.jinja");
    let builder = match std::fs::read_to_string(&file) {
        Ok(source) => Ok(ChatTemplate::builder(&source).special_tokens_from(config)),
        Err(_) => ChatTemplate::builder_from_config(config),
    };
    let builder = builder.map_err(|_| {
        Fault::input(format!("the tokenizer in {} has no chat template", dir.display())).hint(
            "add chat_template.jinja, or `chat_template` in tokenizer_config.json; instruct models ship one",
        )
    })?;
    // One date per process: a template that prints today's date must not change under a run.
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    builder.clock(FixedClock::from_unix_secs(now as i64)).build().map_err(|error| {
        Fault::input(format!("the chat template in {} is broken: {}", dir.display(), one_line(&error)))
    })
}

fn one_line(error: &TemplateError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// `eos_token_id` of generation_config.json, else of config.json, else the tokenizer's own.
fn stop_ids(dir: &Path, config: &TokenizerConfig, tokenizer: &Tokenizer) -> Vec<u32> {
    let from_file = |name: &str| {
        let json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join(name)).ok()?).ok()?;
        match json.get("eos_token_id")? {
            serde_json::Value::Array(ids) => {
                Some(ids.iter().filter_map(|id| Some(id.as_u64()? as u32)).collect())
            }
            id => Some(vec![id.as_u64()? as u32]),
        }
    };
    let from_tokenizer = || {
        let eos = config.eos_token.as_ref().and_then(|token| token.as_str());
        eos.and_then(|token| tokenizer.token_to_id(token)).into_iter().collect()
    };
    from_file("generation_config.json").or_else(|| from_file("config.json")).unwrap_or_else(from_tokenizer)
}
