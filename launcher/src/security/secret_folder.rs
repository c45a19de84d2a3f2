//! Where the processes of this machine read their keys: a folder for this user alone, which goes when the launcher goes.

use std::fs::{DirBuilder, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dyad_proto::security::Proof;
use dyad_proto::{Fault, files};
use ring::rand::{SecureRandom, SystemRandom};

const PREFIX: &str = "dyad-tls-";
/// A younger folder may be about to be locked by whoever has just made it.
const SETTLED: Duration = Duration::from_secs(60);

/// A folder with one folder a process.
#[derive(Debug)]
pub struct SecretFolder {
    path: PathBuf,
    /// Locked as long as its owner lives, however that ends.
    _lock: File,
}

impl SecretFolder {
    /// A new one in TMPDIR. Takes away what launchers of this user have left that were killed.
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
        // A filesystem without locks has folders that are not swept.
        let _ = locked(&lock);
        Ok(Self { path, _lock: lock })
    }

    /// Writes the files of one process; gives their folder.
    pub fn write(&self, name: &str, proof: &Proof) -> Result<PathBuf, Fault> {
        let dir = self.path.join(name);
        if dir.exists() {
            // The same process, started again.
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

/// Removes folders of this user that nobody holds any more.
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

/// Takes the lock, unless somebody holds it.
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
    fn keys_are_the_owners_alone_and_go_with_the_launcher() {
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
    fn only_what_a_killed_launcher_left_is_swept() {
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
