//! Special tokens and added tokens, from all the files that transformers 5.23 reads them from
//! (`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`).

use std::path::Path;

use dyad_proto::Fault;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use crate::files;
use crate::tokenizer_class::TokenizerClass;

const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Fields of special tokens without names, and of special tokens with model-specific names.
const EXTRA: &str = "extra_special_tokens";
const SPECIFIC: &str = "model_specific_special_tokens";

/// Special and added tokens, for templates and the tokenizer.
#[derive(Debug)]
pub(crate) struct SpecialTokens {
    /// Named tokens, in transformers' order; templates can use the names.
    pub(crate) named: Vec<(String, AddedToken)>,
    /// Special tokens without names.
    extra: Vec<AddedToken>,
    /// Added tokens of the configuration, in the order of their ids.
    listed: Vec<AddedToken>,
    class: TokenizerClass,
}

impl SpecialTokens {
    /// Reads the tokens; `config` is tokenizer_config.json, `tokenizer` is tokenizer.json.
    pub(crate) fn read(
        dir: &Path,
        config: &Map<String, Value>,
        tokenizer: &Value,
        class: TokenizerClass,
    ) -> Result<Self, Fault> {
        let mut config = config.clone();
        let file = dir.join("tokenizer_config.json");
        let spare = !config.get(EXTRA).is_some_and(filled);
        rename_additional(&mut config, spare);
        gather_specific(&mut config);
        let mut listed: Vec<(u64, AddedToken)> = Vec::new();
        match config.get("added_tokens_decoder") {
            Some(decoder) => {
                for (id, value) in decoder.as_object().into_iter().flatten() {
                    let id =
                        id.parse().map_err(|_| wrong(&file, "added_tokens_decoder", "an id is no number"))?;
                    listed.push((id, whole(&file, "added_tokens_decoder", value)?));
                }
            }
            None => {
                merge_map(dir, &mut config)?;
                legacy(dir, &config, &mut listed)?;
                for value in tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
                    let id = value.get("id").and_then(Value::as_u64).unwrap_or_default();
                    let token = whole(&dir.join("tokenizer.json"), "added_tokens", value)?;
                    listed.retain(|(known, _)| *known != id);
                    listed.push((id, token));
                }
            }
        }
        listed.sort_by_key(|(id, _)| *id);
        let listed: Vec<AddedToken> = listed.into_iter().map(|(_, token)| token).collect();
        for (name, token) in class.defaults() {
            config.entry(*name).or_insert_with(|| token.map_or(Value::Null, Value::from));
        }
        if !config.contains_key("pad_token")
            && let Some(pad) = tokenizer.pointer("/padding/pad_token").and_then(Value::as_str)
        {
            config.insert("pad_token".to_owned(), pad.into());
        }
        let spare = !config.contains_key(EXTRA);
        rename_additional(&mut config, spare);
        let mut tokens = Self { named: Vec::new(), extra: Vec::new(), listed, class };
        tokens.take(&file, &config)?;
        Ok(tokens)
    }

    fn take(&mut self, file: &Path, config: &Map<String, Value>) -> Result<(), Fault> {
        for name in STANDARD {
            match config.get(name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    let token = entry(file, name, value)?;
                    let known = self.listed.iter().rev().find(|listed| listed.content == token.content);
                    let token = known.cloned().unwrap_or(token);
                    self.named.push((name.to_owned(), token));
                }
            }
        }
        for (name, value) in config {
            let is_token = value.is_string() || value.get("__type").is_some_and(|kind| kind == "AddedToken");
            if is_own_name(name) && is_token {
                self.name(name, entry(file, name, value)?);
            }
        }
        match config.get(SPECIFIC) {
            Some(Value::Object(specific)) => {
                for (name, value) in specific {
                    self.name(name, entry(file, name, value)?);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => return Err(wrong(file, SPECIFIC, "expected an object")),
        }
        match config.get(EXTRA) {
            Some(Value::Array(extra)) => {
                for value in extra {
                    self.extra.push(entry(file, EXTRA, value)?);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => return Err(wrong(file, EXTRA, "expected a list or an object")),
        }
        Ok(())
    }

    fn name(&mut self, name: &str, token: AddedToken) {
        match self.named.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = token,
            None => self.named.push((name.to_owned(), token)),
        }
    }

    /// Text of a named token.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(known, _)| known == name).map(|(_, token)| token.content.as_str())
    }

    /// Adds all missing tokens to the tokenizer, as transformers does when it loads.
    pub(crate) fn complete(&self, tokenizer: &mut Tokenizer) {
        let known = tokenizer.get_added_tokens_decoder();
        let same = |one: &AddedToken, other: &AddedToken| {
            (&one.content, one.special) == (&other.content, other.special)
                && (one.single_word, one.lstrip, one.rstrip)
                    == (other.single_word, other.lstrip, other.rstrip)
                && one.normalized == other.normalized
        };
        let mut missing: Vec<AddedToken> = self
            .listed
            .iter()
            .filter(|token| !known.values().any(|known| same(known, token)))
            .cloned()
            .collect();
        for token in self.named.iter().map(|(_, token)| token).chain(&self.extra) {
            let has = |other: &AddedToken| other.content == token.content;
            if !known.values().any(has) && !missing.iter().any(has) {
                missing.push(token.clone());
            }
        }
        for token in &mut missing {
            token.special |= self.named.iter().any(|(_, named)| named.content == token.content);
        }
        tokenizer.add_tokens(&missing);
        let all = self.named.iter().map(|(_, token)| token).chain(&self.extra);
        let again: Vec<AddedToken> = all.filter_map(|token| self.class.added_again(token)).collect();
        tokenizer.add_tokens(&again);
    }
}

/// Whether this is the name of a token, but not of a standard one.
fn is_own_name(name: &str) -> bool {
    name.ends_with("_token") && !STANDARD.contains(&name)
}

/// If `spare`, moves the field `additional_special_tokens` to its new name `extra_special_tokens`.
fn rename_additional(config: &mut Map<String, Value>, spare: bool) {
    if spare && let Some(additional) = config.remove("additional_special_tokens") {
        config.insert(EXTRA.to_owned(), additional);
    }
}

/// Collects model-specific named tokens of tokenizer_config.json. As in transformers, they replace an existing list of such tokens.
fn gather_specific(config: &mut Map<String, Value>) {
    let own =
        |(name, value): (&String, &Value)| (is_own_name(name) && value.is_string()).then(|| name.clone());
    let names: Vec<String> = config.iter().filter_map(own).collect();
    let mut specific: Map<String, Value> =
        names.into_iter().filter_map(|name| config.remove(&name).map(|value| (name, value))).collect();
    if let Some(Value::Object(_)) = config.get(EXTRA)
        && let Some(Value::Object(extra)) = config.remove(EXTRA)
    {
        specific.extend(extra);
    }
    if !specific.is_empty() {
        config.insert(SPECIFIC.to_owned(), specific.into());
    }
}

/// Overrides fields of tokenizer_config.json with special_tokens_map.json; used only if the former lists no added tokens.
fn merge_map(dir: &Path, config: &mut Map<String, Value>) -> Result<(), Fault> {
    let file = dir.join("special_tokens_map.json");
    for (name, mut value) in files::object(&file)?.unwrap_or_default() {
        match &mut value {
            Value::Object(tokens) if name == EXTRA => {
                for (name, token) in tokens {
                    entry(&file, name, token)?;
                }
            }
            token @ Value::Object(_) => {
                special(token);
                entry(&file, &name, token)?;
            }
            Value::Array(more) if name == EXTRA => {
                let mut all = config.get(EXTRA).and_then(Value::as_array).cloned().unwrap_or_default();
                for mut token in more.drain(..) {
                    special(&mut token);
                    entry(&file, EXTRA, &token)?;
                    if !all.contains(&token) {
                        all.push(token);
                    }
                }
                value = all.into();
            }
            Value::Array(tokens) => {
                for token in tokens {
                    entry(&file, &name, token)?;
                }
            }
            _ => {}
        }
        config.insert(name, value);
    }
    if let Some(Value::Object(_)) = config.get(EXTRA)
        && let Some(Value::Object(extra)) = config.remove(EXTRA)
    {
        let specific = config.entry(SPECIFIC).or_insert_with(|| Map::new().into());
        specific.as_object_mut().ok_or_else(|| wrong(&file, SPECIFIC, "expected an object"))?.extend(extra);
    }
    Ok(())
}

fn special(token: &mut Value) {
    if let Value::Object(fields) = token {
        fields.insert("__type".to_owned(), "AddedToken".into());
        fields.insert("special".to_owned(), true.into());
    }
}

/// Reads added_tokens.json of old tokenizers.
fn legacy(dir: &Path, config: &Map<String, Value>, listed: &mut Vec<(u64, AddedToken)>) -> Result<(), Fault> {
    let file = dir.join("added_tokens.json");
    let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    let named = STANDARD.iter().filter_map(|name| config.get(*name));
    let extra = config.get(EXTRA).and_then(Value::as_array).into_iter().flatten();
    let special: Vec<String> = named.chain(extra).filter_map(text).collect();
    for (content, id) in files::object(&file)?.unwrap_or_default() {
        let id = id.as_u64().ok_or_else(|| wrong(&file, &content, "expected the id of the token"))?;
        let special = special.contains(&content);
        listed.push((id, AddedToken { special, normalized: !special, content, ..AddedToken::default() }));
    }
    Ok(())
}

fn filled(value: &Value) -> bool {
    match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
        Value::Null => false,
        _ => true,
    }
}

fn wrong(file: &Path, field: &str, why: &str) -> Fault {
    Fault::input(format!("{}: {field}: {why}", file.display()))
        .hint("save the tokenizer again with transformers' save_pretrained")
}

/// Reads a token that is a string or transformers' `AddedToken` object.
fn entry(file: &Path, field: &str, value: &Value) -> Result<AddedToken, Fault> {
    if let Value::String(text) = value {
        return Ok(AddedToken::from(text.clone(), true));
    }
    if value.get("__type").is_none_or(|kind| kind != "AddedToken") {
        return Err(wrong(file, field, "expected a text, or an object with \"__type\": \"AddedToken\""));
    }
    whole(file, field, value)
}

fn whole(file: &Path, field: &str, value: &Value) -> Result<AddedToken, Fault> {
    let content = value.get("content").and_then(Value::as_str);
    let content = content.ok_or_else(|| wrong(file, field, "a token without content"))?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    Ok(AddedToken {
        content: content.to_owned(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}
