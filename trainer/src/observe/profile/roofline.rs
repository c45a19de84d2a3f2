//! Measured limits of this machine: the rates of a large matrix product and of a large copy.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use dyad_torch::device::synchronize;

/// Edge of the matrices on a CPU: large enough for the best rate.
const EDGE: i64 = 2048;
/// Edge on a GPU, which computes smaller products in less time than their launch takes.
const GPU_EDGE: i64 = 8192;
/// Bytes to copy: far more than any cache holds.
const COPY_BYTES: i64 = 256 << 20;
const ROUNDS: usize = 3;

/// Measured limits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roofline {
    /// Floating-point operations per second of a matrix product in the precision of the passes.
    pub flops_per_second: f64,
    /// Bytes read and written per second.
    pub bytes_per_second: f64,
}

impl Roofline {
    /// Mean of two measurements.
    #[must_use]
    pub fn mean(self, other: Self) -> Self {
        Self {
            flops_per_second: f64::midpoint(self.flops_per_second, other.flops_per_second),
            bytes_per_second: f64::midpoint(self.bytes_per_second, other.bytes_per_second),
        }
    }

    /// Measures, with the threads that the passes use; takes about a second.
    #[must_use]
    pub fn measure(device: Device, kind: Kind) -> Self {
        tch::no_grad(|| {
            let edge = if device.is_cuda() { GPU_EDGE } else { EDGE };
            let a = Tensor::rand([edge, edge], (Kind::Float, device)).to_kind(kind);
            let b = a.tr().contiguous();
            let product = fastest(device, || drop(a.matmul(&b)));
            let source = Tensor::ones([COPY_BYTES], (Kind::Uint8, device));
            let mut target = source.zeros_like();
            let copy = fastest(device, || target.copy_(&source));
            Self {
                flops_per_second: 2.0 * (edge as f64).powi(3) / product,
                bytes_per_second: 2.0 * COPY_BYTES as f64 / copy,
            }
        })
    }
}

/// Seconds of the fastest round, after a warm-up round.
fn fastest(device: Device, mut work: impl FnMut()) -> f64 {
    work();
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        synchronize(device);
        let start = Instant::now();
        work();
        synchronize(device);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
