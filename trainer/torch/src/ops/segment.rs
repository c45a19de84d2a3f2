//! Segments of packed tokens.

/// Consecutive packed tokens that attend to no other segment: a prompt, then branches that each continue the prompt.
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
