//! Writes folders atomically: a folder appears complete or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dyad_proto::folder::Folder;
use dyad_proto::manifest::{Manifest, Sum};
use dyad_proto::run_folder::{is_own, is_real_folder, unfinished};
use dyad_proto::{Fault, removal, safe_file};
use dyad_sources::hub::{MODEL_COMPANIONS, OTHER_TEMPLATES, TOKENIZER_COMPANIONS};

use super::cannot_write;
use crate::observe::progress;

/// Checksums of files, computed while writing them.
pub(super) type Sums = BTreeMap<PathBuf, Sum>;

/// The folder that a run writes to.
#[derive(Clone, Debug)]
pub struct Home(Folder);

impl Home {
    /// The folder at `path`, not looked up: a later replacement goes unnoticed.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self(Folder::unseen(path))
    }

    /// The folder at `path`, created if this host has none, because the coordinator may run on another host. To be called as soon as the
    /// trainer has joined: a folder that replaces this one later is refused.
    pub fn settled(path: &Path) -> Result<Self, Fault> {
        let seen = fs::create_dir_all(path).and_then(|()| Folder::seen(path));
        seen.map(Self).map_err(|error| cannot_write(path, &error))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills a temporary folder next to `name`, adds the checksums of all its files, then replaces `name` with it.
    pub(super) fn write(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<Sums, Fault>,
    ) -> Result<PathBuf, Fault> {
        self.0.still_there()?;
        let target = self.path().join(name);
        // An input error, because every restart would meet this folder again.
        if target.symlink_metadata().is_ok() && !(is_real_folder(&target) && is_own(&target)) {
            return Err(Fault::input(format!("{} is in the way: Dyad did not write it", target.display()))
                .hint("move it away, then go on with --resume"));
        }
        let temporary = unfinished(&target);
        let io = |error: io::Error| cannot_write(&target, &error);
        removal::recover(self.path()).map_err(io)?;
        removal::remove(&temporary, name).map_err(io)?;
        fs::create_dir(&temporary).map_err(io)?;
        let written = fill(&temporary).and_then(|sums| {
            let complete = || {
                Manifest::of(&temporary, &sums)?.write(&temporary)?;
                sync(&temporary)
            };
            complete().map_err(io)?;
            self.0.still_there()
        });
        let written = written.and_then(|()| removal::replace(&temporary, &target).map_err(io));
        if written.is_err() {
            // A half-written folder is useless, and it may be what fills the disk.
            let _ = fs::remove_dir_all(&temporary);
        }
        written.map(|()| target)
    }
}

fn sync(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sync(&path)?
        } else {
            dyad_proto::files::open(&path)?.sync_all()?
        }
        progress::advance();
    }
    dyad_proto::files::sync_folder(dir)
}

/// Copies the model's configuration from the folder whose weights the run starts from, and the tokenizer's files from the folder whose
/// tokenizer the run reads. All tokenizer files come from that one folder: another folder's template would make other tokens of the same
/// text.
pub(super) fn copy_companions(model: &Path, tokenizer: &Path, target: &Path) -> Result<(), Fault> {
    for name in MODEL_COMPANIONS {
        let source = model.join(name);
        if source.is_file() {
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
    fn a_failed_write_keeps_the_old_folder_and_a_later_one_replaces_it() {
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
        fs::write(target.join("scores.txt"), "precious").unwrap();
        home.write("final", text("b", "new")).unwrap();
        assert!(!target.join("a").exists() && target.join("b").exists());
        let kept = dir.path().join("final-kept");
        assert!(!kept.join("a").exists() && kept.join("scores.txt").exists());
        assert!(!dir.path().join(".tmp-final").exists());
        assert_eq!(Manifest::read(&target).unwrap().unwrap().verify(&target), Ok(()));
    }

    #[test]
    fn a_folder_that_dyad_did_not_write_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("checkpoint-5")).unwrap();
        fs::write(dir.path().join("checkpoint-5/trainer_state.json"), "{}").unwrap();
        let fault = Home::new(dir.path()).write("checkpoint-5", text("a", "new")).unwrap_err();
        assert!(fault.message.ends_with("checkpoint-5 is in the way: Dyad did not write it"), "{fault}");
        assert_eq!(fault.code.exit_status(), 2, "a restart would meet it again");
        assert!(dir.path().join("checkpoint-5/trainer_state.json").exists());
    }

    #[test]
    fn writing_fails_if_the_output_folder_was_removed_or_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/out");
        let home = Home::settled(&path).unwrap();
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
