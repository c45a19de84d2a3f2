//! Pairs by number, wherever they lie.

use std::fmt::Debug;

use super::PreferencePair;
use super::forms::Form;
use crate::Fault;

/// Checked pairs, numbered from 0 in the file's order. Two equal pairs are two.
#[allow(clippy::len_without_is_empty, reason = "a source without a pair is an error where it is opened")]
pub trait PairSource: Debug + Send + Sync {
    /// The file, as people know it.
    fn path(&self) -> &str;

    /// How many pairs there are.
    fn len(&self) -> usize;

    /// How the file says a pair.
    fn form(&self) -> &'static Form;

    /// Names of fields that are not read.
    fn passed_over(&self) -> &[String];

    /// Bytes of a pair as it is written; on the wire it takes no more.
    fn bytes(&self, id: u64) -> usize;

    /// Line of a pair, from 1 on, blank lines counted.
    fn line(&self, id: u64) -> u64;

    /// One pair, parsed.
    fn pair(&self, id: u64) -> Result<PreferencePair, Fault>;

    /// Where a pair stands, as people find it.
    fn place(&self, id: u64) -> String {
        format!("{} line {}", self.path(), self.line(id))
    }
}
