//! What `trainer check` says of a run's start, and the launcher reads.

use serde::{Deserialize, Serialize};

use crate::Sizes;

/// What was found; all of it can be trained.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ModelFindings {
    /// The model's sizes.
    pub model: Sizes,
    /// Weights of the model; None where it is still to be downloaded.
    pub parameters: Option<u64>,
    /// Weights that the run trains; None where the model is still to be downloaded.
    pub trainable: Option<u64>,
    /// Hub ids that a run would download first: of those only `config.json` was read.
    pub to_download: Vec<String>,
    /// Most tokens of a sequence; None where the model is still to be downloaded.
    pub max_seq_length: Option<usize>,
    /// What became of the first pairs; None where there is no tokenizer yet, or no training file.
    pub pairs: Option<FirstPairs>,
}

/// The first pairs of the training file.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct FirstPairs {
    /// How many were turned into tokens.
    pub pairs: usize,
    /// Tokens of the longest sequence, after cutting.
    pub longest: usize,
    /// Cut at `max_seq_length`.
    pub truncated: usize,
    /// Pairs that a run would leave out.
    pub dropped: usize,
    /// Mean tokens of the prompts of the others.
    pub prompt: f64,
    /// Mean tokens of their preferred answers.
    pub chosen: f64,
    /// Mean tokens of their other answers.
    pub rejected: f64,
    /// What there is to say of the file's form, a sentence each.
    pub notes: Vec<String>,
}
