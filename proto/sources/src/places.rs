//! Finds the files that `training_file` or `validation_file` names: a file, the data files of a folder, the files that match a pattern, or
//! what an address stands for. Files of a folder or pattern come in the order of their names.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dyad_proto::run_config::{DataFile, DataFiles};
use dyad_proto::{Fault, files};

use crate::chosen::{ENDINGS, MATCHING, is_data_file, is_pattern};
use crate::remote::{Fetch, files_of};
use crate::{hub, objects};

/// A file as it is found, perhaps compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Original {
    /// Index of its place in the configuration.
    pub entry: usize,
    /// Its name for messages.
    pub shown: String,
    /// Where it is on this machine.
    pub path: PathBuf,
}

/// The files of all places, in order; fetches what is not here. `None` if `how` asks for nothing and something was not fetched before.
pub fn originals(key: &str, places: &DataFiles, how: Fetch) -> Result<Option<Vec<Original>>, Fault> {
    let mut all: Vec<Original> = Vec::new();
    for (entry, place) in places.iter().enumerate() {
        let found = match place.is_remote() {
            true => match files_of(&place.path, how)? {
                Some(found) => found.into_iter().map(|file| (file.address, file.path)).collect(),
                None => return Ok(None),
            },
            false => here(key, &place.path)?
                .into_iter()
                .map(|path| (path.display().to_string(), path))
                .collect::<Vec<_>>(),
        };
        for (shown, path) in found {
            if all.iter().any(|other| other.shown == shown) {
                return Err(Fault::input(format!("{key}: {shown} is named twice, also by {}", place.path))
                    .hint("name each file once; a weight makes its pairs come more often"));
            }
            all.push(Original { entry, shown, path });
        }
    }
    Ok(Some(all))
}

/// The files of a place on this machine.
fn here(key: &str, path: &str) -> Result<Vec<PathBuf>, Fault> {
    let at = Path::new(path);
    if at.is_dir() {
        return folder(key, at);
    }
    if !is_pattern(path) || at.exists() {
        return Ok(vec![at.to_owned()]);
    }
    let wrong = |error: &dyn std::fmt::Display| {
        Fault::input(format!("{key} {path:?} is no pattern of file names: {error}"))
            .hint("* stands for any part of a name, ** for any folders, ? for one character, [ab] for one of several")
    };
    let found = glob::glob_with(path, MATCHING).map_err(|error| wrong(&error))?;
    let mut files = Vec::new();
    for file in found {
        let file = file.map_err(|error| unreadable(key, path, error.error()))?;
        if !file.is_dir() {
            files.push(file);
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(Fault::input(format!("{key}: no file matches {path}"))
            .hint("relative patterns begin in the folder that the launcher is started in")),
        false => Ok(files),
    }
}

fn folder(key: &str, folder: &Path) -> Result<Vec<PathBuf>, Fault> {
    let failed = |error: io::Error| unreadable(key, &folder.display().to_string(), &error);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if is_data_file(&entry.file_name().to_string_lossy()) && !entry.path().is_dir() {
            files.push(entry.path());
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(Fault::input(format!("{key}: the folder {} holds no files of pairs", folder.display()))
            .hint(format!(
                "their names end in {ENDINGS}; a pattern such as {}/**/*.jsonl finds files in subfolders",
                folder.display()
            ))),
        false => Ok(files),
    }
}

/// Checks the places without fetching anything: files can be opened, patterns match, addresses have the right form.
pub fn look(key: &str, places: &DataFiles) -> Result<(), Fault> {
    for DataFile { path, .. } in places.iter() {
        if path.starts_with("hf://") {
            hub::datasets::check(path)?;
        } else if path.contains("://") {
            objects::check(path)?;
        } else {
            if ["/dev/fd/", "/dev/std", "/proc/self/"].iter().any(|start| path.starts_with(start)) {
                // The coordinator reads the pairs in another process, with other streams.
                return Err(Fault::input(format!(
                    "cannot read {key} {path}: it is a stream of this process"
                ))
                .hint("write the pairs into a file first"));
            }
            for file in here(key, path)? {
                files::open(&file).map_err(|error| unreadable(key, &file.display().to_string(), &error))?;
            }
        }
    }
    Ok(())
}

/// Whether every place on this machine exists.
#[must_use]
pub fn are_here(places: &DataFiles) -> bool {
    let there = |DataFile { path, .. }: &DataFile| {
        Path::new(path).exists() || is_pattern(path) && here("", path).is_ok()
    };
    places.iter().all(|place| place.is_remote() || there(place))
}

fn unreadable(key: &str, shown: &str, error: &io::Error) -> Fault {
    Fault::input(format!("cannot read {key} {shown}: {error}"))
        .hint("paths in the configuration are relative to the folder that the launcher is started in")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(dir: &Path, path: &str) -> Result<Vec<String>, String> {
        let places = DataFiles::from(dir.join(path).display().to_string());
        let originals = originals("training_file", &places, Fetch::Nothing).map_err(|fault| fault.message)?;
        let name = |file: Original| file.path.strip_prefix(dir).unwrap().display().to_string();
        Ok(originals.unwrap().into_iter().map(name).collect())
    }

    #[test]
    fn a_file_a_folder_and_patterns_are_found_in_the_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("d/sub")).unwrap();
        for name in
            ["d/b.jsonl", "d/a.jsonl.gz", "d/README.md", "d/.hidden.jsonl", "d/sub/c.jsonl", "d/x[1].jsonl"]
        {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let all = |path: &str| found(dir.path(), path).unwrap();
        assert_eq!(all("d/README.md"), ["d/README.md"]);
        assert_eq!(all("d"), ["d/a.jsonl.gz", "d/b.jsonl", "d/x[1].jsonl"]);
        assert_eq!(all("d/*.jsonl"), ["d/b.jsonl", "d/x[1].jsonl"]);
        assert_eq!(all("d/**/*.jsonl"), ["d/b.jsonl", "d/sub/c.jsonl", "d/x[1].jsonl"]);
        // A name that is there is no pattern.
        assert_eq!(all("d/x[1].jsonl"), ["d/x[1].jsonl"]);
        assert_eq!(all("d/[ab].jsonl*"), ["d/a.jsonl.gz", "d/b.jsonl"]);
        assert!(found(dir.path(), "d/*.csv").unwrap_err().contains("no file matches"));
        assert!(found(dir.path(), "d/***").unwrap_err().contains("is no pattern"));
        fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(found(dir.path(), "empty").unwrap_err().contains("holds no files of pairs"));
    }

    #[test]
    fn a_file_that_two_places_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("a.jsonl"), "").unwrap();
        let places = [path("*.jsonl"), path("a.jsonl")].map(|path| DataFile { path, weight: None });
        let fault = originals("training_file", &places.to_vec().into(), Fetch::Nothing).unwrap_err();
        assert!(fault.message.contains("a.jsonl is named twice"), "{fault}");
    }
}
