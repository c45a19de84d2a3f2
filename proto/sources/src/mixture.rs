//! Several files as one source of pairs. Ids go on from one file to the next.

use std::ops::Range;

use dyad_proto::Fault;
use dyad_proto::pairs::Example;
use dyad_proto::pairs::json_lines::JsonLines;
use dyad_proto::pairs::source::{FileNotes, PairSource};

/// The pairs of one place of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct FileShare {
    /// Path, pattern or address, for messages.
    pub place: String,
    /// Its pairs.
    pub ids: Range<u64>,
    /// Its share of an epoch relative to the other places; `None` if every pair is used once an epoch.
    pub weight: Option<f64>,
}

/// Files, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Mixture {
    files: Vec<JsonLines>,
    /// Id of the first pair of each file.
    firsts: Vec<u64>,
    len: usize,
}

impl Mixture {
    pub(crate) fn add(&mut self, file: JsonLines) {
        self.firsts.push(self.len as u64);
        self.len += file.len();
        self.files.push(file);
    }

    /// The file of a pair, and the pair's id in it.
    fn at(&self, id: u64) -> (&JsonLines, u64) {
        let file = self.firsts.partition_point(|first| *first <= id).saturating_sub(1);
        (&self.files[file], id - self.firsts[file])
    }
}

impl PairSource for Mixture {
    fn len(&self) -> usize {
        self.len
    }

    fn files(&self) -> Vec<FileNotes<'_>> {
        let mut all = Vec::new();
        for (file, &first) in self.files.iter().zip(&self.firsts) {
            all.extend(file.files().into_iter().map(|notes| FileNotes { first, ..notes }));
        }
        all
    }

    fn bytes(&self, id: u64) -> usize {
        let (file, id) = self.at(id);
        file.bytes(id)
    }

    fn pair(&self, id: u64) -> Result<Example, Fault> {
        let (file, id) = self.at(id);
        file.pair(id)
    }

    fn place(&self, id: u64) -> String {
        let (file, id) = self.at(id);
        file.place(id)
    }
}
