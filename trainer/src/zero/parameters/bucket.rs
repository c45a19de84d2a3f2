//! A bucket of gradients: units whose parameters lie in one flat buffer and whose gradients are reduced together.

use std::ops::Range;
use std::rc::Rc;

use dyad_torch::comm::Pending;
use tch::Tensor;

use crate::optimizer::states::States;
use crate::zero::unit_weights::UnitWeights;

/// A parameter: its tensor in the precision of the passes, and its view of the bucket's gradient.
#[derive(Debug)]
pub struct Parameter {
    /// Name in checkpoints.
    pub name: String,
    /// Tensor that the model computes with; requires a gradient.
    pub leaf: Tensor,
    /// Float32 gradient; has memory only while its bucket is open.
    pub grad: Tensor,
}

/// Units whose gradients are reduced together.
pub struct Bucket {
    /// Units it covers.
    pub units: Range<usize>,
    /// Flat float32 gradient of all parameters.
    pub grad: Tensor,
    /// Weights that the model computes with.
    pub(crate) weights: Rc<UnitWeights>,
    /// Float32 masters and moments of this rank's own part.
    pub(crate) states: States,
    /// True if the masters are the weights themselves.
    pub(super) masters_are_weights: bool,
    /// Sum of this rank's part of the gradient over the step's micro-batches, if no rank keeps whole gradients.
    pub(super) total: Option<Tensor>,
    pub(super) reduction: Option<Box<dyn Pending>>,
    /// True while the gradient has memory.
    pub(super) open: bool,
    /// True if the optimizer has already zeroed the gradient.
    pub(super) cleared: bool,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bucket").field("units", &self.units).finish_non_exhaustive()
    }
}
