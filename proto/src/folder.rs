//! The output folder as it was when the run began, told from another folder that took its place.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Fault;

/// A folder by its path and, once somebody has looked at it, by its device and number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Folder {
    /// One that nobody has looked at.
    #[must_use]
    pub fn unseen(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: None }
    }

    /// One that is there.
    pub fn seen(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        Ok(Self { path: path.to_owned(), identity: Some((found.dev(), found.ino())) })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses to go on where the path does not lead to the folder that was seen: a folder that was removed must not come back with
    /// only a part of the run in it.
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
    fn a_folder_that_was_moved_or_replaced_is_another_one() {
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
