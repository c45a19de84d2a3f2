//! Cache key of a reference model: equal keys and equal tokens give equal log-probabilities. Tokenizer, template, date and sequence
//! limit are not part of the key: they only affect the tokens, which each pair's own hash covers.

use std::io::Read;
use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use dyad_sources::alive;

/// Raise this when a change to the forward pass changes its rounding.
const ARITHMETIC: u32 = 1;
const MODEL_FILES: [&str; 3] = ["config.json", "adapter_config.json", "model.safetensors.index.json"];

/// Everything except the pair's tokens that a reference log-probability depends on.
#[derive(Clone, Debug)]
pub struct ReferenceModel<'a> {
    /// Model folder, then the adapter folder if there is one.
    pub weights: Vec<&'a Path>,
    /// Precision, kind of device, and weights of tokens.
    pub arithmetic: String,
}

impl ReferenceModel<'_> {
    /// SHA-256 over all fields and files, in lower-case hex. Reads every file once.
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
    fn keys_depend_on_every_file_and_setting_but_not_on_the_path() {
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
        // The key ignores tokenizer files: each pair's own hash covers its tokens.
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
