//! Removes folders that a run wrote, and replaces them, without losing what somebody else put into them.
//!
//! A folder's manifest names what Dyad wrote. Every other file in it is kept, in `NAME-kept` beside it. A folder without a manifest is one of an
//! earlier version, or a half-written one, and goes as a whole.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::files::sync_folder;
use crate::manifest::Manifest;
use crate::run_folder::{has_own_name, is_own, is_real_folder};

/// Begins the name of a folder that is being replaced, on file systems that cannot exchange two folders.
const REPLACED: &str = ".old-";

/// Removes a file, or a folder that Dyad wrote and that was called `name`. What Dyad did not write is kept and announced.
pub fn remove(path: &Path, name: &str) -> io::Result<()> {
    if !is_real_folder(path) {
        return gone(fs::remove_file(path));
    }
    let Ok(Some(manifest)) = Manifest::read(path) else { return gone(fs::remove_dir_all(path)) };
    if !manifest.has_strangers(path)? {
        return gone(fs::remove_dir_all(path));
    }
    let kept = kept(path, name);
    // First of all: what is cut short here must not look like an unfinished folder, which the next run removes.
    fs::rename(path, &kept)?;
    manifest.remove_files(&kept)?;
    tracing::warn!("{name} held files that Dyad did not write: they are kept in {}", kept.display());
    Ok(())
}

/// A name that is free.
fn kept(path: &Path, name: &str) -> PathBuf {
    let names = (1..).map(|count: u64| match count {
        1 => format!("{name}-kept"),
        _ => format!("{name}-kept-{count}"),
    });
    let mut paths = names.map(|name| path.with_file_name(name));
    paths.find(|path| path.symlink_metadata().is_err()).unwrap_or_default()
}

/// Puts a complete folder in the place of another one, or where there is none. A kill leaves the old one or the new one there. Where the
/// file system cannot exchange folders, it may leave none, and [`recover`] puts the old one back.
pub fn replace(new: &Path, target: &Path) -> io::Result<()> {
    let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if target.symlink_metadata().is_err() {
        fs::rename(new, target)?;
        return target.parent().map_or(Ok(()), sync_folder);
    }
    let old = match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
        Ok(()) => new.to_owned(),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => by_steps(new, target)?,
        Err(error) => return Err(error.into()),
    };
    target.parent().map_or(Ok(()), sync_folder)?;
    if let Err(error) = remove(&old, &name) {
        tracing::warn!("cannot remove {}, which was replaced: {error}", old.display());
    }
    Ok(())
}

fn by_steps(new: &Path, target: &Path) -> io::Result<PathBuf> {
    let old = replaced(target);
    fs::rename(target, &old)?;
    if let Err(error) = fs::rename(new, target) {
        fs::rename(&old, target)?;
        return Err(error);
    }
    Ok(old)
}

fn replaced(target: &Path) -> PathBuf {
    target.with_file_name(format!("{REPLACED}{}", target.file_name().unwrap_or_default().to_string_lossy()))
}

/// Ends what a kill has cut short in [`replace`]: the old folder goes back where nothing took its place, and is removed otherwise.
pub fn recover(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let old = entry?.path();
        let name =
            old.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(REPLACED));
        let Some(name) = name.filter(|name| has_own_name(Path::new(name))) else { continue };
        let target = old.with_file_name(name);
        if !is_real_folder(&old) || !is_own(&old) {
            continue;
        }
        match target.symlink_metadata() {
            Ok(_) => remove(&old, name)?,
            Err(_) => fs::rename(&old, &target)?,
        }
    }
    Ok(())
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn folder(path: &Path, file: &str, text: &str) {
        fs::create_dir_all(path.join("merged")).unwrap();
        fs::write(path.join(file), text).unwrap();
        fs::write(path.join("merged/config.json"), "{}").unwrap();
        Manifest::of(path, &BTreeMap::new()).unwrap().write(path).unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_somebody_else_put_into_a_folder_is_kept_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("final");
        folder(&path, "model.safetensors", "weights");
        remove(&path, "final").unwrap();
        remove(&path, "final").unwrap();
        assert_eq!(names(dir.path()), [] as [&str; 0]);
        for expected in ["final-kept", "final-kept-2"] {
            folder(&path, "model.safetensors", "weights");
            fs::create_dir(path.join("mine")).unwrap();
            fs::write(path.join("mine/scores.txt"), "precious").unwrap();
            std::os::unix::fs::symlink(dir.path(), path.join("link")).unwrap();
            remove(&path, "final").unwrap();
            assert!(!path.exists());
            assert_eq!(names(&dir.path().join(expected)), ["link", "mine"]);
            let kept = fs::read_to_string(dir.path().join(expected).join("mine/scores.txt")).unwrap();
            assert_eq!(kept, "precious");
        }
    }

    #[test]
    fn a_folder_takes_the_place_of_another_one_in_either_way() {
        let dir = tempfile::tempdir().unwrap();
        let (new, target) = (dir.path().join(".tmp-final"), dir.path().join("final"));
        for (text, steps) in [("first", false), ("second", false), ("third", true)] {
            folder(&new, "a", text);
            match steps {
                false => replace(&new, &target).unwrap(),
                true => remove(&by_steps(&new, &target).unwrap(), "final").unwrap(),
            }
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), text);
            assert_eq!(names(dir.path()), ["final"]);
        }
    }

    #[test]
    fn a_replacement_that_was_cut_short_is_taken_back_or_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (old, target) = (dir.path().join(".old-final"), dir.path().join("final"));
        folder(&old, "a", "old");
        fs::create_dir(dir.path().join(".old-mine")).unwrap();
        recover(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        folder(&old, "a", "older");
        recover(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        assert_eq!(names(dir.path()), [".old-mine", "final"]);
    }
}
