//! Reads the text and JSON files of a model folder. A missing file is `None`; an unreadable one is an error.

use std::io::ErrorKind;
use std::path::Path;

use dyad_proto::Fault;
use serde_json::{Map, Value};

use dyad_proto::lfs::refuse_pointer;

/// Whether the path exists. A dangling link exists too, so that reading it reports the error.
#[must_use]
pub fn is_there(path: &Path) -> bool {
    !path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Text of a file; `None` if the file is missing.
pub fn text(path: &Path) -> Result<Option<String>, Fault> {
    let bytes = match dyad_proto::files::read(path) {
        Ok(bytes) => bytes,
        // A dangling link is an error, not a missing file.
        Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => return Ok(None),
        Err(error) => {
            return Err(Fault::input(format!("cannot read {}: {error}", path.display()))
                .hint("make it a file that this user may read, or remove it"));
        }
    };
    refuse_pointer(path, &bytes)?;
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Fault::input(format!("{} is no UTF-8 text at byte {at}", path.display())).hint("save it as UTF-8")
    })
}

/// The object in a JSON file; `None` if the file is missing.
pub fn object(path: &Path) -> Result<Option<Map<String, Value>>, Fault> {
    let Some(text) = text(path)? else { return Ok(None) };
    let broken = |error: serde_json::Error| {
        Fault::input(format!("{}: {error}", path.display())).hint("the file has to hold one JSON object")
    };
    serde_json::from_str(&text).map(Some).map_err(broken)
}
