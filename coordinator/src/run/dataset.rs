//! The data files of a run: preference pairs by id; each file has a hash.

use std::sync::Arc;

use dyad_proto::pairs::notes;
use dyad_proto::pairs::source::PairSource;
use dyad_proto::pairs::wanted::Wanted;
use dyad_proto::run_config::DataFiles;
use dyad_proto::{Fault, RunConfig, wire};
use dyad_sources::FileShare;
use dyad_sources::open::{self, Opened};

/// All pairs of one configuration key.
#[derive(Debug)]
pub struct Dataset {
    source: Arc<dyn PairSource>,
    sha256: String,
    /// Number of records that are used.
    records: usize,
    shares: Vec<FileShare>,
    path: String,
}

impl Dataset {
    /// Reads and checks all files; `key` is the config key that named them.
    pub fn load(key: &str, places: &DataFiles, wanted: Wanted) -> Result<Self, Fault> {
        let Opened { source, sha256, shares } = open::whole(key, places, wanted)?;
        Ok(Self { records: source.len(), source: source.into(), sha256, shares, path: places.to_string() })
    }

    /// The places of the pairs, with their weights.
    #[must_use]
    pub fn shares(&self) -> &[FileShare] {
        &self.shares
    }

    /// SHA-256 of the content, lower-case hex.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Number of records; their ids are 0 to one less than it.
    #[must_use]
    pub fn records(&self) -> usize {
        self.records
    }

    /// Bytes of each record, by id.
    pub fn record_bytes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.records as u64).map(|id| self.source.bytes(id))
    }

    /// What the configuration names.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// One record's place for a message, such as file and line.
    #[must_use]
    pub fn place(&self, id: u64) -> String {
        self.source.place(id)
    }

    /// One record as a wire message.
    pub fn pair(&self, id: u64) -> Result<wire::Pair, Fault> {
        Ok(self.source.pair(id)?.into_wire(id, self.source.place(id)))
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
        let wanted = Wanted::of(config);
        let validation = config.validation_file.as_ref();
        Ok(Self {
            train: Dataset::load("training_file", &config.training_file, wanted)?,
            validation: validation
                .map(|files| Dataset::load("validation_file", files, wanted))
                .transpose()?,
        })
    }

    /// Loads only the validation file of a run that does not train.
    pub fn to_evaluate(config: &RunConfig) -> Result<Self, Fault> {
        let files = config.validation_file.clone().unwrap_or_default();
        let validation = Dataset::load("--file", &files, Wanted::of(config))?;
        let Dataset { source, sha256, path, .. } = &validation;
        let (source, sha256, path) = (Arc::clone(source), sha256.clone(), path.clone());
        let train = Dataset { source, sha256, path, shares: Vec::new(), records: 0 };
        Ok(Self { train, validation: Some(validation) })
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
        let of = |key, dataset: &Dataset| notes::of(key, &*dataset.source);
        let validation = self.validation.as_ref().map(|dataset| of("validation_file", dataset));
        if self.train.records == 0 {
            return validation.unwrap_or_default();
        }
        [of("training_file", &self.train), validation.unwrap_or_default()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;

    fn load(text: impl AsRef<[u8]>) -> Result<Dataset, Fault> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, text).unwrap();
        Dataset::load("training_file", &path.display().to_string().into(), Wanted::default())
    }

    #[test]
    fn keeps_duplicates_and_skips_blank_lines() {
        let data = load(format!("{GOOD}\n\n  {GOOD}\r\n{GOOD}")).unwrap();
        assert_eq!(data.records(), 3);
        for (id, line) in [(0, 1), (1, 3), (2, 4)] {
            let place = data.place(id);
            assert!(place.ends_with(&format!("pairs.jsonl line {line}")), "{place}");
            let expected = dyad_proto::pairs::forms::parse(GOOD).unwrap().into_wire(id, place);
            assert_eq!(data.pair(id), Ok(expected));
        }
        assert!(data.record_bytes().all(|bytes| (GOOD.len()..GOOD.len() + 4096).contains(&bytes)));
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
        assert!(load("\n \n").unwrap_err().message.ends_with("holds no records"));
        let fault = load([GOOD.as_bytes(), b"\n\xff\n"].concat()).unwrap_err();
        assert!(fault.message.ends_with("pairs.jsonl line 2: not valid UTF-8"), "{fault}");
        let fault =
            Dataset::load("validation_file", &"/nowhere/v.jsonl".into(), Wanted::default()).unwrap_err();
        assert!(
            fault.message.starts_with("cannot read validation_file /nowhere/v.jsonl: No such file"),
            "{fault}"
        );
        assert!(fault.hint.contains("`validation_file`"));
    }
}
