//! Names a reference model, so that its log-probabilities can be kept: equal keys and equal tokens give equal numbers. Tokenizer,
//! template, date and sequence limit decide the tokens alone, which each pair's own hash names.

use std::io::Read;
use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::alive;

/// Raised when the passes change what they round.
const ARITHMETIC: u32 = 1;
const MODEL_FILES: [&str; 3] = ["config.json", "adapter_config.json", "model.safetensors.index.json"];

/// What a reference log-probability depends on beside the pair's tokens.
#[derive(Clone, Debug)]
pub struct ReferenceModel<'a> {
    /// Model folder, and the adapter folder on top of it where there is one.
    pub weights: Vec<&'a Path>,
    /// Precision and kind of device.
    pub arithmetic: String,
}

impl ReferenceModel<'_> {
    /// SHA-256 over all of it, lower-case hex. Reads every file once.
    pub fn key(&self) -> Result<String, Fault> {
        let mut files: Vec<PathBuf> = Vec::new();
        for folder in &self.weights {
            files.extend(MODEL_FILES.iter().map(|name| folder.join(name)));
            files.extend(weight_files(folder)?);
        }
        files.retain(|file| file.is_file());
        let digests: Vec<[u8; 32]> =
            files.par_iter().map(|file| digest(file)).collect::<Result<_, Fault>>()?;
        let mut hash = Sha256::new();
        hash.update(format!("{ARITHMETIC} {}", self.arithmetic));
        for (file, digest) in files.iter().zip(digests) {
            hash.update(file.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update(digest);
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, Fault> {
    let entries = std::fs::read_dir(folder).map_err(|error| unreadable(folder, &error))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    Ok(files)
}

fn digest(path: &Path) -> Result<[u8; 32], Fault> {
    let mut file = dyad_proto::files::open(path).map_err(|error| unreadable(path, &error))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(|error| unreadable(path, &error))? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
        alive::advance();
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Fault {
    Fault::input(format!("cannot read {}: {error}", path.display())).hint("the model folder is incomplete")
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "model.safetensors.index.json";

    #[test]
    fn a_key_follows_every_file_and_setting_but_not_the_folders_place() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |dir: &Path, name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        for dir in [one.path(), other.path()] {
            for name in ["config.json", "model.safetensors", INDEX, "tokenizer.json", "README.md"] {
                write(dir, name, name);
            }
        }
        let key = |dir: &Path, arithmetic: &str| {
            ReferenceModel { weights: vec![dir], arithmetic: arithmetic.to_owned() }.key().unwrap()
        };
        let before = key(one.path(), "Float cpu");
        assert_eq!(before.len(), 64);
        assert_eq!(key(other.path(), "Float cpu"), before);
        assert_ne!(key(one.path(), "BFloat16 cpu"), before);
        // Tokens are not the model's business: each pair is kept by its own.
        for name in ["README.md", "tokenizer.json", "chat_template.jinja"] {
            write(other.path(), name, "new");
            assert_eq!(key(other.path(), "Float cpu"), before, "{name}");
        }
        // The index says which of the files count.
        for name in ["config.json", "model.safetensors", INDEX] {
            write(other.path(), name, "new");
            assert_ne!(key(other.path(), "Float cpu"), before, "{name}");
            write(other.path(), name, name);
        }
    }
}
