//! The Hugging Face cache, as huggingface_hub lays it out: contents by their tags in `blobs/`, links to them by commit and name in
//! `snapshots/`, and in `refs/` which commit a branch is.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use dyad_proto::{files, safe_file};
use sha2::{Digest, Sha256};

use super::client::{Description, Trouble};
use super::names::{is_plain_component, sha256};

/// One model in the cache.
#[derive(Debug)]
pub(super) struct Repository {
    dir: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, model: &str) -> Self {
        let name = format!("models--{}", model.replace('/', "--"));
        Self { dir: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The folder of the commit that main was last seen at, if it holds a model; the error says what is missing.
    pub(super) fn complete(&self) -> Result<PathBuf, String> {
        let absent = || "is not in the Hugging Face cache".to_owned();
        let commit = files::read_to_string(&self.dir.join("refs/main")).map_err(|_| absent())?;
        if !is_plain_component(commit.trim()) {
            return Err(absent());
        }
        let folder = self.snapshot(commit.trim());
        let has = |name: &str| folder.join(name).is_file();
        if !has("config.json") && !has("adapter_config.json") {
            return Err(absent());
        }
        match missing_shard(&folder) {
            Some(name) => Err(format!("is not whole in the Hugging Face cache ({name} is missing)")),
            None => Ok(folder),
        }
    }

    /// The file is there.
    pub(super) fn has(&self, commit: &str, name: &str) -> bool {
        self.snapshot(commit).join(name).is_file()
    }

    /// Puts a file into the commit's folder; `fetch` writes its content, unless another name has it already.
    pub(super) fn keep(
        &self,
        commit: &str,
        name: &str,
        file: &Description,
        fetch: &mut dyn FnMut(&mut File) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let failed = |error: io::Error| Trouble::Wrong(format!("cannot keep {name} in the cache: {error}"));
        let blobs = self.dir.join("blobs");
        for folder in [&blobs, &self.locks, &self.snapshot(commit)] {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        // Trainers of one machine ask for the same files at the same time.
        let lock = File::create(self.locks.join(format!("{}.lock", file.etag))).map_err(failed)?;
        // Where locks do not work the file is fetched twice, into a file of each one's own.
        let _ = rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive);
        let blob = blobs.join(&file.etag);
        if !blob.is_file() {
            let scratch = blobs.join(format!("{}.{}.incomplete", file.etag, std::process::id()));
            let fetched = fetched(&scratch, name, file, fetch);
            let placed = fetched.and_then(|()| fs::rename(&scratch, &blob).map_err(failed));
            if placed.is_err() {
                let _ = fs::remove_file(&scratch);
            }
            placed?;
        }
        let link = self.snapshot(commit).join(name);
        let _ = fs::remove_file(&link);
        link.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        let up = "../".repeat(name.matches('/').count() + 2);
        match std::os::unix::fs::symlink(format!("{up}blobs/{}", file.etag), &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Main is this commit, all of which is here; its folder.
    pub(super) fn point_to(&self, commit: &str) -> Result<PathBuf, Trouble> {
        let refs = self.dir.join("refs");
        let pointed = fs::create_dir_all(&refs)
            .and_then(|()| fs::create_dir_all(self.snapshot(commit)))
            .and_then(|()| safe_file::write(&refs.join("main"), commit.as_bytes()));
        match pointed {
            // A cache that cannot be written serves all the same.
            Ok(()) => Ok(self.snapshot(commit)),
            Err(_) if self.snapshot(commit).is_dir() => Ok(self.snapshot(commit)),
            Err(error) => {
                Err(Trouble::Wrong(format!("the cache {} cannot be written: {error}", refs.display())))
            }
        }
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }
}

/// Fetches a file and checks that it is what was announced.
fn fetched(
    scratch: &Path,
    name: &str,
    file: &Description,
    fetch: &mut dyn FnMut(&mut File) -> Result<(), Trouble>,
) -> Result<(), Trouble> {
    let failed = |error: io::Error| Trouble::Wrong(format!("cannot keep {name} in the cache: {error}"));
    tracing::info!(file = name, mib = file.size >> 20, "downloading");
    let mut to = safe_file::create(scratch).map_err(failed)?;
    fetch(&mut to)?;
    to.flush().and_then(|()| to.sync_all()).map_err(failed)?;
    match sha256(&file.etag) {
        Some(expected) if content_sha256(scratch).map_err(failed)? != expected => {
            Err(Trouble::Wrong(format!("{name} is not what its SHA-256 says ({expected})")))
        }
        _ => Ok(()),
    }
}

fn content_sha256(path: &Path) -> io::Result<String> {
    let (mut file, mut hash) = (files::open(path)?, Sha256::new());
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hash.update(&piece[..read]),
        }
    }
}

/// A file that the index of the weights names and that is not there.
fn missing_shard(folder: &Path) -> Option<String> {
    let index = files::read(&folder.join("model.safetensors.index.json")).ok()?;
    let index: serde_json::Value = serde_json::from_slice(&index).ok()?;
    let names = index.get("weight_map")?.as_object()?.values().filter_map(|name| name.as_str());
    names.filter(|name| !folder.join(name).is_file()).map(str::to_owned).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::client::described;

    fn keep(repository: &Repository, name: &str, etag: &str, content: &'static [u8]) -> Result<(), Trouble> {
        let file = described(etag, content.len() as u64);
        repository.keep("c0ffee", name, &file, &mut |to| {
            to.write_all(content).map_err(|error| Trouble::Wrong(error.to_string()))
        })
    }

    #[test]
    fn the_layout_is_huggingface_hubs() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "org/name");
        keep(&repository, "config.json", "tag", b"{}").unwrap();
        assert!(repository.complete().is_err(), "no branch points there yet");
        let folder = repository.point_to("c0ffee").unwrap();
        assert_eq!(repository.complete(), Ok(folder.clone()));
        let own = dir.path().join("models--org--name");
        assert_eq!(folder, own.join("snapshots/c0ffee"));
        assert_eq!(fs::read_link(folder.join("config.json")).unwrap(), Path::new("../../blobs/tag"));
        assert_eq!(fs::read_to_string(own.join("refs/main")).unwrap(), "c0ffee");
        assert_eq!(fs::read_dir(own.join("blobs")).unwrap().count(), 1);
    }

    #[test]
    fn a_content_that_is_not_what_its_tag_says_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "name");
        let right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let trouble = keep(&repository, "model.safetensors", right, b"other").unwrap_err();
        assert!(matches!(trouble, Trouble::Wrong(what) if what.contains("SHA-256")));
        assert_eq!(fs::read_dir(dir.path().join("models--name/blobs")).unwrap().count(), 0);
        keep(&repository, "model.safetensors", right, b"hello").unwrap();
        assert!(repository.has("c0ffee", "model.safetensors"));
    }

    #[test]
    fn half_a_model_is_not_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "name");
        keep(&repository, "config.json", "a", b"{}").unwrap();
        keep(
            &repository,
            "model.safetensors.index.json",
            "b",
            br#"{"weight_map":{"w":"model-1.safetensors"}}"#,
        )
        .unwrap();
        repository.point_to("c0ffee").unwrap();
        assert!(repository.complete().unwrap_err().contains("model-1.safetensors is missing"));
        keep(&repository, "model-1.safetensors", "c", b"").unwrap();
        assert!(repository.complete().is_ok());
    }
}
