//! Writes files where somebody else may write as well: a shared output folder, `/tmp`.
//!
//! - PRO-S1: no link is followed. A link, pipe or device in a file's place is an error that names it, or is replaced.
//! - PRO-S2: a file that has a second name elsewhere (a hard link) is replaced, and never written into.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::files;

/// A file that is new or empty now, open for writing.
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

/// A file to add to; it is made where there is none.
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

/// The whole content of a file: it has this or what it had before. What stands in its place, a link too, is replaced.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    Staged::new(path, content)?.place().map(drop)
}

/// The same of a secret: nobody but this user can read it at any time.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    Staged::with_mode(path, content, 0o600)?.place().map(drop)
}

/// The name under which a file is written before it takes its place.
#[must_use]
pub fn scratch(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}.part", path.file_name().unwrap_or_default().to_string_lossy()))
}

/// A file that is written and on the disk, beside the place that it is to take. Dropped, it is removed.
#[derive(Debug)]
pub struct Staged {
    scratch: Scratch,
    path: PathBuf,
    file: File,
}

#[derive(Debug)]
struct Scratch(Option<PathBuf>);

impl Staged {
    /// Writes it.
    pub fn new(path: &Path, content: &[u8]) -> io::Result<Self> {
        Self::with_mode(path, content, 0o666)
    }

    fn with_mode(path: &Path, content: &[u8], mode: u32) -> io::Result<Self> {
        let scratch = scratch(path);
        remove(&scratch)?;
        let mut file = open(&scratch, OpenOptions::new().append(true).create_new(true).mode(mode))?;
        let scratch = Scratch(Some(scratch));
        file.write_all(content)?;
        // On the disk before it takes the other's place.
        file.sync_all()?;
        Ok(Self { scratch, path: path.to_owned(), file })
    }

    /// Puts it in its place; the file stays open to add to it.
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
            // What is left of it helps nobody.
            let _ = fs::remove_file(path);
        }
    }
}

/// A copy of a file that may itself be reached by a link, as those of the Hugging Face cache are.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    io::copy(&mut files::open(from)?, &mut create(to)?).map(drop)
}

/// A file that did not exist.
pub fn create_new(path: &Path) -> io::Result<File> {
    open(path, OpenOptions::new().write(true).create_new(true))
}

/// Makes a folder with what is missing above it. The folder itself may be there already, but not by a link. Another process may make
/// it at the same moment, as the ranks of one run do.
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

/// Makes a folder that did not exist.
pub fn new_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o777).create(path)
}

/// What is known of the file; nothing where there is none, an error where something else has its name.
fn regular(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.is_file() => Ok(Some(about)),
        Ok(about) => Err(in_its_place(&about)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whoever puts something else there after it was looked at gains nothing: what was opened is looked at again.
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

    /// A folder with a precious file in it, and a place beside it.
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
    fn a_link_is_refused_by_what_opens_and_replaced_by_what_writes() {
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
    fn a_second_name_of_a_file_keeps_what_it_had() {
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
        // What a killed writer left, or somebody planted.
        symlink(&precious, dir.path().join(".out.log.part")).unwrap();
        write(&path, b"d").unwrap();
        assert_eq!((text(&path), text(&precious)), ("d".into(), "precious".into()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_staged_takes_its_place_when_told_and_leaves_nothing_otherwise() {
        let (dir, precious, path) = place();
        drop(Staged::new(&path, b"a").unwrap());
        assert!(!path.exists() && fs::read_dir(dir.path()).unwrap().count() == 1);
        let staged = Staged::new(&precious, b"a").unwrap();
        assert_eq!(text(&precious), "precious");
        staged.place().unwrap().write_all(b"b").unwrap();
        assert_eq!((text(&precious).as_str(), fs::read_dir(dir.path()).unwrap().count()), ("ab", 1));
    }

    #[test]
    fn folders_and_what_is_no_file_are_named() {
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
    fn a_folder_may_be_made_by_several_at_once() {
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
