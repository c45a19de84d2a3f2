//! What a forward pass gives every layer.

use dyad_torch::ops::flash_attention::Varlen;
use dyad_torch::ops::segment::Segment;

use super::rotary::Rotary;

/// What every layer of one pass needs beside its input.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Who sees whom.
    pub segments: &'a [Segment],
    /// The same as the variable-length kernels want it, where they serve.
    pub varlen: Option<&'a Varlen>,
    /// Rotary positions of the packed tokens.
    pub rotary: &'a Rotary,
    /// Dropout is on.
    pub training: bool,
}
