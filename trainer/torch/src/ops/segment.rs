//! Packed tokens that attend to each other.

/// A run of packed tokens that attends only to itself: a prompt, then branches that each continue the prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First token in the packed row.
    pub start: i64,
    /// Prompt length.
    pub prompt: i64,
    /// Length of each branch, in order after the prompt.
    pub branches: Vec<i64>,
}

impl Segment {
    /// Tokens of the longest sequence in it.
    #[must_use]
    pub fn longest(&self) -> i64 {
        self.prompt + self.branches.iter().copied().max().unwrap_or(0)
    }
}
