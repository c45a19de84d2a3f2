//! Folder from which processes on this machine read their keys. Only this user can read it; it is deleted when the launcher ends.

use std::fs::{DirBuilder, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_proto::security::Proof;
use dyad_proto::{Fault, files};
use ring::rand::{SecureRandom, SystemRandom};

const PREFIX: &str = "dyad-tls-";
/// Younger folders are not swept: their launcher may not have locked them yet.
const SETTLED: Duration = Duration::from_secs(60);

/// A folder with one subfolder per process.
#[derive(Debug)]
pub struct SecretFolder {
    path: PathBuf,
    /// The kernel releases this lock when the owner ends, even if it is killed.
    _lock: File,
}

impl SecretFolder {
    /// Creates a folder in TMPDIR. First removes folders that killed launchers of this user left there.
    pub fn create() -> Result<Self, Fault> {
        Self::create_in(&std::env::temp_dir())
    }

    fn create_in(parent: &Path) -> Result<Self, Fault> {
        sweep(parent);
        let mut random = [0; 8];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| Fault::failed("the system gives no random numbers"))?;
        let path = parent.join(format!("{PREFIX}{:016x}", u64::from_le_bytes(random)));
        let failed = |error: std::io::Error| {
            Fault::failed(format!("cannot make the folder {} for the run's keys: {error}", path.display()))
                .hint("TMPDIR names another place for it")
        };
        DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        let lock = files::open_folder(&path).map_err(failed)?;
        // Without file locks this fails, and so does the lock in `sweep`, which then removes nothing.
        let _ = locked(&lock);
        Ok(Self { path, _lock: lock })
    }

    /// Writes the files of one process; returns their folder.
    pub fn write(&self, name: &str, proof: &Proof) -> Result<PathBuf, Fault> {
        let dir = self.path.join(name);
        if dir.exists() {
            // The same process was started again.
            let _ = std::fs::remove_dir_all(&dir);
        }
        proof.write(&dir)?;
        Ok(dir)
    }
}

impl Drop for SecretFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Removes folders of this user that no launcher has locked.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    let of_ours = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(PREFIX);
    for path in entries.flatten().filter(|entry| of_ours(&entry.file_name())).map(|entry| entry.path()) {
        let Ok(about) = std::fs::symlink_metadata(&path) else { continue };
        let age = about.modified().ok().and_then(|made| made.elapsed().ok()).unwrap_or_default();
        let ours = about.is_dir() && about.uid() == own_user() && age > SETTLED;
        if ours && files::open_folder(&path).is_ok_and(|folder| locked(&folder)) {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

#[expect(unsafe_code, reason = "geteuid")]
fn own_user() -> u32 {
    // SAFETY: a plain system call that cannot fail.
    unsafe { libc::geteuid() }
}

/// Takes the lock without waiting; returns false if another process holds it.
#[expect(unsafe_code, reason = "flock")]
fn locked(folder: &File) -> bool {
    // SAFETY: the descriptor is open.
    unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use super::*;
    use crate::security::RunSecrets;

    #[test]
    fn only_the_owner_can_read_keys_and_drop_deletes_them() {
        let parent = tempfile::tempdir().unwrap();
        let folder = SecretFolder::create_in(parent.path()).unwrap();
        let proof: Proof =
            RunSecrets::new(Duration::from_secs(60)).unwrap().trainer("node0-cpu").unwrap().into();
        let dir = folder.write("node0-cpu", &proof).unwrap();
        assert_eq!(folder.write("node0-cpu", &proof).unwrap(), dir, "a process may start again");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder.path), mode(&dir), mode(&dir.join("key.pem"))), (0o700, 0o700, 0o600));
        drop(folder);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn sweep_removes_only_old_unlocked_folders() {
        let parent = tempfile::tempdir().unwrap();
        let old = |path: &Path| {
            File::open(path).unwrap().set_modified(SystemTime::now() - 2 * SETTLED).unwrap();
        };
        for name in ["dyad-tls-left", "other", "dyad-tls-new"] {
            std::fs::create_dir(parent.path().join(name)).unwrap();
        }
        old(&parent.path().join("dyad-tls-left"));
        old(&parent.path().join("other"));
        let held = SecretFolder::create_in(parent.path()).unwrap();
        old(&held.path);
        assert!(parent.path().join("dyad-tls-new").exists());
        assert!(!parent.path().join("dyad-tls-left").exists());
        let second = SecretFolder::create_in(parent.path()).unwrap();
        assert!(held.path.exists() && second.path.exists() && parent.path().join("other").exists());
    }
}
