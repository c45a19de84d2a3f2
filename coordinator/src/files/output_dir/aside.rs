//! Removal of an earlier run's files in two stages: folders are first renamed, which can be undone, and deleted once the new run's files
//! are in place.

use std::fs;
use std::path::{Path, PathBuf};

use dyad_proto::run_folder::{has_own_name, set_aside};
use dyad_proto::{Fault, removal};

use super::{remove, unusable};

/// Renamed folders, and files that are still in their places. The folders get names of their own, because rank 0 may be writing a
/// checkpoint under the name for unfinished ones. Dropping this renames the folders back.
#[derive(Debug, Default)]
pub(super) struct Aside {
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Aside {
    /// Renames the folders, which is fast whatever their size.
    pub(super) fn put<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<Self, Fault> {
        let mut aside = Self::default();
        for path in paths {
            if !has_own_name(path) {
                aside.files.push(path.to_owned());
                continue;
            }
            let hidden = set_aside(path);
            // A leftover of an earlier run; this run has not put anything there yet.
            remove(&hidden)?;
            fs::rename(path, hidden).map_err(|error| unusable(path, &error))?;
            aside.folders.push(path.to_owned());
        }
        Ok(aside)
    }

    /// Deletes all of it.
    pub(super) fn remove(mut self) -> Result<(), Fault> {
        let folders = std::mem::take(&mut self.folders);
        folders.iter().try_for_each(|path| remove(&set_aside(path)))?;
        let gone = |path: &PathBuf| removal::remove(path, "").map_err(|error| unusable(path, &error));
        self.files.iter().try_for_each(gone)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        for path in &self.folders {
            // Ignored: the caller reports the error that led here.
            let _ = fs::rename(set_aside(path), path);
        }
    }
}
