//! Errors of an optimizer step.

use dyad_proto::{ErrorCode, Fault};

use dyad_torch::comm::CommError;
use dyad_torch::error::TorchError;

/// A step failed in libtorch or between the ranks.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An error from libtorch.
    #[error("libtorch: {0}")]
    Torch(#[from] TorchError),
    /// The reference model has been freed, and a pair came without its scores.
    #[error("a pair came without reference log-probabilities after the reference model was freed")]
    NoReference,
    /// A collective failed; most likely another process is the cause.
    #[error(transparent)]
    Communicator(#[from] CommError),
}

impl From<EngineError> for Fault {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Torch(_) | EngineError::NoReference => Self::failed(error.to_string()),
            EngineError::Communicator(_) => Self::new(ErrorCode::Echo, error.to_string())
                .hint("another trainer went away, or the network between the hosts broke"),
        }
    }
}
