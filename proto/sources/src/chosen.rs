//! Which of many names a place means, and what was fetched for it. Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A fetched file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Its own address.
    pub address: String,
    /// Where it is on this machine.
    pub path: PathBuf,
}

/// Chooses among names: the one that is `wanted`, or those that match the pattern, or the data files of the folder. Sorted.
#[must_use]
pub fn chosen<'n>(names: impl Iterator<Item = &'n str> + Clone, wanted: &str) -> Vec<&'n str> {
    let mut found: Vec<&str> = names.clone().filter(|name| *name == wanted).collect();
    if found.is_empty() && is_pattern(wanted) {
        let Ok(pattern) = glob::Pattern::new(wanted) else { return found };
        found = names.filter(|name| pattern.matches_with(name, MATCHING)).collect();
    } else if found.is_empty() && !wanted.is_empty() {
        let folder = wanted.trim_end_matches('/').to_owned() + "/";
        let inside = |name: &&str| {
            name.strip_prefix(&folder).is_some_and(|rest| !rest.contains('/') && is_data_file(rest))
        };
        found = names.filter(inside).collect();
    }
    found.sort_unstable();
    found
}

/// As a shell matches names: `*` stays within a folder, and names that begin with a dot are hidden.
pub const MATCHING: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Whether a text holds a wildcard.
#[must_use]
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// Whether a folder's file of this name holds pairs.
#[must_use]
pub fn is_data_file(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let plain = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst"));
    let text = |name: &str| [".jsonl", ".ndjson", ".json"].iter().any(|end| name.ends_with(end));
    !name.starts_with(['.', '_']) && (plain.is_some_and(text) || text(&name) || name.ends_with(".parquet"))
}

/// The endings of [`is_data_file`], for messages.
pub const ENDINGS: &str = ".jsonl, .ndjson, .json, each also .gz or .zst, or .parquet";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_a_pattern_and_a_folder_choose_files() {
        let names =
            ["data/b.parquet", "data/a.parquet", "data/README.md", "data/old/c.parquet", "train.jsonl.gz"];
        for (wanted, expected) in [
            ("train.jsonl.gz", &["train.jsonl.gz"][..]),
            ("data/*.parquet", &["data/a.parquet", "data/b.parquet"]),
            ("data", &["data/a.parquet", "data/b.parquet"]),
            ("data/", &["data/a.parquet", "data/b.parquet"]),
            ("**/*.parquet", &["data/a.parquet", "data/b.parquet", "data/old/c.parquet"]),
            ("data/README.md", &["data/README.md"]),
            ("dat", &[]),
            ("", &[]),
        ] {
            assert_eq!(chosen(names.iter().copied(), wanted), expected, "{wanted}");
        }
    }

    #[test]
    fn endings_of_data_files() {
        for name in ["a.jsonl", "a.JSONL", "a.json.gz", "a.ndjson.zst", "a-00000-of-00001.parquet"] {
            assert!(is_data_file(name), "{name}");
        }
        for name in
            ["README.md", ".a.jsonl", "_a.jsonl", "a.parquet.gz", "a.jsonl.tmp", "a.csv", "dataset_info"]
        {
            assert!(!is_data_file(name), "{name}");
        }
    }
}
