//! Opens a data file by its kind, and makes the notes about it that the user sees.

use std::path::Path;

use super::PreferencePair;
use super::json_lines::JsonLines;
use super::source::PairSource;
use crate::Fault;

/// Reads and checks a file; `key` is its configuration key for errors, e.g. `training_file`.
pub fn whole(key: &str, path: &Path) -> Result<Box<dyn PairSource>, Fault> {
    Ok(Box::new(JsonLines::load(key, path)?))
}

/// Like [`whole`], for the beginning of a file.
pub fn beginning(key: &str, path: &Path, text: String) -> Result<Box<dyn PairSource>, Fault> {
    Ok(Box::new(JsonLines::of_text(key, path, text)?))
}

/// Like [`whole`]; `beside` processes the file's bytes in parallel, e.g. to compute a checksum.
pub fn whole_beside<T: Send>(
    key: &str,
    path: &Path,
    beside: impl FnOnce(&[u8]) -> T + Send,
) -> Result<(Box<dyn PairSource>, T), Fault> {
    let (source, other) = JsonLines::load_beside(key, path, |text| beside(text.as_bytes()))?;
    Ok((Box::new(source), other))
}

/// Notes for the user about how a file is read, one sentence each. Empty for the hosted API's form, all of which is read.
#[must_use]
pub fn notes(key: &str, source: &dyn PairSource) -> Vec<String> {
    let mut notes = Vec::new();
    let form = source.form();
    let plain = source.pair(0).is_ok_and(|pair| matches!(pair, PreferencePair::Text(_)));
    if plain {
        notes.push(format!(
            "{key} has {} as plain text ({} form): no chat template is applied, and the end-of-sequence token is added to both outputs",
            form.fields, form.name
        ));
    }
    if !source.passed_over().is_empty() {
        notes.push(format!("{key} has columns that are not read: {}", source.passed_over().join(", ")));
    }
    notes
}
