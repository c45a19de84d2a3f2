//! Git LFS pointers: small text files in the place of the real ones, in a clone where `git lfs pull` has not run.

use std::io::{self, Read};
use std::path::Path;

use crate::{Fault, files};

const FIRST_LINE: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// Fails if `start`, the first bytes of the file, are those of a pointer.
pub fn refuse_pointer(path: &Path, start: &[u8]) -> Result<(), Fault> {
    if !start.starts_with(FIRST_LINE) {
        return Ok(());
    }
    Err(Fault::input(format!("{} is a Git LFS pointer, not the file itself", path.display()))
        .hint("run `git lfs pull` in the model's repository, or download the model again"))
}

/// Fails if a model folder holds a pointer, or a pipe or device in the place of a file, which later code would treat as missing. Files
/// that cannot be read are skipped; the code that needs them reports that.
pub fn refuse_pointers_in(dir: &Path) -> Result<(), Fault> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    let visible = entries.flatten().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    let mut paths: Vec<_> = visible.map(|entry| entry.path()).filter(|path| !path.is_dir()).collect();
    paths.sort();
    paths.iter().try_for_each(|path| match files::open(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Err(Fault::input(format!("cannot read {}: {error}", path.display()))
                .hint("remove it from the model's folder"))
        }
        _ => refuse_pointer(path, &start_of(path)),
    })
}

fn start_of(path: &Path) -> Vec<u8> {
    let mut start = Vec::new();
    let _ = files::open(path).map(|file| file.take(FIRST_LINE.len() as u64).read_to_end(&mut start));
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_named_and_other_files_are_let_through() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        std::fs::write(dir.path().join("empty"), "").unwrap();
        refuse_pointers_in(dir.path()).unwrap();
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
        std::fs::write(dir.path().join("tokenizer.json"), pointer).unwrap();
        let fault = refuse_pointers_in(dir.path()).unwrap_err();
        assert!(
            fault.message.ends_with("tokenizer.json is a Git LFS pointer, not the file itself"),
            "{fault}"
        );
        assert!(fault.hint.contains("git lfs pull"));
    }

    #[test]
    fn a_device_in_the_place_of_a_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join(".hidden")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).unwrap();
        refuse_pointers_in(dir.path()).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("adapter_config.json")).unwrap();
        let fault = refuse_pointers_in(dir.path()).unwrap_err();
        assert!(
            fault.message.ends_with("adapter_config.json: it is a device, not a regular file"),
            "{fault}"
        );
    }
}
