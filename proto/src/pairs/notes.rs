//! Notes about files of records that the user sees.

use super::Content;
use super::source::PairSource;

/// Notes for the user about how files are read, one sentence each: the form of each file, and what is particular about it.
#[must_use]
pub fn of(key: &str, source: &dyn PairSource) -> Vec<String> {
    let mut notes = Vec::new();
    let files = source.files();
    for file in &files {
        // One file is known by its key.
        let name = if files.len() == 1 { key.to_owned() } else { format!("{key} {}", file.path) };
        let first = source.pair(file.first).ok().map(|example| example.content);
        let how = match first {
            Some(Content::Text(_)) => {
                " as plain text: no chat template is applied, and the end-of-sequence token is added to the outputs"
            }
            _ => "",
        };
        notes.push(format!("{name} has {} ({} form){how}", file.form.fields, file.form.name));
        if !file.passed_over.is_empty() {
            notes.push(format!("{name} has columns that are not read: {}", file.passed_over.join(", ")));
        }
    }
    notes
}
