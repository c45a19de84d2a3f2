//! Device and precision of a model's tensors.

use tch::{Device, Kind};

/// Device and precision of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Device.
    pub device: Device,
    /// Precision.
    pub kind: Kind,
}
