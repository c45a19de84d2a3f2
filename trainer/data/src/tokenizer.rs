//! Tokenizer and chat template of a model folder.

use std::path::Path;
use std::sync::OnceLock;

use chrono::NaiveDateTime;
use dyad_proto::{Fault, counted, plain};
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::chat_template::ChatTemplate;
use crate::files;
use crate::plain_text::Around;
use crate::quick::{Encoded, QuickEncoder};
use crate::rendered::{Chat, Marked, Rendered};
use crate::special::SpecialTokens;
use crate::template::Moment;
use crate::tokenizer_class::{Declared, broken};

/// Renders conversations with the chat template and turns text into ids.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    /// `None` if the tokenizer has parts that the quick encoder does not support.
    quick: Option<QuickEncoder>,
    template: ChatTemplate,
    stop_ids: Vec<u32>,
    /// Ids added to plain text; `None` if they depend on the text.
    around: Option<Around>,
    eos_token: Option<String>,
    pub(crate) reads: TemplateReads,
}

/// What the chat template reads (`template_reads.rs`), found out when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct TemplateReads {
    /// Whether a content may be a list of parts, by role.
    pub(crate) parts: [OnceLock<bool>; 4],
    pub(crate) argument_objects: OnceLock<bool>,
}

impl ChatTokenizer {
    /// Reads a folder as transformers' `AutoTokenizer` does. The folder `model` says which tokens end an answer; `now` is the date for
    /// templates.
    pub fn load(dir: &Path, model: &Path, now: NaiveDateTime) -> Result<Self, Fault> {
        let path = dir.join("tokenizer.json");
        let text = files::text(&path)?.ok_or_else(|| {
            Fault::input(format!("no tokenizer.json in {}", dir.display())).hint(
                "save the tokenizer with transformers' save_pretrained (fast tokenizers write tokenizer.json)",
            )
        })?;
        let json: Value = serde_json::from_str(&text).map_err(|error| broken(&path, &error))?;
        let config = files::object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        known(dir, &config)?;
        let family = files::object(&dir.join("config.json"))?.unwrap_or_default();
        let declared = Declared { dir, config: &config, model: &family, text: &text };
        let class = declared.class()?;
        let special = SpecialTokens::read(dir, &config, &json, class)?;
        let (mut tokenizer, warning) = declared.build(class, &json, special.text("unk_token"))?;
        if let Some(warning) = warning {
            tracing::warn!("{warning}");
        }
        // The run's max_seq_length limits the length, not the file.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        special.complete(&mut tokenizer);
        let stop_ids = stop_ids(model, &special, &tokenizer)?;
        Ok(Self {
            quick: QuickEncoder::of(&tokenizer),
            template: ChatTemplate::load(dir, &config, &special, Moment(now))?,
            around: Around::of(&tokenizer),
            eos_token: special.text("eos_token").map(str::to_owned),
            tokenizer,
            stop_ids,
            reads: TemplateReads::default(),
        })
    }

    /// Whether the source of the chat template has one of these words.
    pub(crate) fn mentions(&self, words: &[&str]) -> bool {
        self.template.mentions(words)
    }

    /// Text of a conversation with tools, tool calls, reasoning or variables.
    pub fn render_chat(&self, chat: &Chat<'_>) -> Result<String, Fault> {
        self.template.render_text(chat)
    }

    /// Text of a conversation, with the ranges that `{% generation %}` blocks write. Fails if such a block is within a macro or another
    /// construct in which transformers does not know its place.
    pub fn render_marked(&self, chat: &Chat<'_>) -> Result<Rendered, Fault> {
        self.template.render_marked(chat)
    }

    /// Whether the chat template has `{% generation %}` blocks; `with_tools` for conversations with tools, which may have another one.
    #[must_use]
    pub fn marks_generation(&self, with_tools: bool) -> bool {
        self.template.marks_generation(with_tools)
    }

    /// Ids of rendered text, and which of them generation blocks wrote, by transformers' rule: a token that only partly lies in such a
    /// range counts.
    pub fn encode_marked(&self, rendered: &Rendered) -> Result<Marked, Fault> {
        let encoding = self
            .tokenizer
            .encode(rendered.text.as_str(), false)
            .map_err(|error| Fault::input(format!("the tokenizer refuses a text: {error}")))?;
        let mut generated = vec![false; encoding.len()];
        for range in &rendered.generated {
            let last = rendered.text[..range.end].chars().next_back().map_or(0, char::len_utf8);
            let token = |at: usize| encoding.char_to_token(at, 0);
            let Some(first) = token(range.start) else { break };
            let end =
                token(range.end - last).filter(|&last| last > 0).map_or(generated.len(), |last| last + 1);
            generated.get_mut(first..end).into_iter().flatten().for_each(|mark| *mark = true);
        }
        Ok(Marked { ids: encoding.get_ids().to_vec(), generated })
    }

    /// Ids of rendered text. Adds no special tokens: the template has written them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Fault> {
        Ok(self.encode_like(text.to_owned(), None)?.ids)
    }

    /// Whether texts are encoded by the quick encoder, because it supports all parts of the tokenizer.
    #[must_use]
    pub fn is_quick(&self) -> bool {
        self.quick.is_some()
    }

    /// Ids of plain text, with the special tokens that the tokenizer adds.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, Fault> {
        let around = self.around.as_ref().ok_or_else(|| {
            Fault::input("the tokenizer's post_processor changes more than both ends of a text: plain text is not supported with it")
                .hint("write prompt, chosen and rejected as lists of messages")
        })?;
        Ok(around.put(&self.encode(text)?))
    }

    /// The token that ends a plain-text completion, as text.
    pub fn eos_token(&self) -> Result<&str, Fault> {
        self.eos_token.as_deref().ok_or_else(|| {
            Fault::input("the tokenizer has no eos_token, which ends the outputs of plain-text pairs")
                .hint("set eos_token in tokenizer_config.json, or write prompt, chosen and rejected as lists of messages")
        })
    }

    /// Like [`Self::encode`]; reuses the ids of the start that `text` shares with the earlier text `like`.
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

    /// Decodes ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Fault> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|error| Fault::failed(format!("cannot decode tokens: {error}")))
    }

    /// Decodes ids, special tokens included.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String, Fault> {
        self.tokenizer
            .decode(ids, false)
            .map_err(|error| Fault::failed(format!("cannot decode tokens: {error}")))
    }

    /// Fails if an id has no row in the model's embedding.
    pub fn check_known(&self, ids: impl IntoIterator<Item = u32>, embedding_rows: u32) -> Result<(), Fault> {
        let Some(id) = ids.into_iter().find(|&id| id >= embedding_rows) else { return Ok(()) };
        let token = self.tokenizer.id_to_token(id).unwrap_or_default();
        Err(Fault::input(format!(
            "token {token:?} has id {id}, but the model's embedding has only {}",
            counted(embedding_rows, "row")
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

    /// Texts of [`Self::stop_ids()`].
    #[must_use]
    pub fn stop_tokens(&self) -> Vec<String> {
        let text = |&id: &u32| self.tokenizer.id_to_token(id).unwrap_or_else(|| format!("id {id}"));
        self.stop_ids.iter().map(text).collect()
    }

    /// Whether an answer's ids end with one of [`Self::stop_ids()`]; white space may follow it.
    #[must_use]
    pub fn ends(&self, ids: &[u32]) -> bool {
        let last = ids.iter().rposition(|id| self.stop_ids.contains(id));
        last.is_some_and(|at| {
            let rest = self.tokenizer.decode(&ids[at + 1..], false);
            rest.is_ok_and(|rest| rest.trim().is_empty())
        })
    }
}

/// The `tokenizer_class` that a copy of the tokenizer's files without config.json needs, so that transformers builds the same tokenizer;
/// `None` if it needs no change.
pub fn class_without_model(dir: &Path) -> Result<Option<&'static str>, Fault> {
    let text = files::text(&dir.join("tokenizer.json"))?.unwrap_or_default();
    let config = files::object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let model = files::object(&dir.join("config.json"))?.unwrap_or_default();
    let class = |model| Declared { dir, config: &config, model, text: &text }.class();
    let (with, without) = (class(&model)?, class(&Map::new())?);
    Ok((with != without).then(|| with.name()))
}

/// Refuses keys of tokenizer_config.json that change ids in transformers and are not supported here.
fn known(dir: &Path, config: &Map<String, Value>) -> Result<(), Fault> {
    let file = dir.join("tokenizer_config.json");
    let refused = |key: &str, hint: &str| {
        Fault::input(format!("{}: {key} is not supported", file.display())).hint(hint)
    };
    if config.get("split_special_tokens").is_some_and(|value| value == true) {
        return Err(refused(
            "split_special_tokens = true",
            "set it to false, and look whether the template still does what it should",
        ));
    }
    if config.get("fix_mistral_regex").is_some_and(|value| value == true) {
        return Err(refused(
            "fix_mistral_regex = true",
            "save the tokenizer again with transformers' save_pretrained, which writes the corrected split into tokenizer.json",
        ));
    }
    let versions = config.get("fast_tokenizer_files").and_then(Value::as_array);
    if versions.is_some_and(|files| files.iter().any(|name| name != "tokenizer.json")) {
        return Err(refused(
            "fast_tokenizer_files",
            "save the tokenizer again with transformers' save_pretrained",
        ));
    }
    Ok(())
}

/// `eos_token_id` of generation_config.json, else of config.json, else the tokenizer's own.
fn stop_ids(model: &Path, special: &SpecialTokens, tokenizer: &Tokenizer) -> Result<Vec<u32>, Fault> {
    for name in ["generation_config.json", "config.json"] {
        let file = model.join(name);
        let json = files::object(&file)?.unwrap_or_default();
        match json.get("eos_token_id") {
            Some(Value::Array(ids)) => return ids.iter().map(|id| token_id(&file, id)).collect(),
            Some(Value::Null) | None => {}
            Some(id) => return Ok(vec![token_id(&file, id)?]),
        }
    }
    Ok(special.text("eos_token").and_then(|token| tokenizer.token_to_id(token)).into_iter().collect())
}

/// Reads a token id; fails if it does not fit, because truncating it would give another token's id.
fn token_id(file: &Path, id: &Value) -> Result<u32, Fault> {
    id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
        let shown = id.to_string();
        let what = format!("{}: eos_token_id = {}", file.display(), plain::quoted(&shown));
        Fault::input(format!("{what}: expected token ids from 0 to {}", u32::MAX)).hint(
            "write the id of the token that ends an answer, or remove the field for the tokenizer's own",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_token_ids_are_refused_with_their_value() {
        let id = |json: &str| token_id(Path::new("m/config.json"), &serde_json::from_str(json).unwrap());
        assert_eq!((id("0"), id("4294967295")), (Ok(0), Ok(u32::MAX)));
        for wrong in ["4294967296", "4294967297", "18446744073709551615", "-1", "1.5", "\"2\"", "null"] {
            let message = id(wrong).unwrap_err().message;
            assert!(
                message.starts_with(&format!("m/config.json: eos_token_id = {wrong}: expected")),
                "{message}"
            );
        }
    }
}
