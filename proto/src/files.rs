//! Files and folders that are read. Files are regular ones. A pipe that nobody writes would be waited for without end, and a device has
//! no end.
//!
//! This is the one place that opens files to read them: clippy refuses `std::fs::read` and the like everywhere else.
#![allow(clippy::disallowed_methods, reason = "this is the place that the others are sent to")]

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::{Fault, counted, reading};

/// Most bytes of a file that is read as a whole: more than the largest tokenizer has, and no danger to memory.
pub const MOST_BYTES: u64 = 256 << 20;
/// Files that a program has open before it has done anything.
const NEEDED: usize = 16;

/// Opens a regular file to read it; whatever else is there is an error that says what it is.
pub fn open(path: &Path) -> io::Result<File> {
    reading::opens(path);
    // Before it is opened: opening a device may do something.
    regular(&fs::metadata(path)?)?;
    // Whatever took its place meanwhile: opening a pipe must not wait for its writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    regular(&file.metadata()?)?;
    Ok(file)
}

/// Refuses to go on where so few files may be open that the first steps of a program would fail, each in its own words.
pub fn enough_may_be_open() -> Result<(), Fault> {
    let opened: Result<Vec<File>, io::Error> = (0..NEEDED).map(|_| File::open("/dev/null")).collect();
    opened.map(drop).map_err(|error| {
        Fault::failed(format!("{NEEDED} more files cannot be opened: {error}"))
            .hint("raise the limit of open files (ulimit -n)")
    })
}

/// The bytes of a regular file, at most [`MOST_BYTES`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    within(bytes.len(), MOST_BYTES)?;
    Ok(bytes)
}

/// The text of a regular file, at most [`MOST_BYTES`].
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    within(text.len(), MOST_BYTES)?;
    Ok(text)
}

/// The bytes of a regular file that a run appends to, however long it has become.
pub fn read_rows(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of a file that the kernel makes, below `/proc` or `/sys`.
pub fn of_kernel(path: impl AsRef<Path>) -> io::Result<String> {
    fs::read_to_string(path)
}

/// Returns once the names in a folder are on the disk.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    open_folder(path)?.sync_all()
}

/// Opens a folder, to lock or to sync it.
pub fn open_folder(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)
}

/// The text of a regular file or, where the user's shell opened one for the process, of a pipe (`<(…)`, `/dev/stdin`); at most so
/// many bytes.
pub fn read_to_string_or_pipe(path: &Path, most: u64) -> io::Result<String> {
    reading::opens(path);
    let about = fs::metadata(path)?;
    let opened_before = path.starts_with("/dev") || path.starts_with("/proc");
    if !(opened_before && about.file_type().is_fifo()) {
        regular(&about)?;
    }
    let mut text = String::new();
    File::open(path)?.take(most + 1).read_to_string(&mut text)?;
    within(text.len(), most)?;
    Ok(text)
}

fn within(length: usize, most: u64) -> io::Result<()> {
    match length as u64 > most {
        true => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is longer than {}", counted(most, "byte")),
        )),
        false => Ok(()),
    }
}

fn regular(about: &Metadata) -> io::Result<()> {
    let kind = about.file_type();
    let what = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, not a regular file")))
}

/// Why no folder can be there; what the file system says of it is not always true to a reader.
#[must_use]
pub fn obstacle(dir: &Path) -> Option<String> {
    for path in dir.ancestors() {
        let Ok(about) = path.symlink_metadata() else { continue };
        let shown = path.display();
        return match path.metadata() {
            Ok(followed) if followed.is_dir() => None,
            Ok(_) => Some(format!("{shown} is no folder")),
            Err(_) if about.is_symlink() => {
                let target = std::fs::read_link(path).unwrap_or_default();
                Some(format!("{shown} is a link to {}, which is not there", target.display()))
            }
            Err(error) => Some(format!("{shown}: {error}")),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_named_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        assert!(std::process::Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
        let _socket = UnixListener::bind(path("socket")).unwrap();
        let refusal = |path: &Path| open(path).unwrap_err().to_string();
        assert_eq!(refusal(&path("pipe")), "it is a pipe, not a regular file");
        assert_eq!(refusal(&path("socket")), "it is a socket, not a regular file");
        assert_eq!(refusal(dir.path()), "it is a folder, not a regular file");
        assert_eq!(refusal(Path::new("/dev/zero")), "it is a device, not a regular file");
        assert!(read_to_string_or_pipe(&path("pipe"), 9).unwrap_err().to_string().contains("a pipe"));
        assert!(refusal(&path("nothing")).starts_with("No such file"));
        std::os::unix::fs::symlink("/dev/zero", path("endless")).unwrap();
        for path in [path("pipe"), path("endless")] {
            assert!(read(&path).is_err() && read_to_string(&path).is_err() && read_rows(&path).is_err());
        }
    }

    #[test]
    fn what_is_too_long_is_not_read_into_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        File::create(&path).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("longer than 268435456 bytes"));
    }

    #[test]
    fn what_stands_where_a_folder_is_to_be_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("real")).unwrap();
        fs::write(path("file"), "").unwrap();
        for (name, target) in [("link", "real"), ("dangling", "nowhere/deep")] {
            std::os::unix::fs::symlink(target, path(name)).unwrap();
        }
        for good in ["real", "real/new/deep", "link/new", "new"] {
            assert_eq!(obstacle(&path(good)), None, "{good}");
        }
        let why = |name: &str| obstacle(&path(name)).unwrap();
        assert!(why("file/out").ends_with("/file is no folder"));
        for name in ["dangling", "dangling/out"] {
            assert!(why(name).ends_with("/dangling is a link to nowhere/deep, which is not there"));
        }
    }

    #[test]
    fn a_link_to_a_regular_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "text").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read_to_string(&link).unwrap(), "text");
        assert_eq!(read_to_string_or_pipe(&link, 4).unwrap(), "text");
        assert!(read_to_string_or_pipe(&link, 3).unwrap_err().to_string().contains("longer than 3 bytes"));
    }
}
