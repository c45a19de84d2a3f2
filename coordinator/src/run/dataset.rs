//! The data files of a run: preference pairs by id; each file has a hash.

use std::path::Path;

use dyad_proto::pairs::open;
use dyad_proto::pairs::source::PairSource;
use dyad_proto::{Fault, RunConfig, reading, wire};
use sha2::{Digest, Sha256};

/// All pairs of one file.
#[derive(Debug)]
pub struct Dataset {
    source: Box<dyn PairSource>,
    sha256: String,
}

impl Dataset {
    /// Reads and checks a whole file; `key` is the config key that named it.
    pub fn load(key: &str, path: &Path) -> Result<Self, Fault> {
        let (source, sha256) = open::whole_beside(key, path, sha256)?;
        Ok(Self { source, sha256 })
    }

    /// SHA-256 of the file's bytes, lower-case hex.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Number of records; their ids are 0 to one less than it.
    #[must_use]
    pub fn records(&self) -> usize {
        self.source.len()
    }

    /// Bytes of each record, by id.
    pub fn record_bytes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.source.len() as u64).map(|id| self.source.bytes(id))
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &str {
        self.source.path()
    }

    /// One record's place for a message, such as file and line.
    #[must_use]
    pub fn place(&self, id: u64) -> String {
        self.source.place(id)
    }

    /// One record as a wire message.
    pub fn pair(&self, id: u64) -> Result<wire::Pair, Fault> {
        let content = self.source.pair(id)?.into();
        Ok(wire::Pair { id, content: Some(content), reference: None, line: self.source.line(id) })
    }
}

/// The files of a run.
#[derive(Debug)]
pub struct Datasets {
    /// The training pairs.
    pub train: Dataset,
    /// The validation pairs, if there are any.
    pub validation: Option<Dataset>,
}

impl Datasets {
    /// Loads the files that the config names.
    pub fn load(config: &RunConfig) -> Result<Self, Fault> {
        let load = |key, file: &String| Dataset::load(key, Path::new(file));
        Ok(Self {
            train: load("training_file", &config.training_file)?,
            validation: config
                .validation_file
                .as_ref()
                .map(|file| load("validation_file", file))
                .transpose()?,
        })
    }

    /// SHA-256 of the validation file; empty without one.
    #[must_use]
    pub fn validation_sha256(&self) -> &str {
        self.validation.as_ref().map_or("", Dataset::sha256)
    }

    /// The file of a split.
    #[must_use]
    pub fn of(&self, split: wire::Split) -> Option<&Dataset> {
        if split == wire::Split::Validation { self.validation.as_ref() } else { Some(&self.train) }
    }

    /// The pairs with these ids; none if the split has no file.
    pub fn pairs(
        &self,
        split: wire::Split,
        ids: impl IntoIterator<Item = u64>,
    ) -> Result<Vec<wire::Pair>, Fault> {
        self.of(split)
            .map_or_else(|| Ok(Vec::new()), |dataset| ids.into_iter().map(|id| dataset.pair(id)).collect())
    }

    /// Notes for the user on how the files are read, one sentence each.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let of = |key, dataset: &Dataset| open::notes(key, &*dataset.source);
        let validation = self.validation.as_ref().map(|dataset| of("validation_file", dataset));
        [of("training_file", &self.train), validation.unwrap_or_default()].concat()
    }
}

/// SHA-256 as lower-case hex digits. Reports progress in between, because large files take long.
fn sha256(bytes: &[u8]) -> String {
    let mut digest = Sha256::new();
    for part in bytes.chunks(1 << 24) {
        digest.update(part);
        reading::goes_on();
    }
    hex(&digest.finalize())
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

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn load(text: impl AsRef<[u8]>) -> Result<Dataset, Fault> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, text).unwrap();
        Dataset::load("training_file", &path)
    }

    #[test]
    fn keeps_duplicates_and_skips_blank_lines() {
        let data = load(format!("{GOOD}\n\n  {GOOD}\r\n{GOOD}")).unwrap();
        assert_eq!(data.records(), 3);
        for (id, line) in [(0, 1), (1, 3), (2, 4)] {
            let content = Some(dyad_proto::pairs::forms::parse(GOOD).unwrap().into());
            assert_eq!(data.pair(id), Ok(wire::Pair { id, content, reference: None, line }));
        }
        assert!(data.place(1).ends_with("pairs.jsonl line 3"));
        assert_eq!(data.record_bytes().collect::<Vec<_>>(), [GOOD.len(); 3]);
    }

    #[test]
    fn hash_is_that_of_the_file() {
        // Output of `sha256sum` for GOOD with a line end.
        let data = load(format!("{GOOD}\n")).unwrap();
        assert_eq!(data.sha256(), "0a6171d07d4f15187c58b3a5ab1a23e8209ddedafd4befafb366fc98c954e017");
    }

    #[test]
    fn counts_all_bad_lines_and_shows_the_first() {
        let fault = load(format!("{GOOD}\n{{\n{GOOD}\n[]\n7\n")).unwrap_err();
        assert_eq!(fault.code.exit_status(), 2);
        assert!(fault.message.contains("pairs.jsonl line 2: record: not valid JSON"), "{fault}");
        assert!(fault.message.ends_with("(the first of 3 bad lines)"), "{fault}");
    }

    #[test]
    fn empty_missing_and_binary_files_are_named() {
        assert!(load("\n \n").unwrap_err().message.ends_with("holds no preference pairs"));
        let fault = load([GOOD.as_bytes(), b"\n\xff\n"].concat()).unwrap_err();
        assert!(fault.message.ends_with("pairs.jsonl line 2: not valid UTF-8"), "{fault}");
        let fault = Dataset::load("validation_file", Path::new("/nowhere/v.jsonl")).unwrap_err();
        assert!(
            fault.message.starts_with("cannot read validation_file /nowhere/v.jsonl: No such file"),
            "{fault}"
        );
        assert!(fault.hint.contains("`validation_file`"));
    }
}
