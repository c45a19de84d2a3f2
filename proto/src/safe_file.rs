//! Writes files in folders that other users may write to as well: a shared output folder, `/tmp`.
//!
//! - PRO-S1: no link is followed. A link, pipe or device in the place of a file is an error that names it, or is replaced.
//! - PRO-S2: a file with a second hard link is replaced; its content is never changed.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::files;

/// Creates a file, or empties an existing one, and opens it for writing.
pub fn create(path: &Path) -> io::Result<File> {
    let Some(about) = regular(path)? else { return create_new(path) };
    if about.nlink() > 1 {
        fs::remove_file(path)?;
        return create_new(path);
    }
    let file = open(path, OpenOptions::new().write(true))?;
    file.set_len(0)?;
    Ok(file)
}

/// Opens a file to append to; creates it if it does not exist.
pub fn append(path: &Path) -> io::Result<File> {
    let Some(about) = regular(path)? else {
        drop(create_new(path)?);
        return open(path, OpenOptions::new().append(true));
    };
    if about.nlink() > 1 {
        let kept = files::read_rows(path)?;
        write(path, &kept)?;
    }
    open(path, OpenOptions::new().append(true))
}

/// Replaces a file atomically: after a crash it has the old or the new content. A link in its place is replaced too.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    Staged::new(path, content)?.place().map(drop)
}

/// Like [`write`], for a secret: the file is readable only for this user from the start.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    Staged::with_mode(path, content, 0o600)?.place().map(drop)
}

/// The temporary path under which a file is written before it is renamed to `path`.
#[must_use]
pub fn scratch(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.part", path.file_name().unwrap_or_default().to_string_lossy()))
}

/// A file that is on the disk under its temporary name. [`Staged::place`] renames it; dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    scratch: Scratch,
    path: PathBuf,
    file: File,
}

#[derive(Debug)]
struct Scratch(Option<PathBuf>);

impl Staged {
    /// Writes the temporary file and syncs it to the disk.
    pub fn new(path: &Path, content: &[u8]) -> io::Result<Self> {
        Self::with_mode(path, content, 0o666)
    }

    fn with_mode(path: &Path, content: &[u8], mode: u32) -> io::Result<Self> {
        let scratch = scratch(path);
        remove(&scratch)?;
        let mut file = open(&scratch, OpenOptions::new().append(true).create_new(true).mode(mode))?;
        let scratch = Scratch(Some(scratch));
        file.write_all(content)?;
        // Sync before the rename; otherwise a crash could leave an empty file in place of the old one.
        file.sync_all()?;
        Ok(Self { scratch, path: path.to_owned(), file })
    }

    /// Renames the file to its final name; it stays open for appending.
    pub fn place(mut self) -> io::Result<File> {
        if let Some(scratch) = &self.scratch.0 {
            fs::rename(scratch, &self.path)?;
        }
        self.scratch.0 = None;
        Ok(self.file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Ignore errors: a left-over temporary file does no harm.
            let _ = fs::remove_file(path);
        }
    }
}

/// Copies a file. `from` may be a link, like the files of the Hugging Face cache.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    io::copy(&mut files::open(from)?, &mut create(to)?).map(drop)
}

/// Creates a file; fails if it exists.
pub fn create_new(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().write(true).create_new(true))
}

/// Creates a folder and its missing parents. The folder may exist already, but must not be a link. Several processes, such as the ranks
/// of a run, may create it at the same time.
pub fn folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    match new_folder(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::symlink_metadata(path)? {
            about if about.is_dir() => Ok(()),
            about => Err(in_its_place(&about)),
        },
        made => made,
    }
}

/// Creates a folder; fails if it exists.
pub fn new_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o777).create(path)
}

/// Metadata of a regular file; `None` if it does not exist, an error if it is not a regular file.
fn regular(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.is_file() => Ok(Some(about)),
        Ok(about) => Err(in_its_place(&about)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a file and checks the open file again: another process may have replaced it since the first check.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(in_its_place(&about));
    }
    Ok(file)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn in_its_place(about: &Metadata) -> io::Error {
    let what = match about.file_type() {
        kind if kind.is_symlink() => "it is a link, and links are not followed here; remove it",
        kind if kind.is_dir() => "it is a folder",
        kind if kind.is_file() => "it is a file",
        _ => "it is neither a file nor a folder",
    };
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Returns a folder, a file `precious` in it, and a free path next to that.
    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (precious, path) = (dir.path().join("precious"), dir.path().join("out.log"));
        fs::write(&precious, "precious").unwrap();
        (dir, precious, path)
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn create_and_append_refuse_links_and_write_replaces_them() {
        let (dir, precious, path) = place();
        for target in [precious.clone(), dir.path().join("nowhere")] {
            symlink(&target, &path).unwrap();
            for fault in [create(&path).unwrap_err(), append(&path).unwrap_err()] {
                assert!(fault.to_string().starts_with("it is a link"), "{fault}");
            }
            assert!(create_new(&path).is_err());
            write(&path, b"new").unwrap();
            assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
            assert_eq!((text(&path), text(&precious)), ("new".into(), "precious".into()));
            fs::remove_file(&path).unwrap();
        }
        assert!(!dir.path().join("nowhere").exists());
    }

    #[test]
    fn other_hard_links_of_a_file_keep_their_content() {
        let (_dir, precious, path) = place();
        fs::hard_link(&precious, &path).unwrap();
        create(&path).unwrap().write_all(b"a").unwrap();
        assert_eq!((text(&path), text(&precious)), ("a".into(), "precious".into()));
        fs::remove_file(&path).unwrap();
        fs::hard_link(&precious, &path).unwrap();
        append(&path).unwrap().write_all(b"+").unwrap();
        assert_eq!((text(&path), text(&precious)), ("precious+".into(), "precious".into()));
    }

    #[test]
    fn files_are_emptied_added_to_and_replaced() {
        let (dir, precious, path) = place();
        append(&path).unwrap().write_all(b"a").unwrap();
        append(&path).unwrap().write_all(b"b").unwrap();
        assert_eq!(text(&path), "ab");
        create(&path).unwrap().write_all(b"c").unwrap();
        assert_eq!(text(&path), "c");
        copy(&precious, &path).unwrap();
        assert_eq!(text(&path), "precious");
        // A temporary file that a killed writer left, or that another user planted.
        symlink(&precious, dir.path().join(".out.log.part")).unwrap();
        write(&path, b"d").unwrap();
        assert_eq!((text(&path), text(&precious)), ("d".into(), "precious".into()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_staged_file_is_placed_or_removed() {
        let (dir, precious, path) = place();
        drop(Staged::new(&path, b"a").unwrap());
        assert!(!path.exists() && fs::read_dir(dir.path()).unwrap().count() == 1);
        let staged = Staged::new(&precious, b"a").unwrap();
        assert_eq!(text(&precious), "precious");
        staged.place().unwrap().write_all(b"b").unwrap();
        assert_eq!((text(&precious).as_str(), fs::read_dir(dir.path()).unwrap().count()), ("ab", 1));
    }

    #[test]
    fn writing_to_a_folder_or_device_fails_with_its_kind() {
        let (dir, precious, path) = place();
        folder(&dir.path().join("a/b")).unwrap();
        folder(&dir.path().join("a/b")).unwrap();
        symlink(dir.path().join("a"), &path).unwrap();
        assert!(folder(&path).unwrap_err().to_string().starts_with("it is a link"));
        assert!(folder(&precious).unwrap_err().to_string().contains("it is a file"));
        assert!(create(&dir.path().join("a")).unwrap_err().to_string().contains("it is a folder"));
        assert!(create(Path::new("/dev/null")).unwrap_err().to_string().contains("neither a file"));
    }

    #[test]
    fn several_threads_may_create_a_folder_at_once() {
        let (dir, ..) = place();
        for turn in 0..200 {
            let path = dir.path().join(format!("{turn}/profile"));
            let together = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                let makers: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            together.wait();
                            folder(&path)
                        })
                    })
                    .collect();
                makers.into_iter().for_each(|maker| maker.join().unwrap().unwrap());
            });
        }
    }
}
