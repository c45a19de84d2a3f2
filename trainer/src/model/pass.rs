//! The inputs that all layers of a forward pass share.

use dyad_torch::ops::flash_attention::Varlen;
use dyad_torch::ops::segment::Segment;

use super::rotary::Rotary;

/// Inputs of every layer of one pass, next to the hidden states.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Which tokens attend to which.
    pub segments: &'a [Segment],
    /// The segments for variable-length kernels, where these are used.
    pub varlen: Option<&'a Varlen>,
    /// Rotary positions of the packed tokens.
    pub rotary: &'a Rotary,
    /// True if dropout is on.
    pub training: bool,
}
