//! Finds a model: a local folder as it is, or a hub id downloaded into the Hugging Face cache.
//!
//! - [`settings`]: the environment, as huggingface_hub reads it.
//! - [`client`]: what is asked of the hub.
//! - [`cache`]: folders and files that huggingface_hub knows as well.
//! - [`names`]: what may become the name of a file here.

mod cache;
mod client;
pub mod names;
mod settings;

use std::path::{Path, PathBuf};

use dyad_proto::Fault;

use crate::alive;

use cache::Repository;
use client::{Client, Listing, Trouble};
use names::{is_plain_path, is_repo_id};
use settings::Settings;

/// What belongs to a model's weights. Absent ones are skipped.
pub const MODEL_COMPANIONS: [&str; 3] = ["config.json", "generation_config.json", "LICENSE"];

/// What belongs to a tokenizer: these are one set, and mean something only together.
pub const TOKENIZER_COMPANIONS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Folder of a tokenizer's other chat templates.
pub const OTHER_TEMPLATES: &str = "additional_chat_templates";

/// The local folder of `model`.
pub fn resolve(model: &str) -> Result<PathBuf, Fault> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if !is_repo_id(model) {
        return Err(Fault::input(format!("no model folder at {model}"))
            .hint("give an existing folder with config.json, or a hub id such as org/name"));
    }
    let settings = Settings::from_environment()?;
    let repository = Repository::new(&settings.cache, model);
    if let Some(variable) = settings.offline {
        return repository.complete().map_err(|missing| {
            Fault::unavailable(format!("model {model} {missing} and {variable} is set"))
                .hint(format!("download it once without {variable}, or give a local folder"))
        });
    }
    match download(model, &settings, &repository)? {
        Ok(folder) => Ok(folder),
        // As huggingface_hub does: what is there serves while the hub does not.
        Err(why) => match repository.complete() {
            Ok(folder) => {
                tracing::warn!(model, reason = why, "the hub cannot be asked: the cached model is used");
                Ok(folder)
            }
            Err(missing) => {
                Err(Fault::unavailable(format!("cannot download model {model}: {why}; it {missing}"))
                    .hint("check the id, the network and HF_TOKEN for gated models; or give a local folder"))
            }
        },
    }
}

/// Brings the cache up to date; the inner error says why the hub did not help.
fn download(
    model: &str,
    settings: &Settings,
    repository: &Repository,
) -> Result<Result<PathBuf, String>, Fault> {
    let client = Client::new(settings)?;
    match client.list(model).and_then(|listing| take(model, &client, repository, &listing)) {
        Ok(folder) => Ok(Ok(folder)),
        Err(Trouble::Unanswered(why) | Trouble::Slow(why)) => Ok(Err(why)),
        Err(Trouble::Beyond) => Ok(Err("a file is shorter than it said".into())),
        Err(Trouble::Wrong(what)) => {
            Err(Fault::failed(format!("model {model}: the hub's answer is not used: {what}"))
                .hint("HF_ENDPOINT says which hub is asked; a local folder needs none"))
        }
    }
}

fn take(
    model: &str,
    client: &Client<'_>,
    repository: &Repository,
    listing: &Listing,
) -> Result<PathBuf, Trouble> {
    if let Some(name) = listing.files().find(|name| !is_plain_path(name)) {
        return Err(Trouble::Wrong(format!("it lists a file {name:?}, which is no name of a file")));
    }
    for name in listing.files().filter(|name| wanted(name)) {
        alive::advance();
        if !repository.has(&listing.sha, name) {
            let file = client.describe(model, &listing.sha, name)?;
            repository.keep(&listing.sha, name, &file, &mut |to, kept| client.fetch(&file, to, kept))?;
        }
    }
    repository.point_to(&listing.sha)
}

/// Files of the folder itself; variants lie in folders of their own.
fn wanted(name: &str) -> bool {
    let weights = name.ends_with(".safetensors") || name.ends_with(".index.json");
    let other_template = name
        .strip_prefix(OTHER_TEMPLATES)
        .and_then(|rest| rest.strip_prefix('/'))
        .is_some_and(|file| !file.contains('/') && file.ends_with(".jinja"));
    MODEL_COMPANIONS.contains(&name)
        || TOKENIZER_COMPANIONS.contains(&name)
        || other_template
        || !name.contains('/') && (name.starts_with("adapter_") || name.starts_with("model") && weights)
}

#[cfg(test)]
mod tests {
    use dyad_proto::ErrorCode;

    use super::*;

    #[test]
    fn a_missing_folder_is_not_taken_for_a_hub_id() {
        for path in ["./no/such", "/no/such", "runs/sft/final", "no such", "no..such", "org/name/"] {
            let fault = resolve(path).unwrap_err();
            assert_eq!(
                (fault.code, fault.message),
                (ErrorCode::InvalidInput, format!("no model folder at {path}"))
            );
        }
    }

    #[test]
    fn weights_and_tokenizers_are_wanted_and_nothing_else() {
        assert!(wanted("model-00001-of-00002.safetensors") && wanted("model.safetensors.index.json"));
        assert!(!wanted("pytorch_model.bin") && !wanted("README.md") && !wanted("model/../x.safetensors"));
    }
}
