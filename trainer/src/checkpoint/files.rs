//! Folders that appear whole or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dyad_data::hub::{MODEL_COMPANIONS, OTHER_TEMPLATES, TOKENIZER_COMPANIONS};
use dyad_proto::manifest::{Manifest, Sum};
use dyad_proto::run_folder::{is_own, unfinished};
use dyad_proto::{Fault, safe_file};

use super::cannot_write;

/// Sums of files that were taken while writing them.
pub(super) type Sums = BTreeMap<PathBuf, Sum>;

/// The folder that a run writes to, as it was when the run began.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
    /// Device and number of the folder, by which it is told from another that took its place.
    identity: Option<(u64, u64)>,
}

impl Home {
    /// A folder that nobody has looked at.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: None }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder where it is missing, and remembers it.
    pub fn settle(&mut self) -> Result<(), Fault> {
        let made = fs::create_dir_all(&self.path).and_then(|()| fs::metadata(&self.path));
        let found = made.map_err(|error| cannot_write(&self.path, &error))?;
        self.identity = Some((found.dev(), found.ino()));
        Ok(())
    }

    /// A folder that was removed must not come back with nothing but a checkpoint in it.
    fn still_there(&self) -> Result<(), Fault> {
        let found = fs::metadata(&self.path).ok().map(|found| (found.dev(), found.ino()));
        if self.identity.is_none() || found == self.identity {
            return Ok(());
        }
        let what = if found.is_none() { "was removed or moved" } else { "was replaced by another folder" };
        Err(Fault::failed(format!(
            "output_dir {} {what} while the run was writing to it",
            self.path.display()
        ))
        .hint("leave output_dir alone while a run writes to it"))
    }

    /// Fills a temporary folder beside the one of this name, adds the sums of all its files, then puts it in that one's place.
    pub(super) fn write(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<Sums, Fault>,
    ) -> Result<PathBuf, Fault> {
        self.still_there()?;
        let target = self.path.join(name);
        if target.exists() && !is_own(&target) {
            return Err(Fault::failed(format!("{} is in the way: Dyad did not write it", target.display()))
                .hint("move it away, then go on with --resume"));
        }
        let temporary = unfinished(&target);
        let io = |error: io::Error| cannot_write(&target, &error);
        remove(&temporary).map_err(io)?;
        fs::create_dir(&temporary).map_err(io)?;
        let written = fill(&temporary).and_then(|sums| {
            let complete = || {
                Manifest::of(&temporary, &sums)?.write(&temporary)?;
                sync(&temporary)
            };
            complete().map_err(io)?;
            self.still_there()?;
            put(&temporary, &target).map_err(io)
        });
        if written.is_err() {
            // What is half written is of no use, and may be what fills the disk.
            let _ = remove(&temporary);
        }
        written.map(|()| target)
    }
}

fn put(temporary: &Path, target: &Path) -> io::Result<()> {
    remove(target)?;
    fs::rename(temporary, target)?;
    target.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

pub(super) fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { sync(&path)? } else { File::open(&path)?.sync_all()? }
    }
    File::open(dir)?.sync_all()
}

/// Copies the model's configuration (the first source that has a file gives it), and the tokenizer's files, all of them from
/// the folder whose tokenizer the run reads: a template of another folder would make other tokens of the same text.
pub(super) fn copy_companions(sources: &[&Path], tokenizer: &Path, target: &Path) -> Result<(), Fault> {
    for name in MODEL_COMPANIONS {
        if let Some(source) = sources.iter().map(|dir| dir.join(name)).find(|path| path.is_file()) {
            copy(&source, &target.join(name))?;
        }
    }
    for name in TOKENIZER_COMPANIONS {
        let source = tokenizer.join(name);
        if source.is_file() {
            copy(&source, &target.join(name))?;
        }
    }
    let others = tokenizer.join(OTHER_TEMPLATES);
    if !others.is_dir() {
        return Ok(());
    }
    let copies = target.join(OTHER_TEMPLATES);
    fs::create_dir_all(&copies).map_err(|error| cannot_write(&copies, &error))?;
    for entry in fs::read_dir(&others).map_err(|error| cannot_write(&copies, &error))? {
        let entry = entry.map_err(|error| cannot_write(&copies, &error))?;
        if entry.path().extension().is_some_and(|extension| extension == "jinja") {
            copy(&entry.path(), &copies.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn copy(source: &Path, path: &Path) -> Result<(), Fault> {
    safe_file::copy(source, path).map_err(|error| cannot_write(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &'static str, text: &'static str) -> impl FnOnce(&Path) -> Result<Sums, Fault> {
        move |path| {
            fs::write(path.join(name), text).unwrap();
            Ok(Sums::new())
        }
    }

    #[test]
    fn a_folder_that_cannot_be_filled_leaves_the_old_one_alone_and_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path());
        let target = dir.path().join("final");
        home.write("final", text("a", "old")).unwrap();
        let fault = home.write("final", |path| {
            fs::write(path.join("a"), "new").unwrap();
            Err(Fault::failed("disk full"))
        });
        assert!(fault.is_err());
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        assert!(!dir.path().join(".tmp-final").exists());
        home.write("final", text("b", "new")).unwrap();
        assert!(!target.join("a").exists() && target.join("b").exists());
        assert!(!dir.path().join(".tmp-final").exists());
        assert_eq!(Manifest::read(&target).unwrap().unwrap().verify(&target), Ok(()));
    }

    #[test]
    fn a_folder_of_somebody_else_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("checkpoint-5")).unwrap();
        fs::write(dir.path().join("checkpoint-5/trainer_state.json"), "{}").unwrap();
        let fault = Home::new(dir.path()).write("checkpoint-5", text("a", "new")).unwrap_err();
        assert!(fault.message.ends_with("checkpoint-5 is in the way: Dyad did not write it"), "{fault}");
        assert!(dir.path().join("checkpoint-5/trainer_state.json").exists());
    }

    #[test]
    fn an_output_folder_that_was_removed_or_replaced_does_not_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/out");
        let mut home = Home::new(&path);
        home.settle().unwrap();
        home.write("final", text("a", "old")).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        let fault = home.write("final", text("a", "new")).unwrap_err();
        assert!(fault.message.contains("out was removed or moved while the run"), "{fault}");
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        let fault = home.write("final", text("a", "new")).unwrap_err();
        assert!(fault.message.contains("was replaced by another folder"), "{fault}");
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }
}
