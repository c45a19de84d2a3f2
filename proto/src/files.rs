//! Reading files and folders. Only regular files are read: a pipe without a writer would block for ever, and a device may never end.
//!
//! Only this module opens files for reading; clippy refuses `std::fs::read` and the like elsewhere.
#![allow(clippy::disallowed_methods, reason = "this module implements the allowed way to read files")]

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::{Fault, counted, reading};

/// Maximum size in bytes of a file that is read whole: larger than any tokenizer, and small enough for memory.
pub const MOST_BYTES: u64 = 256 << 20;
/// Number of files that a program needs to open to start.
const NEEDED: usize = 16;

/// Opens a regular file for reading; for any other kind of file, fails and names the kind.
pub fn open(path: &Path) -> io::Result<File> {
    reading::opens(path);
    // Check before opening: opening a device may have side effects.
    regular(&fs::metadata(path)?)?;
    // The file may have been replaced since: opening a pipe must not wait for its writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    regular(&file.metadata()?)?;
    Ok(file)
}

/// Fails if the limit of open files is too low to start: one clear error instead of a different one for each first step.
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

/// The bytes of a regular file of any size, such as the metrics that a run appends to.
pub fn read_rows(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of a file of the kernel, below `/proc` or `/sys`.
pub fn of_kernel(path: impl AsRef<Path>) -> io::Result<String> {
    fs::read_to_string(path)
}

/// Syncs a folder's entries to the disk.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    open_folder(path)?.sync_all()
}

/// Opens a folder, to lock or to sync it.
pub fn open_folder(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)
}

/// The text of a regular file, or of a pipe that the user's shell opened for this process (`<(…)`, `/dev/stdin`). Fails above `most`
/// bytes.
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

/// Returns why no folder can exist at this path, or `None`. The file system's own message for this can mislead.
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
    fn pipes_sockets_folders_and_devices_are_refused_without_waiting() {
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
    fn a_file_above_the_size_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        File::create(&path).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("longer than 268435456 bytes"));
    }

    #[test]
    fn an_obstacle_to_a_folder_is_named() {
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
