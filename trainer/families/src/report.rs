//! Report of `trainer check`, which the launcher reads.

use serde::{Deserialize, Serialize};

use crate::Sizes;

/// Findings about a run that can be trained.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ModelFindings {
    /// The model's sizes.
    pub model: Sizes,
    /// Number of weights of the model; `None` if it must be downloaded first.
    pub parameters: Option<u64>,
    /// Number of weights that the run trains; `None` if the model must be downloaded first.
    pub trainable: Option<u64>,
    /// Hub ids that a run would download first; the check has read only their `config.json`.
    pub to_download: Vec<String>,
    /// Most tokens of a sequence; `None` if the model must be downloaded first.
    pub max_seq_length: Option<usize>,
    /// Statistics of the first pairs; `None` if there is no tokenizer yet, or no training file.
    pub pairs: Option<FirstPairs>,
}

/// The first pairs of the training file.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct FirstPairs {
    /// Number of pairs that were tokenised.
    pub pairs: usize,
    /// Tokens of the longest sequence, after truncation.
    pub longest: usize,
    /// Number of pairs that were cut to `max_seq_length`.
    pub truncated: usize,
    /// Number of pairs that a run would drop.
    pub dropped: usize,
    /// Mean tokens of the prompts of pairs that are not dropped.
    pub prompt: f64,
    /// Mean tokens of their preferred answers.
    pub chosen: f64,
    /// Mean tokens of their rejected answers.
    pub rejected: f64,
    /// Notes about the file's format, one sentence each.
    pub notes: Vec<String>,
}
