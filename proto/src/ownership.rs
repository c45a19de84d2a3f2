//! Lock of an output folder: one run at a time. The kernel releases it when its holder dies.
//!
//! The lock is an `flock`, so it also works between hosts that share an NFSv4 file system. The launcher (or its agent) takes it before
//! it writes any file, keeps it until it ends, and passes the open file to its coordinator. A coordinator that is started by hand takes
//! the lock itself. The file names the holder, for the error message of a second run.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::folder::Folder;
use crate::{Fault, files, reading};

/// Name of the lock file in the output folder.
pub const LOCK: &str = ".dyad-lock";
/// The environment variable that tells a coordinator the descriptor of the lock file that it inherited.
pub const HANDED_OVER: &str = "DYAD_OUTPUT_LOCK";

/// How long to wait for a folder whose owner is dead: its coordinator inherited the lock and takes a moment to end.
const LEAVING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// The right to write into an output folder. Dropping it releases the lock.
#[derive(Debug)]
pub struct Ownership {
    path: PathBuf,
    folder: Folder,
    /// `None` if the lock was inherited ([`HANDED_OVER`]), or if the file system has no locks.
    file: Option<File>,
}

/// Content of the lock file: who holds the folder.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Owner {
    host: String,
    pid: u32,
    #[serde(default)]
    run_id: String,
    /// Seconds since 1970.
    started: u64,
}

impl Ownership {
    /// Creates the folder if necessary and locks it; fails if another run holds it, and names that run.
    pub fn take(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join(LOCK);
        let seen = || Folder::seen(dir).map_err(|error| unusable(dir, &error));
        if let Some(handed) = std::env::var_os(HANDED_OVER).filter(|_| dir.is_dir())
            && is_open(&handed, &path)
        {
            return Ok(Self { path, folder: seen()?, file: None });
        }
        std::fs::create_dir_all(dir).map_err(|error| unusable(dir, &error))?;
        let folder = seen()?;
        let began = Instant::now();
        loop {
            let file = open(&path, true).map_err(|error| unusable(&path, &error))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) if began.elapsed() < LEAVING && is_leaving(&file) => {
                    std::thread::sleep(PAUSE);
                    reading::goes_on();
                    continue;
                }
                Err(Errno::WOULDBLOCK) => return Err(in_use(dir, &file)),
                Err(error) => {
                    tracing::warn!(
                        "cannot lock output_dir {}: {error}; nothing keeps a second run out of it",
                        dir.display()
                    );
                    return Ok(Self { path, folder, file: None });
                }
            }
            // The last owner may have removed the file between open and flock. Then this lock protects nothing: try again.
            if same_file(&file.metadata(), &std::fs::symlink_metadata(&path)) {
                refuse_foreign(&path, &file)?;
                if has_other_names(&file) {
                    // A hard link to a file of the user or of a backup: remove this name, leave the file unchanged.
                    std::fs::remove_file(&path).map_err(|error| unusable(&path, &error))?;
                    continue;
                }
                let owner =
                    Owner { host: host(), pid: std::process::id(), run_id: String::new(), started: now() };
                // Ignore errors: the content only serves messages, and the lock holds without it.
                let _ = say(&file, &owner);
                return Ok(Self { path, folder, file: Some(file) });
            }
        }
    }

    /// The descriptor of the lock file, and the environment variable for the process that inherits it; `None` without a lock.
    #[must_use]
    pub fn to_hand_over(&self) -> Option<(RawFd, (&'static str, String))> {
        let fd = self.file.as_ref()?.as_raw_fd();
        Some((fd, (HANDED_OVER, fd.to_string())))
    }

    /// Writes the run id into the lock file, for the message to other runs.
    pub fn name_run(&self, run_id: &str) {
        let Ok(file) = open(&self.path, false) else { return };
        let owner = Owner { run_id: run_id.to_owned(), ..read(&file).unwrap_or_default() };
        if owner.pid != 0 && !has_other_names(&file) {
            let _ = say(&file, &owner);
        }
    }

    /// The folder as it was when it was locked.
    #[must_use]
    pub fn folder(&self) -> &Folder {
        &self.folder
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        // Remove it while it is locked: a process that has it open then sees that the path leads elsewhere, and tries again.
        let Some(file) = &self.file else { return };
        if same_file(&file.metadata(), &std::fs::symlink_metadata(&self.path)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Opens the lock file, without following a link that another user may have planted.
fn open(path: &Path, create: bool) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .custom_flags(flags)
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

fn is_open(number: &OsString, path: &Path) -> bool {
    let Some(number) = number.to_str().and_then(|number| number.parse::<u32>().ok()) else { return false };
    same_file(&std::fs::metadata(format!("/proc/self/fd/{number}")), &std::fs::symlink_metadata(path))
}

fn same_file(a: &io::Result<std::fs::Metadata>, b: &io::Result<std::fs::Metadata>) -> bool {
    matches!((a, b), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()))
}

fn say(file: &File, owner: &Owner) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(format!("{}\n", serde_json::to_string(owner)?).as_bytes(), 0)
}

/// The first 4096 bytes of the file; a lock file is shorter.
fn beginning(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    let length = file.read_at(&mut bytes, 0)?;
    bytes.truncate(length);
    Ok(bytes)
}

fn read(file: &File) -> Option<Owner> {
    serde_json::from_slice(&beginning(file).ok()?).ok()
}

/// First bytes of every lock file.
const FIRST_WORDS: &[u8] = b"{\"host\":";

/// Fails if the file is not a lock file, so that it is not overwritten. A lock file that a kill has truncated passes.
fn refuse_foreign(path: &Path, file: &File) -> Result<(), Fault> {
    let bytes = beginning(file).map_err(|error| unusable(path, &error))?;
    if bytes.starts_with(FIRST_WORDS) || FIRST_WORDS.starts_with(&bytes) {
        return Ok(());
    }
    Err(Fault::input(format!("{} is not a lock that Dyad wrote", path.display()))
        .hint("move it away, or choose another output_dir"))
}

/// Whether the process that took the lock ran on this host and has ended.
fn is_leaving(file: &File) -> bool {
    let gone = |owner: Owner| owner.host == host() && !Path::new(&format!("/proc/{}", owner.pid)).exists();
    read(file).is_some_and(gone)
}

fn has_other_names(file: &File) -> bool {
    file.metadata().is_ok_and(|about| about.nlink() > 1)
}

fn in_use(dir: &Path, file: &File) -> Fault {
    // The owner may not have written the file yet.
    let who = read(file).map_or_else(
        || "another run".to_owned(),
        |owner| {
            let run = if owner.run_id.is_empty() {
                "another run"
            } else {
                &format!("run {}", one_word(&owner.run_id))
            };
            let (pid, host) = (owner.pid, one_word(&owner.host));
            format!(
                "{run} (pid {pid} on host {host}, started {} ago)",
                ago(now().saturating_sub(owner.started))
            )
        },
    );
    Fault::unavailable(format!("output_dir {} is in use by {who}", dir.display()))
        .hint("wait for that run or stop it; or choose another output_dir")
}

/// Keeps printable ASCII only, at most 64 characters: the file's content is not trusted.
fn one_word(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic()).take(64).collect()
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn host() -> String {
    files::of_kernel("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

fn unusable(path: &Path, error: &io::Error) -> Fault {
    Fault::input(format!("cannot write output_dir {}: {error}", path.display()))
        .hint("set output_dir to a folder that you may write to")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_of_the_first_until_it_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/out");
        let first = Ownership::take(&out).unwrap();
        let said = |words: &str| {
            let fault = Ownership::take(&out).unwrap_err();
            let who = format!("{words} (pid {} on host {}, started ", std::process::id(), host());
            assert!(fault.message.contains(&who), "{fault}");
            assert_eq!(fault.code.exit_status(), 3);
        };
        said("is in use by another run");
        first.name_run("run-12");
        said("is in use by run run-12");
        drop(first);
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
        drop(Ownership::take(&out).unwrap());
    }

    /// The coordinator of the killed owner holds the lock for a moment longer.
    #[test]
    fn a_second_owner_waits_for_a_killed_one() {
        let dir = tempfile::tempdir().unwrap();
        let first = Ownership::take(dir.path()).unwrap();
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let owner = Owner { host: host(), pid: dead.id(), run_id: String::new(), started: now() };
        say(first.file.as_ref().unwrap(), &owner).unwrap();
        assert!(is_leaving(first.file.as_ref().unwrap()));
        std::thread::scope(|scope| {
            let second = scope.spawn(|| Ownership::take(dir.path()));
            drop(first);
            assert!(second.join().unwrap().is_ok());
        });
    }

    /// A killed owner leaves its file.
    #[test]
    fn a_file_without_a_lock_is_taken_whatever_it_contains() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"host\":\"h\",\"pid\":1,\"started\":0}"] {
            std::fs::write(dir.path().join(LOCK), text).unwrap();
            drop(Ownership::take(dir.path()).unwrap());
        }
        let elsewhere = dir.path().join("precious");
        std::fs::write(&elsewhere, "precious").unwrap();
        std::os::unix::fs::symlink(&elsewhere, dir.path().join(LOCK)).unwrap();
        assert!(Ownership::take(dir.path()).is_err());
        assert_eq!(std::fs::read_to_string(elsewhere).unwrap(), "precious");
    }

    #[test]
    fn foreign_and_hard_linked_files_keep_their_content() {
        let dir = tempfile::tempdir().unwrap();
        let (lock, other) = (dir.path().join(LOCK), dir.path().join("other"));
        std::fs::write(&lock, "precious").unwrap();
        let fault = Ownership::take(dir.path()).unwrap_err();
        assert!(fault.message.ends_with(".dyad-lock is not a lock that Dyad wrote"), "{fault}");
        assert_eq!(std::fs::read_to_string(&lock).unwrap(), "precious");
        for text in ["", "{\"host\":\"h\",\"pid\":1,\"started\":0}"] {
            std::fs::write(&other, text).unwrap();
            std::fs::remove_file(&lock).unwrap();
            std::fs::hard_link(&other, &lock).unwrap();
            let owner = Ownership::take(dir.path()).unwrap();
            owner.name_run("run-12");
            assert!(std::fs::read_to_string(&lock).unwrap().contains("run-12"));
            assert_eq!(std::fs::read_to_string(&other).unwrap(), text);
            drop(owner);
            std::fs::write(&lock, "").unwrap();
        }
    }

    #[test]
    fn the_owner_of_a_moved_folder_does_not_remove_the_next_lock() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let first = Ownership::take(&out).unwrap();
        std::fs::rename(&out, dir.path().join("moved")).unwrap();
        let second = Ownership::take(&out).unwrap();
        assert!(first.folder().still_there().is_err() && second.folder().still_there().is_ok());
        drop(first);
        assert!(out.join(LOCK).exists());
    }
}
