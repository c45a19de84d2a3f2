//! The value of `training_file` and `validation_file`: where pairs come from, and the share of each place. Pure.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Fault;

/// Beginnings of addresses that pairs are fetched from.
pub const SCHEMES: [&str; 3] = ["hf://", "s3://", "gs://"];

/// One place of pairs: a file, a folder, a pattern of file names, or an address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// Path, pattern or address.
    pub path: String,
    /// Share of an epoch, relative to the other places. Absent: every pair is used once an epoch.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "number")]
    pub weight: Option<f64>,
}

impl DataFile {
    /// Whether the pairs have to be fetched from the hub or an object store.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        is_address(&self.path)
    }

    /// Whether the path is a pattern of file names.
    #[must_use]
    pub fn is_pattern(&self) -> bool {
        self.path.contains(['*', '?', '['])
    }
}

/// Whether a text is an address that pairs are fetched from.
#[must_use]
pub fn is_address(path: &str) -> bool {
    SCHEMES.iter().any(|scheme| path.starts_with(scheme))
}

/// Places of pairs, in the order of the configuration. Written as one text, or as a list of texts and of tables `{ path, weight }`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataFiles(Vec<DataFile>);

impl DataFiles {
    /// The places.
    pub fn iter(&self) -> impl Iterator<Item = &DataFile> {
        self.0.iter()
    }

    /// The places, to change their paths.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut DataFile> {
        self.0.iter_mut()
    }

    /// Whether nothing is named.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|file| file.path.is_empty())
    }

    /// The path if there is one place, a file or folder of this machine.
    #[must_use]
    pub fn only_local(&self) -> Option<&str> {
        match self.0.as_slice() {
            [one] if !one.is_remote() && !one.is_pattern() => Some(&one.path),
            _ => None,
        }
    }

    /// Checks what needs no file: shares for all places or none, in range; no place twice. `shares` says whether shares are permitted.
    pub(super) fn check(&self, key: &str, shares: bool) -> Result<(), Fault> {
        let in_key = |what: String| Fault::input(format!("config key `{key}`: {what}"));
        for (at, file) in self.0.iter().enumerate() {
            if file.path.is_empty() && self.0.len() > 1 {
                return Err(in_key(format!("place {} is empty", at + 1)).hint("give each place a path"));
            }
            if self.0[..at].iter().any(|other| other.path == file.path) {
                return Err(in_key(format!("{:?} is named twice", file.path))
                    .hint("name each place once; a weight makes its pairs come more often"));
            }
            let Some(weight) = file.weight else { continue };
            if !shares {
                return Err(in_key(format!("{:?} has a weight", file.path))
                    .hint("weights mix training files; every validation pair is evaluated once"));
            }
            if !(1e-6..=1e6).contains(&weight) {
                return Err(in_key(format!(
                    "weight of {:?}: expected a number from 1e-6 to 1e6, found {weight}",
                    file.path
                ))
                .hint("leave the place out if none of its pairs are wanted"));
            }
        }
        match self.0.iter().find(|file| file.weight.is_none()) {
            Some(without) if self.0.iter().any(|file| file.weight.is_some()) => {
                Err(in_key(format!("{:?} has no weight, but another place has one", without.path))
                    .hint("give every place a weight, its share of an epoch, or none"))
            }
            _ => Ok(()),
        }
    }
}

impl From<&str> for DataFiles {
    fn from(path: &str) -> Self {
        path.to_owned().into()
    }
}

impl From<String> for DataFiles {
    fn from(path: String) -> Self {
        if path.is_empty() { Self::default() } else { Self(vec![DataFile { path, weight: None }]) }
    }
}

impl From<Vec<DataFile>> for DataFiles {
    fn from(files: Vec<DataFile>) -> Self {
        Self(files)
    }
}

impl fmt::Display for DataFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, file) in self.0.iter().enumerate() {
            write!(f, "{}{}", if at == 0 { "" } else { ", " }, file.path)?;
        }
        Ok(())
    }
}

impl Serialize for DataFiles {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [] => serializer.serialize_str(""),
            [DataFile { path, weight: None }] => serializer.serialize_str(path),
            files => {
                let mut list = serializer.serialize_seq(Some(files.len()))?;
                for file in files {
                    match file.weight {
                        None => list.serialize_element(&file.path)?,
                        Some(_) => list.serialize_element(file)?,
                    }
                }
                list.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for DataFiles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FilesVisitor)
    }
}

struct FilesVisitor;

impl<'de> Visitor<'de> for FilesVisitor {
    type Value = DataFiles;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or a list of paths and of { path = \"…\", weight = 1.0 }")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<DataFiles, E> {
        Ok(path.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<DataFiles, A::Error> {
        let items = Vec::<Item>::deserialize(SeqAccessDeserializer::new(items))?;
        Ok(DataFiles(items.into_iter().map(|Item(file)| file).collect()))
    }
}

/// An item of the list.
struct Item(DataFile);

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or { path = \"…\", weight = 1.0 }")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<Item, E> {
        Ok(Item(DataFile { path: path.to_owned(), weight: None }))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Item, A::Error> {
        DataFile::deserialize(MapAccessDeserializer::new(fields)).map(Item)
    }
}

/// A number, written with or without a decimal point.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Whole(i64),
        Real(f64),
    }
    let number =
        Number::deserialize(deserializer).map_err(|_| D::Error::custom("weight: expected a number"))?;
    Ok(Some(match number {
        Number::Whole(whole) => whole as f64,
        Number::Real(real) => real,
    }))
}

#[cfg(test)]
mod tests {
    use crate::RunConfig;

    fn load(value: &str) -> Result<RunConfig, String> {
        let text = format!("model = \"m\"\ntraining_file = {value}\noutput_dir = \"o\"\n");
        RunConfig::from_toml(&text, "run.toml", &[]).map_err(|fault| fault.message)
    }

    #[test]
    fn a_path_and_lists_are_read_and_written_in_the_same_form() {
        for (toml, json) in [
            (r#""a.jsonl""#, r#""a.jsonl""#),
            (r#"["a.jsonl"]"#, r#""a.jsonl""#),
            (r#"["a", "b/*.parquet"]"#, r#"["a","b/*.parquet"]"#),
            (
                r#"[{ path = "a", weight = 3 }, { path = "s3://b/c", weight = 0.5 }]"#,
                r#"[{"path":"a","weight":3.0},{"path":"s3://b/c","weight":0.5}]"#,
            ),
        ] {
            let config = load(toml).unwrap();
            assert_eq!(serde_json::to_string(&config.training_file).unwrap(), json);
            assert_eq!(RunConfig::from_json(&config.to_json().unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn lists_that_mean_nothing_are_refused() {
        for (toml, words) in [
            ("[]", "missing"),
            (r#"["a", ""]"#, "place 2 is empty"),
            (r#"["a", "a"]"#, "\"a\" is named twice"),
            (r#"["a", { path = "b", weight = 1 }]"#, "\"a\" has no weight"),
            (r#"[{ path = "b", weight = 0 }]"#, "expected a number from 1e-6 to 1e6, found 0"),
            (r#"[{ path = "b", weight = "x" }]"#, "weight: expected a number"),
            (r#"[{ path = "b", wieght = 1 }]"#, "unknown field `wieght`"),
            ("7", "expected a path, or a list of paths"),
            ("[7]", "expected a path, or {"),
            (r#""https://a/b""#, "is an address, not a path"),
        ] {
            let message = load(toml).unwrap_err();
            assert!(message.contains(words), "{toml}: {message}");
        }
        let text = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\nvalidation_file = [{ path = \"v\", weight = 1 }]\n";
        let fault = RunConfig::from_toml(text, "run.toml", &[]).unwrap_err();
        assert!(fault.message.contains("`validation_file`: \"v\" has a weight"), "{fault}");
    }
}
