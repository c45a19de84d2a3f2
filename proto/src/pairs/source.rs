//! Access to pairs by number, for any kind of file.

use std::fmt::Debug;

use super::PreferencePair;
use super::forms::Form;
use crate::Fault;

/// Checked pairs, numbered from 0 in the file's order. Duplicates are kept.
#[allow(clippy::len_without_is_empty, reason = "a source is never empty: opening one without a pair fails")]
pub trait PairSource: Debug + Send + Sync {
    /// Path of the file, for messages.
    fn path(&self) -> &str;

    /// Number of pairs.
    fn len(&self) -> usize;

    /// Form of the file's records.
    fn form(&self) -> &'static Form;

    /// Names of fields that are not read.
    fn passed_over(&self) -> &[String];

    /// Bytes of a pair in the file; its wire form is not larger.
    fn bytes(&self, id: u64) -> usize;

    /// Line of a pair, 1-based, counting blank lines.
    fn line(&self, id: u64) -> u64;

    /// Parses one pair.
    fn pair(&self, id: u64) -> Result<PreferencePair, Fault>;

    /// File and line of a pair, for messages.
    fn place(&self, id: u64) -> String {
        format!("{} line {}", self.path(), self.line(id))
    }
}
