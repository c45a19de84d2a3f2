//! The Hugging Face cache, in huggingface_hub's layout: file contents named by ETag in `blobs/`, links to them by commit and file name in
//! `snapshots/`, and the commit of each branch or tag in `refs/`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use dyad_proto::{files, safe_file};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::alive;

use super::client::{Description, HubError};
use super::names::{RepoKind, is_plain_component, sha256};

/// Appends the missing rest of a file; the number is the length that is already there, in bytes.
pub(super) type Fetch<'a> = dyn FnMut(&mut File, u64) -> Result<(), HubError> + 'a;

/// Time between two attempts to lock a file.
const PAUSE: Duration = Duration::from_millis(100);
/// Time between two updates of a file's modification time, as a progress signal for waiting processes.
const TOLD: Duration = Duration::from_secs(1);

/// One repository in the cache.
#[derive(Debug)]
pub(super) struct Repository {
    dir: PathBuf,
    locks: PathBuf,
    /// The requested branch, tag or commit.
    revision: String,
}

impl Repository {
    pub(super) fn new(cache: &Path, kind: RepoKind, name: &str, revision: &str) -> Self {
        let name = format!("{}--{}", kind.name(), name.replace('/', "--"));
        let revision = revision.to_owned();
        Self { dir: cache.join(&name), locks: cache.join(".locks").join(name), revision }
    }

    /// The commit that the revision pointed to when it was last downloaded.
    fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let commit = files::read_to_string(&self.dir.join("refs").join(&self.revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_plain_component(commit))
    }

    /// The folder of [`Self::commit`] if it holds a complete model or adapter; the error says what is missing.
    pub(super) fn complete(&self) -> Result<PathBuf, String> {
        let absent = || "is not in the Hugging Face cache".to_owned();
        let folder = self.snapshot(&self.commit().ok_or_else(absent)?);
        let has = |name: &str| folder.join(name).is_file();
        if !has("config.json") && !has("adapter_config.json") {
            return Err(absent());
        }
        match missing_shard(&folder) {
            Some(name) => Err(format!("is not whole in the Hugging Face cache ({name} is missing)")),
            None => Ok(folder),
        }
    }

    /// Whether the commit's folder has the file.
    pub(super) fn has(&self, commit: &str, name: &str) -> bool {
        self.snapshot(commit).join(name).is_file()
    }

    /// Reads a text file of the commit.
    pub(super) fn text(&self, commit: &str, name: &str) -> Result<String, HubError> {
        files::read_to_string(&self.snapshot(commit).join(name))
            .map_err(|error| HubError::Wrong(format!("its {name} cannot be read: {error}")))
    }

    /// Puts a file into the commit's folder; calls `fetch` for its content unless the cache has it already.
    pub(super) fn keep(
        &self,
        commit: &str,
        name: &str,
        file: &Description,
        fetch: &mut Fetch<'_>,
    ) -> Result<(), HubError> {
        let failed = |error: io::Error| HubError::Wrong(format!("cannot keep {name} in the cache: {error}"));
        let blobs = self.dir.join("blobs");
        for folder in [&blobs, &self.locks, &self.snapshot(commit)] {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        // Trainers on one machine download the same files at the same time.
        let lock = File::create(self.locks.join(format!("{}.lock", file.etag))).map_err(failed)?;
        let partial = blobs.join(format!("{}.incomplete", file.etag));
        let locked = take(&lock, &partial);
        let blob = blobs.join(&file.etag);
        if !blob.is_file() {
            let scratch = match locked {
                true => partial,
                // Locks do not work here: each process downloads into its own file.
                false => blobs.join(format!("{}.{}.incomplete", file.etag, std::process::id())),
            };
            // Resume only files with a checksum: only it can tell that the old and the new part belong together.
            let goes_on = locked && sha256(&file.etag).is_some();
            let fetched = fetched(&scratch, goes_on, name, file, fetch);
            let placed = fetched.and_then(|()| fs::rename(&scratch, &blob).map_err(failed));
            match &placed {
                Err(HubError::Unanswered(_) | HubError::Slow(_)) if goes_on => {}
                Err(_) => drop(fs::remove_file(&scratch)),
                Ok(()) => {}
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

    /// Records that the revision is this commit, after all its files are here; returns the commit's folder.
    pub(super) fn point_to(&self, commit: &str) -> Result<PathBuf, HubError> {
        let refs = self.dir.join("refs").join(&self.revision);
        let made = refs.parent().map_or(Ok(()), fs::create_dir_all);
        let pointed = made.and_then(|()| fs::create_dir_all(self.snapshot(commit))).and_then(|()| {
            // A revision that is itself a commit needs no ref.
            if self.revision == commit { Ok(()) } else { safe_file::write(&refs, commit.as_bytes()) }
        });
        match pointed {
            // A read-only cache that has the folder is good enough.
            Ok(()) => Ok(self.snapshot(commit)),
            Err(_) if self.snapshot(commit).is_dir() => Ok(self.snapshot(commit)),
            Err(error) => {
                Err(HubError::Wrong(format!("the cache {} cannot be written: {error}", refs.display())))
            }
        }
    }

    /// The folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }
}

/// Whether a revision is a commit: forty hexadecimal digits.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Waits for the lock on a file that another process may be downloading. Signals progress while that download makes progress. Returns
/// false if the file system has no locks.
fn take(lock: &File, partial: &Path) -> bool {
    let mut seen = None;
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return true,
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(_) => return false,
        }
        let now = fs::metadata(partial).and_then(|about| Ok((about.len(), about.modified()?))).ok();
        if now != seen {
            seen = now;
            alive::advance();
        }
        std::thread::sleep(PAUSE);
    }
}

/// Fetches a file or its missing rest, and checks its SHA-256 if the ETag is one.
fn fetched(
    scratch: &Path,
    goes_on: bool,
    name: &str,
    file: &Description,
    fetch: &mut Fetch<'_>,
) -> Result<(), HubError> {
    let failed = |error: io::Error| HubError::Wrong(format!("cannot keep {name} in the cache: {error}"));
    let open = if goes_on { safe_file::append } else { safe_file::create };
    let mut to = open(scratch).map_err(failed)?;
    let mut kept = to.metadata().map_err(failed)?.len();
    loop {
        if kept > file.size {
            to.set_len(0).map_err(failed)?;
            kept = 0;
        }
        tracing::info!(file = name, mib = file.size >> 20, kept_mib = kept >> 20, "downloading");
        fetch(&mut to, kept)?;
        to.flush().and_then(|()| to.sync_all()).map_err(failed)?;
        match sha256(&file.etag) {
            Some(expected) if content_sha256(scratch).map_err(failed)? != expected => {
                if kept == 0 {
                    return Err(HubError::Wrong(format!("{name} is not what its SHA-256 says ({expected})")));
                }
                tracing::warn!(
                    file = name,
                    "the partial file of an earlier download is damaged: starting again"
                );
                to.set_len(0).map_err(failed)?;
                kept = 0;
            }
            _ => return Ok(()),
        }
    }
}

fn content_sha256(path: &Path) -> io::Result<String> {
    let (mut file, mut hash) = (files::open(path)?, Sha256::new());
    let mut piece = vec![0; 1 << 20];
    let mut told = Instant::now();
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hash.update(&piece[..read]),
        }
        alive::advance();
        // A progress signal for processes that wait for the lock. They also wait without it.
        if told.elapsed() > TOLD {
            told = Instant::now();
            let _ = file.set_modified(SystemTime::now());
        }
    }
}

/// Name of a missing file that the index of the weights lists.
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

    fn keep(repository: &Repository, name: &str, etag: &str, content: &'static [u8]) -> Result<(), HubError> {
        let file = described(etag, content.len() as u64);
        repository.keep("c0ffee", name, &file, &mut |to, _| {
            to.write_all(content).map_err(|error| HubError::Wrong(error.to_string()))
        })
    }

    #[test]
    fn the_cache_layout_matches_huggingface_hub() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), RepoKind::Model, "org/name", "main");
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
    fn revisions_coexist_and_a_commit_needs_no_ref() {
        let dir = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (revision, reference) in [("main", true), ("refs/pr/1", true), (commit, false)] {
            let repository = Repository::new(dir.path(), RepoKind::Model, "org/name", revision);
            assert!(repository.complete().is_err(), "{revision}");
            let folder = repository.point_to(commit).unwrap();
            fs::write(folder.join("config.json"), "{}").unwrap();
            fs::write(folder.join("model.safetensors"), "").unwrap();
            assert_eq!(repository.complete().unwrap(), folder, "{revision}");
            assert_eq!(repository.dir.join("refs").join(revision).exists(), reference);
            fs::remove_dir_all(&folder).unwrap();
        }
    }

    #[test]
    fn content_that_does_not_match_its_sha256_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), RepoKind::Model, "name", "main");
        let right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let trouble = keep(&repository, "model.safetensors", right, b"other").unwrap_err();
        assert!(matches!(trouble, HubError::Wrong(what) if what.contains("SHA-256")));
        assert_eq!(fs::read_dir(dir.path().join("models--name/blobs")).unwrap().count(), 0);
        keep(&repository, "model.safetensors", right, b"hello").unwrap();
        assert!(repository.has("c0ffee", "model.safetensors"));
    }

    #[test]
    fn broken_downloads_resume_and_damaged_partial_files_restart() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), RepoKind::Model, "name", "main");
        let hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let blobs = dir.path().join("models--name/blobs");
        let partial = blobs.join(format!("{hello}.incomplete"));
        let file = described(hello, 5);
        let write = |to: &mut File, bytes: &[u8]| to.write_all(bytes).unwrap();
        let broke = repository.keep("c0ffee", "w", &file, &mut |to, kept| {
            assert_eq!(kept, 0);
            write(to, b"he");
            Err(HubError::Unanswered("broke off".into()))
        });
        assert!(broke.is_err() && fs::read(&partial).unwrap() == b"he");
        repository
            .keep("c0ffee", "w", &file, &mut |to, kept| {
                assert_eq!(kept, 2);
                write(to, b"llo");
                Ok(())
            })
            .unwrap();
        assert_eq!(fs::read(repository.snapshot("c0ffee").join("w")).unwrap(), b"hello");
        assert_eq!(fs::read_dir(&blobs).unwrap().count(), 1);
        fs::remove_file(blobs.join(hello)).unwrap();
        for damaged in ["hx", "hello, and more"] {
            fs::write(&partial, damaged).unwrap();
            let content = b"hello";
            let all = &mut |to: &mut File, kept: u64| {
                write(to, &content[kept as usize..]);
                Ok(())
            };
            repository.keep("c0ffee", "w", &file, all).unwrap();
            assert_eq!(fs::read(blobs.join(hello)).unwrap(), b"hello", "{damaged}");
            fs::remove_file(blobs.join(hello)).unwrap();
        }
        // Without a checksum, a mismatch of the two parts would go unnoticed: the download starts again.
        fs::write(blobs.join("tag.incomplete"), "he").unwrap();
        let whole = repository.keep("c0ffee", "c", &described("tag", 5), &mut |to, kept| {
            assert_eq!(kept, 0);
            write(to, b"HELLO");
            Ok(())
        });
        whole.unwrap();
        assert_eq!(fs::read(blobs.join("tag")).unwrap(), b"HELLO");
    }

    #[test]
    fn a_model_with_a_missing_shard_is_incomplete() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), RepoKind::Model, "name", "main");
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
