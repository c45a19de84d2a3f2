//! Removes and replaces folders that a run wrote, without losing files that the user put into them.
//!
//! A folder's manifest names the files that Dyad wrote. Every other file is moved to `NAME-kept` next to the folder. A folder without a
//! manifest comes from an earlier version or is half-written; it is removed as a whole.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::files::sync_folder;
use crate::manifest::Manifest;
use crate::run_folder::{has_own_name, is_own, is_real_folder};

/// Prefix of a folder that is being replaced, on file systems that cannot exchange two folders atomically.
const REPLACED: &str = ".old-";

/// Removes a file, or a folder that Dyad wrote under the name `name`. Files that Dyad did not write are kept, with a warning.
pub fn remove(path: &Path, name: &str) -> io::Result<()> {
    if !is_real_folder(path) {
        return gone(fs::remove_file(path));
    }
    let Ok(Some(manifest)) = Manifest::read(path) else { return gone(fs::remove_dir_all(path)) };
    if !manifest.has_strangers(path)? {
        return gone(fs::remove_dir_all(path));
    }
    let kept = kept(path, name);
    // Rename first: if this is interrupted, the folder must not look unfinished, or the next run removes it.
    fs::rename(path, &kept)?;
    manifest.remove_files(&kept)?;
    tracing::warn!("{name} held files that Dyad did not write: they are kept in {}", kept.display());
    Ok(())
}

/// Returns the first unused path of the form `NAME-kept` or `NAME-kept-N`.
fn kept(path: &Path, name: &str) -> PathBuf {
    let names = (1..).map(|count: u64| match count {
        1 => format!("{name}-kept"),
        _ => format!("{name}-kept-{count}"),
    });
    let mut paths = names.map(|name| path.with_file_name(name));
    paths.find(|path| path.symlink_metadata().is_err()).unwrap_or_default()
}

/// Moves the complete folder `new` to `target`, and removes the folder that was there. After a kill, `target` is the old or the new
/// folder. If the file system cannot exchange folders, `target` may be missing; [`recover`] then restores the old one.
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

/// Repairs an interrupted [`replace`]: moves the old folder back if `target` is missing, otherwise removes it.
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
    fn foreign_files_in_a_removed_folder_are_kept() {
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
    fn replacing_works_with_and_without_exchange() {
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
    fn an_interrupted_replacement_is_undone_or_finished() {
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
