//! Detects that the output folder was removed, moved or replaced during the run.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Fault;

/// A folder: its path and, once it was looked up, its device and inode number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Folder {
    /// A folder whose inode is not known yet.
    #[must_use]
    pub fn unseen(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: None }
    }

    /// Looks up the inode; fails if the folder does not exist.
    pub fn seen(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        Ok(Self { path: path.to_owned(), identity: Some((found.dev(), found.ino())) })
    }

    /// Path of the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if the path no longer leads to the same folder. Otherwise the run would create a removed folder again, with only a part
    /// of its files.
    pub fn still_there(&self) -> Result<(), Fault> {
        let found = Self::seen(&self.path).ok().and_then(|found| found.identity);
        if self.identity.is_none() || found == self.identity {
            return Ok(());
        }
        let what = if found.is_none() { "was removed or moved" } else { "was replaced by another folder" };
        Err(Fault::failed(format!("output_dir {} {what} while the run was using it", self.path.display()))
            .hint("leave output_dir alone while a run writes to it")
            .lasting())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moved_or_replaced_folder_is_detected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        assert_eq!(Folder::unseen(&path).still_there(), Ok(()));
        fs::create_dir(&path).unwrap();
        let folder = Folder::seen(&path).unwrap();
        assert_eq!(folder.still_there(), Ok(()));
        fs::rename(&path, dir.path().join("moved")).unwrap();
        assert!(folder.still_there().unwrap_err().message.contains("was removed or moved"));
        fs::create_dir(&path).unwrap();
        assert!(folder.still_there().unwrap_err().message.contains("was replaced by another folder"));
    }
}
