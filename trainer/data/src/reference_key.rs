//! Names a reference model, so that its log-probabilities can be kept: equal keys give equal numbers.

use std::io::Read;
use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Raised when the passes change what they round.
const ARITHMETIC: u32 = 1;
const MODEL_FILES: [&str; 2] = ["config.json", "adapter_config.json"];
const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// What a reference log-probability depends on beside the pair.
#[derive(Clone, Debug)]
pub struct ReferenceModel<'a> {
    /// Model folder, and the adapter folder on top of it where there is one.
    pub weights: Vec<&'a Path>,
    /// Folder of tokenizer and template.
    pub tokenizer: &'a Path,
    /// Precision and kind of device.
    pub arithmetic: String,
    /// Most tokens of a sequence.
    pub max_seq_length: usize,
}

impl ReferenceModel<'_> {
    /// SHA-256 over all of it, lower-case hex. Reads every file once.
    pub fn key(&self) -> Result<String, Fault> {
        let mut files: Vec<PathBuf> = TOKENIZER_FILES.iter().map(|name| self.tokenizer.join(name)).collect();
        for folder in &self.weights {
            files.extend(MODEL_FILES.iter().map(|name| folder.join(name)));
            files.extend(weight_files(folder)?);
        }
        files.retain(|file| file.is_file());
        let digests: Vec<[u8; 32]> =
            files.par_iter().map(|file| digest(file)).collect::<Result<_, Fault>>()?;
        let mut hash = Sha256::new();
        hash.update(format!("{ARITHMETIC} {} {}", self.arithmetic, self.max_seq_length));
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
    let mut file = std::fs::File::open(path).map_err(|error| unreadable(path, &error))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(|error| unreadable(path, &error))? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Fault {
    Fault::input(format!("cannot read {}: {error}", path.display())).hint("the model folder is incomplete")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_follows_every_file_and_setting_but_not_the_folders_place() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |dir: &Path, name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        for dir in [one.path(), other.path()] {
            for name in ["config.json", "model.safetensors", "tokenizer.json", "README.md"] {
                write(dir, name, name);
            }
        }
        let key = |dir: &Path, max_seq_length| {
            let arithmetic = "Float cpu".to_owned();
            ReferenceModel { weights: vec![dir], tokenizer: dir, arithmetic, max_seq_length }.key().unwrap()
        };
        let before = key(one.path(), 10);
        assert_eq!(before.len(), 64);
        assert_eq!(key(other.path(), 10), before);
        assert_ne!(key(one.path(), 11), before);
        write(other.path(), "README.md", "new");
        assert_eq!(key(other.path(), 10), before);
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            write(other.path(), name, "new");
            assert_ne!(key(other.path(), 10), before, "{name}");
            write(other.path(), name, name);
        }
        write(other.path(), "chat_template.jinja", "new");
        assert_ne!(key(other.path(), 10), before);
    }
}
