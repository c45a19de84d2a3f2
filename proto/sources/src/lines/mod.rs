//! Turns a file of any supported kind into a file of lines. Plain JSON Lines are read where they are; of every other file an unpacked
//! copy is made in the cache, named by the SHA-256 of the original. The kind is decided by the content, not by the name.

mod array;
mod table;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use dyad_proto::pairs::source::{Located, Unit};
use dyad_proto::{Fault, files};

use crate::{alive, cache};

/// Part of the name of every unpacked copy. Increase it whenever another text is made from the same file.
const VERSION: u32 = 1;
/// Bytes at the beginning of a file that decide its kind.
const BEGINNING: usize = 64 << 10;

/// Kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Lines,
    Gzip,
    Zstandard,
    Parquet,
    Array,
}

impl Kind {
    fn of(beginning: &[u8]) -> Self {
        match beginning {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstandard,
            // A skippable frame, with which pzstd begins.
            [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50 => Self::Zstandard,
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            _ if array::begins(beginning) => Self::Array,
            _ => Self::Lines,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Lines => "lines",
            Self::Gzip => "gzip",
            Self::Zstandard => "zstd",
            Self::Parquet => "parquet",
            Self::Array => "array",
        }
    }
}

/// The file of lines of `path`, which the user knows as `shown`; `key` is its configuration key for errors.
pub fn of(key: &str, shown: &str, path: &Path) -> Result<Located, Fault> {
    let unreadable = |error: io::Error| {
        Fault::input(format!("cannot read {key} {shown}: {error}"))
            .hint(format!("`{key}` takes the path of a file of preference pairs (docs/data.md)"))
    };
    let mut at = path.to_owned();
    let mut unit = Unit::Line;
    // A compressed file may hold an array; nothing else is nested.
    for _ in 0..2 {
        let kind = Kind::of(&beginning(&at).map_err(unreadable)?);
        unit = match kind {
            Kind::Lines => break,
            Kind::Parquet => Unit::Row,
            Kind::Array => Unit::Item,
            Kind::Gzip | Kind::Zstandard => Unit::Line,
        };
        let name = format!("{}-{}-{VERSION}.jsonl", cache::sha256(&at).map_err(unreadable)?, kind.name());
        at = cache::file(&name, |to| {
            let file = files::open(&at).map_err(unreadable)?;
            tracing::info!(file = shown, kind = kind.name(), "unpacking into the cache");
            unpack(kind, file, to).map_err(|problem| problem.fault(key, shown, unit))
        })?;
    }
    Ok(Located { shown: shown.to_owned(), path: at, unit })
}

fn beginning(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(BEGINNING);
    files::open(path)?.take(BEGINNING as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Why a file cannot be unpacked.
#[derive(Debug)]
enum Problem {
    /// The original is damaged, or holds what cannot be expressed.
    Content { what: String, at: Option<u64> },
    /// The copy cannot be written.
    Writing(io::Error),
}

impl Problem {
    fn content(what: impl ToString) -> Self {
        Self::Content { what: what.to_string(), at: None }
    }

    fn fault(self, key: &str, shown: &str, unit: Unit) -> Fault {
        match self {
            Self::Content { what, at: Some(at) } => Fault::input(format!("{shown} {unit} {at}: {what}"))
                .hint("the file is damaged, or was cut off while it was written or copied"),
            Self::Content { what, at: None } => Fault::input(format!("{key} {shown} cannot be unpacked: {what}"))
                .hint("the file is damaged, or was cut off while it was written or copied"),
            Self::Writing(error) => Fault::failed(format!("cannot keep the unpacked {shown}: {error}")).hint(
                "unpacked files of pairs are kept in the user's cache folder; XDG_CACHE_HOME chooses another one",
            ),
        }
    }
}

fn unpack(kind: Kind, file: File, to: &mut dyn Write) -> Result<(), Problem> {
    let buffered = |file| BufReader::with_capacity(1 << 20, file);
    match kind {
        Kind::Lines => Ok(()),
        Kind::Gzip => copy(&mut flate2::bufread::MultiGzDecoder::new(buffered(file)), to),
        Kind::Zstandard => {
            let mut decoder = zstd::stream::read::Decoder::new(file).map_err(Problem::content)?;
            // As `zstd --long=31` writes; the memory is used only by such files.
            decoder.window_log_max(31).map_err(Problem::content)?;
            copy(&mut decoder, to)
        }
        Kind::Array => array::unpack(buffered(file), to),
        Kind::Parquet => table::unpack(file, to),
    }
}

fn copy(from: &mut dyn Read, to: &mut dyn Write) -> Result<(), Problem> {
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = from.read(&mut piece).map_err(Problem::content)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&piece[..read]).map_err(Problem::Writing)?;
        alive::advance();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(bytes: &[u8]) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, bytes).unwrap();
        let kind = Kind::of(&beginning(&path).unwrap());
        let mut to = Vec::new();
        let done = unpack(kind, files::open(&path).unwrap(), &mut to);
        done.map_err(|problem| problem.fault("training_file", "f", Unit::Line).message)?;
        Ok(String::from_utf8(to).unwrap())
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn compressed_files_of_several_members_are_unpacked_whole() {
        assert_eq!(unpacked(&[gzip("{}\n"), gzip("{\"a\": 1}\n")].concat()).unwrap(), "{}\n{\"a\": 1}\n");
        let zstandard = |text: &str| zstd::encode_all(text.as_bytes(), 3).unwrap();
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7];
        let bytes = [&skippable[..], &zstandard("{}\n"), &zstandard("[]\n")].concat();
        assert_eq!(unpacked(&bytes).unwrap(), "{}\n[]\n");
    }

    #[test]
    fn a_damaged_compressed_file_is_refused() {
        let whole = gzip(&"{\"a\": 1}\n".repeat(1000));
        for bytes in [&whole[..whole.len() - 9], &[&whole[..], b"rest"].concat(), b"\x1f\x8b\x08\0"] {
            let message = unpacked(bytes).unwrap_err();
            assert!(message.starts_with("training_file f cannot be unpacked: "), "{message}");
        }
        let whole = zstd::encode_all(&b"{}\n".repeat(1000)[..], 3).unwrap();
        assert!(unpacked(&whole[..whole.len() - 1]).is_err());
    }

    #[test]
    fn kinds_are_known_by_content() {
        for (bytes, kind) in [
            (&b"\xef\xbb\xbf [\n\t{\"a\""[..], Kind::Array),
            (b"[[1]]", Kind::Lines),
            (b"[]", Kind::Lines),
            (b"{}", Kind::Lines),
            (b"", Kind::Lines),
            (b"PAR1", Kind::Parquet),
        ] {
            assert_eq!(Kind::of(bytes), kind, "{bytes:?}");
        }
    }
}
