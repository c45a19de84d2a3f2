//! Finds a model: uses a local folder as it is, or downloads a hub id into the Hugging Face cache.
//!
//! - [`settings`]: environment variables, as huggingface_hub reads them.
//! - [`client`]: requests to the hub.
//! - [`cache`]: the cache folder, shared with huggingface_hub.
//! - [`datasets`]: files of data sets.
//! - [`names`]: checks of names that become file names.

mod cache;
mod client;
pub mod datasets;
pub mod names;
mod settings;

use std::path::{Path, PathBuf};

use dyad_proto::Fault;

use crate::alive;

use cache::Repository;
use client::{Client, HubError, Listing};
use names::{RepoKind, is_plain_path, is_repo_id};
use settings::Settings;

/// Files that belong to a model's weights. Absent files are skipped.
pub const MODEL_COMPANIONS: [&str; 3] = ["config.json", "generation_config.json", "LICENSE"];

/// Files of a tokenizer. They are one set: do not mix files of two tokenizers.
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

/// Folder of a tokenizer's additional chat templates.
pub const OTHER_TEMPLATES: &str = "additional_chat_templates";

/// The default revision.
pub const MAIN: &str = "main";

/// Returns the local folder of `model`, at the head of its main branch; downloads it if needed.
pub fn resolve(model: &str) -> Result<PathBuf, Fault> {
    resolve_at(model, MAIN)
}

/// Like [`resolve`], at a branch, tag or commit. A local folder is used as it is.
pub fn resolve_at(model: &str, revision: &str) -> Result<PathBuf, Fault> {
    if let Some(folder) = folder(model)? {
        return Ok(folder);
    }
    plain(revision)?;
    let settings = Settings::from_environment()?;
    let repository = Repository::new(&settings.cache, RepoKind::Model, model, revision);
    if let Some(variable) = settings.offline {
        return repository.complete().map_err(|missing| offline(model, &missing, variable));
    }
    match download(model, revision, &settings, &repository)? {
        Ok(folder) => Ok(folder),
        // As in huggingface_hub, use the cached model if the hub does not answer.
        Err(why) => match repository.complete() {
            Ok(folder) => {
                tracing::warn!(model, reason = why, "the hub cannot be asked: the cached model is used");
                Ok(folder)
            }
            Err(missing) => Err(unreachable_hub(model, &why, &missing)),
        },
    }
}

/// The folder of a model's tokenizer, templates and configuration: a local folder as it is, or those files of a hub id, without its weights.
pub fn tokenizer_folder(model: &str, revision: &str) -> Result<PathBuf, Fault> {
    if let Some(folder) = folder(model)? {
        return Ok(folder);
    }
    plain(revision)?;
    let settings = Settings::from_environment()?;
    let repository = Repository::new(&settings.cache, RepoKind::Model, model, revision);
    let missing = match repository.complete() {
        Ok(folder) => return Ok(folder),
        Err(missing) => missing,
    };
    if let Some(variable) = settings.offline {
        return Err(offline(model, &missing, variable));
    }
    let client = Client::new(&settings)?;
    let listing = client.list(RepoKind::Model, model, revision);
    // No branch points to these files: only a whole model counts as cached.
    let few = |name: &str| wanted(name) && !name.ends_with(".safetensors");
    let kept = listing.and_then(|listing| {
        keep(model, revision, &client, &repository, &listing, &few)?;
        Ok(repository.snapshot(&listing.sha))
    });
    kept.map_err(|trouble| match trouble {
        HubError::Unanswered(why) | HubError::Slow(why) => unreachable_hub(model, &why, &missing),
        HubError::Beyond => unreachable_hub(model, "a file is shorter than announced", &missing),
        HubError::Wrong(what) => wrong_answer(model, &what),
    })
}

/// Place of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// In this folder, of the user or of the cache.
    Here(PathBuf),
    /// Only on the hub.
    Remote {
        /// The text of its `config.json`; empty if there is none, as with adapters.
        config_json: String,
    },
}

/// Finds a model without downloading it; for a hub id that is not in the cache, fetches only `config.json`.
pub fn find(model: &str, revision: &str) -> Result<Found, Fault> {
    if let Some(folder) = folder(model)? {
        return Ok(Found::Here(folder));
    }
    plain(revision)?;
    let settings = Settings::from_environment()?;
    let repository = Repository::new(&settings.cache, RepoKind::Model, model, revision);
    let missing = match repository.complete() {
        Ok(folder) => return Ok(Found::Here(folder)),
        Err(missing) => missing,
    };
    if let Some(variable) = settings.offline {
        return Err(offline(model, &missing, variable));
    }
    let client = Client::new(&settings)?;
    let asked = client.list(RepoKind::Model, model, revision).and_then(|listing| {
        let has = |wanted: &str| listing.files().any(|name| name == wanted);
        let weights = listing.files().any(|name| !name.contains('/') && name.ends_with(".safetensors"));
        if !weights {
            return Ok(Err(Fault::input(format!("model {model} has no weights in the safetensors format"))
                .hint("load it with transformers and save it anew: save_pretrained writes safetensors")));
        }
        if !has("config.json") {
            return Ok(Ok(Found::Remote { config_json: String::new() }));
        }
        let file = client.describe((RepoKind::Model, model), revision, &listing.sha, "config.json")?;
        let fetch = &mut |to: &mut std::fs::File, kept| client.fetch(&file, to, kept);
        repository.keep(&listing.sha, "config.json", &file, fetch)?;
        let config_json = repository.text(&listing.sha, "config.json")?;
        Ok(Ok(Found::Remote { config_json }))
    });
    asked.unwrap_or_else(|trouble| {
        Err(match trouble {
            HubError::Unanswered(why) | HubError::Slow(why) => unreachable_hub(model, &why, &missing),
            HubError::Beyond => unreachable_hub(model, "a file is shorter than announced", &missing),
            HubError::Wrong(what) => wrong_answer(model, &what),
        })
    })
}

fn plain(revision: &str) -> Result<(), Fault> {
    match is_plain_path(revision) {
        true => Ok(()),
        false => Err(Fault::input(format!("revision {revision:?} is no name of a branch, tag or commit"))
            .hint("model_revision is what the hub's page of the model shows, such as main or v1.0")),
    }
}

/// Returns the folder of a local model, `None` for a hub id; fails if a path names no folder.
fn folder(model: &str) -> Result<Option<PathBuf>, Fault> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Some(path.to_owned()));
    }
    let hint = "give an existing folder with config.json, or a hub id such as org/name";
    if !is_repo_id(model) {
        return Err(Fault::input(format!("no model folder at {model}")).hint(hint));
    }
    // Do not ask the hub for a misspelt folder name.
    let Some((parent, name)) = model.split_once('/') else {
        return Err(Fault::input(format!("no model folder at {model}"))
            .hint(format!("{hint}{}", like(Path::new("."), model))));
    };
    match Path::new(parent).is_dir() {
        true => Err(Fault::input(format!("no folder {name} in {parent}")).hint(format!(
            "{model} is taken for a path, because the folder {parent} is there{}",
            like(Path::new(parent), name)
        ))),
        false => Ok(None),
    }
}

/// Suggests the folder with the most similar name; empty if none is similar.
fn like(parent: &Path, name: &str) -> String {
    let Ok(entries) = std::fs::read_dir(parent) else { return String::new() };
    let folders = entries.flatten().filter(|entry| entry.path().is_dir());
    let likeness = |other: &String| strsim::jaro_winkler(other, name);
    let closest = folders
        .filter_map(|entry| entry.file_name().into_string().ok())
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .filter(|other| likeness(other) > 0.8);
    closest.map_or_else(String::new, |other| format!("; did you mean {}?", parent.join(other).display()))
}

fn offline(model: &str, missing: &str, variable: &str) -> Fault {
    Fault::unavailable(format!("model {model} {missing} and {variable} is set"))
        .hint(format!("download it once without {variable}, or give a local folder"))
}

fn unreachable_hub(model: &str, why: &str, missing: &str) -> Fault {
    Fault::unavailable(format!("cannot download model {model}: {why}; it {missing}"))
        .hint("check the id, the network and HF_TOKEN for gated models; or give a local folder")
}

fn wrong_answer(model: &str, what: &str) -> Fault {
    Fault::failed(format!("model {model}: the hub's answer is not used: {what}"))
        .hint("HF_ENDPOINT says which hub is asked; a local folder needs none")
}

/// Updates the cache from the hub; the inner error says why the hub gave no usable answer.
fn download(
    model: &str,
    revision: &str,
    settings: &Settings,
    repository: &Repository,
) -> Result<Result<PathBuf, String>, Fault> {
    let client = Client::new(settings)?;
    let listing = client.list(RepoKind::Model, model, revision);
    match listing.and_then(|listing| take(model, revision, &client, repository, &listing)) {
        Ok(folder) => Ok(Ok(folder)),
        Err(HubError::Unanswered(why) | HubError::Slow(why)) => Ok(Err(why)),
        Err(HubError::Beyond) => Ok(Err("a file is shorter than announced".into())),
        Err(HubError::Wrong(what)) => Err(wrong_answer(model, &what)),
    }
}

fn take(
    model: &str,
    revision: &str,
    client: &Client<'_>,
    repository: &Repository,
    listing: &Listing,
) -> Result<PathBuf, HubError> {
    keep(model, revision, client, repository, listing, &wanted)?;
    repository.point_to(&listing.sha)
}

/// Downloads the files that are wanted and not here.
fn keep(
    model: &str,
    revision: &str,
    client: &Client<'_>,
    repository: &Repository,
    listing: &Listing,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(), HubError> {
    if let Some(name) = listing.files().find(|name| !is_plain_path(name)) {
        return Err(HubError::Wrong(format!("it lists a file {name:?}, which is no name of a file")));
    }
    for name in listing.files().filter(|name| wanted(name)) {
        alive::advance();
        if !repository.has(&listing.sha, name) {
            let file = client.describe((RepoKind::Model, model), revision, &listing.sha, name)?;
            repository.keep(&listing.sha, name, &file, &mut |to, kept| client.fetch(&file, to, kept))?;
        }
    }
    Ok(())
}

/// Whether to download a file: model, adapter and tokenizer files at the top level (subfolders hold variants), and chat templates.
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
    fn only_weights_and_tokenizer_files_are_downloaded() {
        assert!(wanted("model-00001-of-00002.safetensors") && wanted("model.safetensors.index.json"));
        assert!(!wanted("pytorch_model.bin") && !wanted("README.md") && !wanted("model/../x.safetensors"));
    }
}
