//! The Hugging Face cache, as huggingface_hub lays it out: contents by their tags in `blobs/`, links to them by commit and name in
//! `snapshots/`, and in `refs/` which commit a branch is.

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
use super::names::{is_plain_component, sha256};

/// Writes what is missing of a file behind what is kept of it, which is so long.
pub(super) type Fetch<'a> = dyn FnMut(&mut File, u64) -> Result<(), HubError> + 'a;

/// Between two looks whether somebody else has done with a file.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two signs for those who wait.
const TOLD: Duration = Duration::from_secs(1);

/// One model in the cache.
#[derive(Debug)]
pub(super) struct Repository {
    dir: PathBuf,
    locks: PathBuf,
    /// The branch, tag or commit that is wanted.
    revision: String,
}

impl Repository {
    pub(super) fn new(cache: &Path, model: &str, revision: &str) -> Self {
        let name = format!("models--{}", model.replace('/', "--"));
        let revision = revision.to_owned();
        Self { dir: cache.join(&name), locks: cache.join(".locks").join(name), revision }
    }

    /// The commit that the revision was last seen at.
    fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let commit = files::read_to_string(&self.dir.join("refs").join(&self.revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_plain_component(commit))
    }

    /// The folder of the commit that the revision was last seen at, if it holds a model; the error says what is missing.
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

    /// The file is there.
    pub(super) fn has(&self, commit: &str, name: &str) -> bool {
        self.snapshot(commit).join(name).is_file()
    }

    /// A text file of the commit.
    pub(super) fn text(&self, commit: &str, name: &str) -> Result<String, HubError> {
        files::read_to_string(&self.snapshot(commit).join(name))
            .map_err(|error| HubError::Wrong(format!("its {name} cannot be read: {error}")))
    }

    /// Puts a file into the commit's folder; `fetch` writes its content, unless another name has it already.
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
        // Trainers of one machine ask for the same files at the same time.
        let lock = File::create(self.locks.join(format!("{}.lock", file.etag))).map_err(failed)?;
        let partial = blobs.join(format!("{}.incomplete", file.etag));
        let locked = take(&lock, &partial);
        let blob = blobs.join(&file.etag);
        if !blob.is_file() {
            let scratch = match locked {
                true => partial,
                // The file is fetched twice, into a file of each one's own.
                false => blobs.join(format!("{}.{}.incomplete", file.etag, std::process::id())),
            };
            // Only of what has a checksum is it known in the end that beginning and rest belong together.
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

    /// The revision is this commit, all of which is here; its folder.
    pub(super) fn point_to(&self, commit: &str) -> Result<PathBuf, HubError> {
        let refs = self.dir.join("refs").join(&self.revision);
        let made = refs.parent().map_or(Ok(()), fs::create_dir_all);
        let pointed = made.and_then(|()| fs::create_dir_all(self.snapshot(commit))).and_then(|()| {
            // A commit needs nothing that points to it.
            if self.revision == commit { Ok(()) } else { safe_file::write(&refs, commit.as_bytes()) }
        });
        match pointed {
            // A cache that cannot be written serves all the same.
            Ok(()) => Ok(self.snapshot(commit)),
            Err(_) if self.snapshot(commit).is_dir() => Ok(self.snapshot(commit)),
            Err(error) => {
                Err(HubError::Wrong(format!("the cache {} cannot be written: {error}", refs.display())))
            }
        }
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }
}

/// Forty hexadecimal digits.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Takes the lock that others may have who fetch the same file. While that gets on, so does who waits for it. False where locks do not
/// work.
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

/// Fetches a file, or what is missing of it, and checks that it is what was announced.
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
                    "what was kept of an earlier download is damaged: it begins anew"
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
        // For those who wait for the lock; where it cannot be done they wait all the same.
        if told.elapsed() > TOLD {
            told = Instant::now();
            let _ = file.set_modified(SystemTime::now());
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

    fn keep(repository: &Repository, name: &str, etag: &str, content: &'static [u8]) -> Result<(), HubError> {
        let file = described(etag, content.len() as u64);
        repository.keep("c0ffee", name, &file, &mut |to, _| {
            to.write_all(content).map_err(|error| HubError::Wrong(error.to_string()))
        })
    }

    #[test]
    fn the_layout_is_huggingface_hubs() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "org/name", "main");
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
    fn revisions_are_kept_side_by_side_and_a_commit_is_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (revision, reference) in [("main", true), ("refs/pr/1", true), (commit, false)] {
            let repository = Repository::new(dir.path(), "org/name", revision);
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
    fn a_content_that_is_not_what_its_tag_says_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "name", "main");
        let right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let trouble = keep(&repository, "model.safetensors", right, b"other").unwrap_err();
        assert!(matches!(trouble, HubError::Wrong(what) if what.contains("SHA-256")));
        assert_eq!(fs::read_dir(dir.path().join("models--name/blobs")).unwrap().count(), 0);
        keep(&repository, "model.safetensors", right, b"hello").unwrap();
        assert!(repository.has("c0ffee", "model.safetensors"));
    }

    #[test]
    fn a_download_that_broke_off_goes_on_and_a_damaged_beginning_is_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "name", "main");
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
        // Nothing would tell that beginning and rest do not belong together.
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
    fn half_a_model_is_not_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "name", "main");
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
