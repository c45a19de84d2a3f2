//! The folder of fetched and unpacked files: `dyad/data` in the user's cache folder. Names are hashes of what a file was made from, so
//! that a file never changes; whatever no run is reading may be removed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use dyad_proto::{Fault, files, safe_file};
use sha2::{Digest, Sha256};

use crate::alive;

/// Bytes that are hashed or copied at once.
const PIECE: usize = 1 << 20;

/// The folder, which is made if it does not exist.
pub fn folder() -> Result<PathBuf, Fault> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    let folder = cache.filter(|cache| cache.is_absolute()).map(|cache| cache.join("dyad/data"));
    let folder = folder.ok_or_else(|| {
        Fault::input("there is no cache folder for fetched and unpacked files of pairs")
            .hint("set XDG_CACHE_HOME or HOME to an absolute path")
    })?;
    safe_file::folder(&folder).map_err(|error| unwritable(&folder, &error))?;
    Ok(folder)
}

/// The cached file of this name; calls `make` for its content if it is not there.
pub fn file(name: &str, make: impl FnOnce(&mut dyn Write) -> Result<(), Fault>) -> Result<PathBuf, Fault> {
    let path = folder()?.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let scratch = path.with_file_name(format!("{name}.{}.tmp", std::process::id()));
    let made = written(&scratch, make).and_then(|()| {
        // Two processes may make the same file: both have the same content.
        fs::rename(&scratch, &path).map_err(|error| unwritable(&path, &error))
    });
    if made.is_err() {
        let _ = fs::remove_file(&scratch);
    }
    made.map(|()| path)
}

fn written(scratch: &Path, make: impl FnOnce(&mut dyn Write) -> Result<(), Fault>) -> Result<(), Fault> {
    let failed = |error: io::Error| unwritable(scratch, &error);
    let file = safe_file::create(scratch).map_err(failed)?;
    let mut buffered = BufWriter::with_capacity(PIECE, file);
    make(&mut buffered)?;
    let file = buffered.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)
}

/// The error of a cached file that cannot be written.
#[must_use]
pub fn unwritable(path: &Path, error: &io::Error) -> Fault {
    Fault::failed(format!("cannot write {}: {error}", path.display()))
        .hint("fetched and unpacked files of pairs are kept in the user's cache folder; XDG_CACHE_HOME chooses another one")
}

/// SHA-256 of a file's bytes as lower-case hex digits.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file: File = files::open(path)?;
    let (mut digest, mut piece) = (Sha256::new(), vec![0; PIECE]);
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok(hex(&digest.finalize()));
        }
        digest.update(&piece[..read]);
        alive::advance();
    }
}

/// SHA-256 of a text as lower-case hex digits.
#[must_use]
pub fn text_sha256(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Lower-case hex digits of some bytes.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing into a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
