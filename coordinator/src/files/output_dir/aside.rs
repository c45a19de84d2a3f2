//! What an earlier run left, on its way out: first out of sight, where it can be brought back, and gone once the new run has its place.

use std::fs;
use std::path::{Path, PathBuf};

use dyad_proto::run_folder::{has_own_name, set_aside};
use dyad_proto::{Fault, removal};

use super::{remove, unusable};

/// Folders under names of their own, because rank 0 may be filling a checkpoint under that of an unfinished one, and files that are still in
/// their places. Dropped, the folders go back.
#[derive(Debug, Default)]
pub(super) struct Aside {
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Aside {
    /// Renames folders, which takes no time whatever they hold.
    pub(super) fn put<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<Self, Fault> {
        let mut aside = Self::default();
        for path in paths {
            if !has_own_name(path) {
                aside.files.push(path.to_owned());
                continue;
            }
            let hidden = set_aside(path);
            // Of this run's own start there is none.
            remove(&hidden)?;
            fs::rename(path, hidden).map_err(|error| unusable(path, &error))?;
            aside.folders.push(path.to_owned());
        }
        Ok(aside)
    }

    /// Removes all of it.
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
            // The error that led here is the one to tell.
            let _ = fs::rename(set_aside(path), path);
        }
    }
}
