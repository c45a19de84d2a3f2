//! Opens all places of pairs that a configuration key names.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use dyad_proto::pairs::json_lines::JsonLines;
use dyad_proto::pairs::source::{Located, PairSource};
use dyad_proto::pairs::wanted::Wanted;
use dyad_proto::run_config::DataFiles;
use dyad_proto::{Fault, files, reading};
use sha2::{Digest, Sha256};

use crate::mixture::{FileShare, Mixture};
use crate::places::{Original, originals};
use crate::remote::Fetch;
use crate::{cache, lines};

/// Checked pairs with the checksum of their content.
#[derive(Debug)]
pub struct Opened {
    /// The pairs.
    pub source: Box<dyn PairSource>,
    /// SHA-256 of the content, lower-case hex: of one file's lines, unpacked; for several files, of the list of their checksums and
    /// weights.
    pub sha256: String,
    /// The places of the configuration.
    pub shares: Vec<FileShare>,
}

/// Reads and checks all files; `key` is their configuration key for errors, e.g. `training_file`.
pub fn whole(key: &str, places: &DataFiles, wanted: Wanted) -> Result<Opened, Fault> {
    let mut mixture = Mixture::default();
    let mut checksums = Vec::new();
    let weights: Vec<Option<f64>> = weights(places);
    let mut shares: Vec<FileShare> = places
        .iter()
        .zip(&weights)
        .map(|(place, &weight)| FileShare { place: place.path.clone(), ids: 0..0, weight })
        .collect();
    for original in fetched(key, places)? {
        let mut digest = Sha256::new();
        let file = JsonLines::load(key, &lines_of(key, &original)?, wanted, &mut |bytes| {
            digest.update(bytes);
            reading::goes_on();
        })?;
        checksums.push((cache::hex(&digest.finalize()), original.entry));
        let first = mixture.len() as u64;
        mixture.add(file);
        let share = &mut shares[original.entry].ids;
        *share = if share.is_empty() { first } else { share.start }..mixture.len() as u64;
    }
    Ok(Opened { source: Box::new(mixture), sha256: combined(&checksums, &weights), shares })
}

/// Like [`whole`], for the pairs of one file that an option of a command names.
pub fn file(key: &str, path: &Path) -> Result<Box<dyn PairSource>, Fault> {
    pairs(key, &path.display().to_string().into(), Wanted::default())
}

/// Like [`whole`], without checksums.
pub fn pairs(key: &str, places: &DataFiles, wanted: Wanted) -> Result<Box<dyn PairSource>, Fault> {
    let mut mixture = Mixture::default();
    for original in fetched(key, places)? {
        mixture.add(JsonLines::load(key, &lines_of(key, &original)?, wanted, &mut |_| {})?);
    }
    Ok(Box::new(mixture))
}

/// The checksum of [`Opened`], without checking the pairs.
pub fn sha256(key: &str, places: &DataFiles) -> Result<String, Fault> {
    let mut checksums = Vec::new();
    for original in fetched(key, places)? {
        let lines = lines_of(key, &original)?;
        let sha256 = cache::sha256(&lines.path)
            .map_err(|error| Fault::input(format!("cannot read {key} {}: {error}", lines.shown)))?;
        checksums.push((sha256, original.entry));
    }
    Ok(combined(&checksums, &weights(places)))
}

/// Weights by place; those of a single place mean nothing.
fn weights(places: &DataFiles) -> Vec<Option<f64>> {
    let alone = places.iter().count() == 1;
    places.iter().map(|place| place.weight.filter(|_| !alone)).collect()
}

fn combined(checksums: &[(String, usize)], weights: &[Option<f64>]) -> String {
    if let [(one, _)] = checksums {
        return one.clone();
    }
    let line = |(sha256, entry): &(String, usize)| match weights[*entry] {
        None => format!("{sha256}\n"),
        Some(weight) => format!("{sha256} {entry} {weight:?}\n"),
    };
    cache::text_sha256(&checksums.iter().map(line).collect::<String>())
}

fn fetched(key: &str, places: &DataFiles) -> Result<Vec<Original>, Fault> {
    Ok(originals(key, places, Fetch::Missing)?.unwrap_or_default())
}

fn lines_of(key: &str, original: &Original) -> Result<Located, Fault> {
    lines::of(key, &original.shown, &original.path)
}

/// The first pairs of a source.
#[derive(Debug)]
pub struct Beginning {
    /// The pairs.
    pub source: Box<dyn PairSource>,
    /// Whether these are all.
    pub whole: bool,
}

/// The first pairs of every file, together about `pairs`, of at most `bytes` bytes each. Fetches nothing: `None` if something was not
/// fetched before.
pub fn beginning(
    key: &str,
    places: &DataFiles,
    wanted: Wanted,
    (pairs, bytes): (usize, u64),
) -> Result<Option<Beginning>, Fault> {
    let Some(originals) = originals(key, places, Fetch::Nothing)? else { return Ok(None) };
    let each = pairs.div_ceil(originals.len().max(1)).max(1);
    let (mut mixture, mut all) = (Mixture::default(), originals.len() <= pairs);
    for original in originals.into_iter().take(pairs) {
        let place = lines_of(key, &original)?;
        let (text, whole) = first_lines(&place.path, each, bytes).map_err(|error| {
            Fault::input(format!("cannot read {key} {}: {error}", place.shown))
                .hint(format!("`{key}` takes the path of a file of preference pairs (docs/data.md)"))
        })?;
        all &= whole;
        mixture.add(JsonLines::of_text(key, &place, wanted, text)?);
    }
    Ok(Some(Beginning { source: Box::new(mixture), whole: all }))
}

/// The first lines of a file, and whether they are the whole file.
fn first_lines(path: &Path, most: usize, bytes: u64) -> std::io::Result<(String, bool)> {
    let file = files::open(path)?;
    let length = file.metadata()?.len();
    let mut reader = BufReader::new(file.take(bytes));
    let mut text = String::new();
    let mut pairs = 0;
    while pairs < most {
        let start = text.len();
        if reader.read_line(&mut text)? == 0 {
            return Ok((text, length <= bytes));
        }
        pairs += usize::from(!text[start..].trim().is_empty());
    }
    Ok((text, false))
}

#[cfg(test)]
mod tests {
    use dyad_proto::run_config::DataFile;

    use super::*;

    fn pair(answer: &str) -> String {
        format!("{{\"prompt\": \"a\", \"chosen\": \"{answer}\", \"rejected\": \"c\"}}\n")
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new(files: &[(&str, String)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                std::fs::write(dir.path().join(name), text).unwrap();
            }
            Self(dir)
        }

        fn places(&self, names: &[(&str, Option<f64>)]) -> DataFiles {
            let place = |(name, weight): &(&str, Option<f64>)| DataFile {
                path: self.0.path().join(name).display().to_string(),
                weight: *weight,
            };
            names.iter().map(place).collect::<Vec<_>>().into()
        }
    }

    #[test]
    fn several_files_are_one_source_and_keep_their_lines() {
        let folder = Folder::new(&[
            ("a.jsonl", pair("1") + "\n" + &pair("2")),
            ("b.jsonl", pair("3")),
            ("c.jsonl", pair("4")),
        ]);
        let opened = whole(
            "training_file",
            &folder.places(&[("[bc].jsonl", Some(1.0)), ("a.jsonl", Some(3.0))]),
            Wanted::default(),
        )
        .unwrap();
        let ids: Vec<_> = opened.shares.iter().map(|share| (share.ids.clone(), share.weight)).collect();
        assert_eq!(ids, [(0..2, Some(1.0)), (2..4, Some(3.0))]);
        let texts: Vec<String> =
            (0..4).map(|id| opened.source.pair(id).unwrap().into_texts()[1].clone()).collect();
        assert_eq!(texts, ["3", "4", "1", "2"]);
        assert!(opened.source.place(1).ends_with("c.jsonl line 1"));
        assert!(opened.source.place(3).ends_with("a.jsonl line 3"));
        assert_eq!(opened.source.files().iter().map(|file| file.first).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn the_checksum_is_of_content_and_weights() {
        let folder =
            Folder::new(&[("a.jsonl", pair("1")), ("b.jsonl", pair("2")), ("copy.jsonl", pair("1"))]);
        let of = |names: &[(&str, Option<f64>)]| {
            let places = folder.places(names);
            let opened = whole("training_file", &places, Wanted::default()).unwrap();
            assert_eq!(sha256("training_file", &places), Ok(opened.sha256.clone()));
            opened.sha256
        };
        let alone = of(&[("a.jsonl", None)]);
        assert_eq!(alone, cache::text_sha256(&pair("1")));
        assert_eq!(alone, of(&[("copy.jsonl", Some(2.0))]), "one place: its weight means nothing");
        let both = of(&[("a.jsonl", None), ("b.jsonl", None)]);
        assert_eq!(both, of(&[("[ab].jsonl", None)]));
        assert_ne!(both, of(&[("b.jsonl", None), ("a.jsonl", None)]));
        let mixed = of(&[("a.jsonl", Some(1.0)), ("b.jsonl", Some(1.0))]);
        assert_ne!(mixed, both);
        assert_ne!(mixed, of(&[("a.jsonl", Some(1.0)), ("b.jsonl", Some(2.0))]));
        assert_eq!(mixed, of(&[("copy.jsonl", Some(1.0)), ("b.jsonl", Some(1.0))]));
    }

    #[test]
    fn a_beginning_takes_pairs_of_every_file() {
        let folder = Folder::new(&[("a.jsonl", pair("1").repeat(9)), ("b.jsonl", pair("2"))]);
        let places = folder.places(&[("a.jsonl", None), ("b.jsonl", None)]);
        let some = beginning("training_file", &places, Wanted::default(), (4, 1 << 20)).unwrap().unwrap();
        assert_eq!((some.source.len(), some.whole), (3, false));
        let all = beginning("training_file", &places, Wanted::default(), (20, 1 << 20)).unwrap().unwrap();
        assert_eq!((all.source.len(), all.whole), (10, true));
    }
}
