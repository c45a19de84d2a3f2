//! Finds a model: a local folder as it is, or a hub id downloaded into the Hugging Face cache.
//!
//! `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean everywhere else.

use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo};

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
    if looks_like_path(model) {
        return Err(Fault::input(format!("no model folder at {model}"))
            .hint("give an existing folder with config.json, or a hub id such as org/name"));
    }
    if std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| value == "1" || value.eq_ignore_ascii_case("true")) {
        return cached(model);
    }
    download(model)
}

/// Hub ids are `name` or `org/name`; everything else is meant as a path.
fn looks_like_path(model: &str) -> bool {
    model.starts_with(['.', '/', '~'])
        || model.matches('/').count() > 1
        || model.ends_with('/')
        || model.is_empty()
}

fn cached(model: &str) -> Result<PathBuf, Fault> {
    let config = Cache::from_env().repo(Repo::model(model.to_owned())).get("config.json");
    config.and_then(|path| path.parent().map(Path::to_owned)).ok_or_else(|| {
        Fault::unavailable(format!(
            "model {model} is not in the Hugging Face cache and HF_HUB_OFFLINE is set"
        ))
        .hint("download it once without HF_HUB_OFFLINE, or give a local folder")
    })
}

fn download(model: &str) -> Result<PathBuf, Fault> {
    let failed = |error: &ApiError| {
        Fault::unavailable(format!("cannot download model {model}: {error}"))
            .hint("check the id, the network and HF_TOKEN for gated models; or give a local folder")
    };
    let api = ApiBuilder::from_env()
        .with_token(std::env::var("HF_TOKEN").ok().or_else(|| Cache::from_env().token()))
        .with_progress(false)
        .build()
        .map_err(|error| failed(&error))?;
    let repo = api.model(model.to_owned());
    let config = repo.get("config.json").map_err(|error| failed(&error))?;
    let files = repo.info().map_err(|error| failed(&error))?.siblings;
    let names: Vec<&str> = files.iter().map(|file| file.rfilename.as_str()).collect();
    for name in names.iter().filter(|name| wanted(name)) {
        fetch(&repo, name).map_err(|error| failed(&error))?;
    }
    config
        .parent()
        .map(Path::to_owned)
        .ok_or_else(|| Fault::failed("the hub cache has no folder for the model"))
}

fn wanted(name: &str) -> bool {
    MODEL_COMPANIONS.contains(&name)
        || TOKENIZER_COMPANIONS.contains(&name)
        || name.starts_with("adapter_")
        || name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".index.json"))
}

fn fetch(repo: &ApiRepo, name: &str) -> Result<PathBuf, ApiError> {
    repo.get(name)
}

#[cfg(test)]
mod tests {
    use dyad_proto::ErrorCode;

    use super::*;

    #[test]
    fn a_missing_folder_is_not_taken_for_a_hub_id() {
        for path in ["./no/such", "/no/such", "runs/sft/final"] {
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
        assert!(!wanted("pytorch_model.bin") && !wanted("README.md"));
    }
}
