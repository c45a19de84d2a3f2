//! Where tensors of a model are, and in which precision.

use tch::{Device, Kind};

/// Where and in which precision a tensor lives.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Device.
    pub device: Device,
    /// Precision.
    pub kind: Kind,
}
