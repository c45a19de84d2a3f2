//! Folders that appear whole or not at all.

use std::fs::{self, File};
use std::path::Path;

use dyad_data::hub::COMPANIONS;
use dyad_proto::Fault;

use super::cannot_write;

/// Fills a temporary folder beside `target`, then puts it in `target`'s place.
pub(super) fn write_folder(
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let temporary = target.with_file_name(format!(".tmp-{name}"));
    let io = |error: std::io::Error| cannot_write(target, &error);
    remove(&temporary).map_err(io)?;
    fs::create_dir_all(&temporary).map_err(io)?;
    fill(&temporary)?;
    sync(&temporary).map_err(io)?;
    remove(target).map_err(io)?;
    fs::rename(&temporary, target).map_err(io)?;
    target.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all()).map_err(io)
}

fn remove(dir: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { sync(&path)? } else { File::open(&path)?.sync_all()? }
    }
    File::open(dir)?.sync_all()
}

/// Copies config, tokenizer and template files; the first source that has a file gives it.
pub(super) fn copy_companions(sources: &[&Path], target: &Path) -> Result<(), Fault> {
    for name in COMPANIONS {
        if let Some(source) = sources.iter().map(|dir| dir.join(name)).find(|path| path.is_file()) {
            let path = target.join(name);
            fs::copy(&source, &path).map_err(|error| cannot_write(&path, &error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_filled_leaves_the_old_one_alone() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("final");
        let write = |name: &'static str, text: &'static str| {
            move |path: &Path| {
                fs::write(path.join(name), text).unwrap();
                Ok(())
            }
        };
        write_folder(&target, write("a", "old")).unwrap();
        let fault = write_folder(&target, |path| {
            fs::write(path.join("a"), "new").unwrap();
            Err(Fault::failed("disk full"))
        });
        assert!(fault.is_err());
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        write_folder(&target, write("b", "new")).unwrap();
        assert!(!target.join("a").exists() && target.join("b").exists());
        assert!(!dir.path().join(".tmp-final").exists());
    }
}
