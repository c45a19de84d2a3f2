//! Collectives between the trainers of one generation: one trait, implemented by Gloo for CPUs and by NCCL for GPUs.
//!
//! - TRN-C1: every rank issues the same collectives in the same order; one thread issues them.
//! - TRN-C2: a tensor handed to a collective is not touched until its [`Pending`] is waited for.
//! - TRN-C3: after [`Communicator::abort`] every collective, also one in flight, fails on this rank; the communicator is
//!   never used again.

pub mod board;
pub mod gloo;
pub mod measure;
pub mod narrow;
pub mod nccl;
mod sockets;

use std::fmt;

use tch::Tensor;

/// A collective failed: a peer is gone, the deadline passed, or the communicator was aborted.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{operation} failed: {reason}")]
pub struct CommError {
    /// The collective, e.g. `all_reduce`.
    pub operation: &'static str,
    /// The back end's message.
    pub reason: String,
}

/// A collective in flight.
pub trait Pending {
    /// Blocks until the result may be used by later work on this rank.
    fn wait(self: Box<Self>) -> Result<(), CommError>;
}

/// A collective whose result is copied to another tensor.
struct Copied {
    pending: Box<dyn Pending>,
    from: Tensor,
    to: Tensor,
}

impl Pending for Copied {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        let Self { pending, from, mut to } = *self;
        pending.wait()?;
        tch::no_grad(|| to.copy_(&from));
        Ok(())
    }
}

/// Sum-reducing collectives over all ranks of a generation.
pub trait Communicator: Send + Sync + fmt::Debug {
    /// This process's rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Bytes of one piece of a collective; several pieces are in flight, so larger buckets gain nothing. `None` if tensors are not split.
    fn piece_bytes(&self) -> Option<i64> {
        None
    }

    /// Sums `tensor` over all ranks, in place.
    fn all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError>;

    /// Sums `input` over all ranks and leaves the rank-th of `world_size` equal slices in `output`, which may be that slice of
    /// `input` itself. The rest of `input` is undefined afterwards.
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError>;

    /// Concatenates every rank's `input` in rank order into `output`; `input` may be this rank's slice of it.
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError>;

    /// Overwrites `tensor` with the tensor of rank `root`.
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Box<dyn Pending>, CommError>;

    /// Waits until every rank has called it.
    fn barrier(&self) -> Result<(), CommError>;

    /// Breaks every collective in flight; callable from any thread.
    fn abort(&self);
}
