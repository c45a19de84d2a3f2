//! Calls of the bridge's GPU kernels (`cpp/gpu/kernels.cu`).
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::Tensor;

use super::made::made;
use crate::backend::{Backend, GPU_VECTOR};
use crate::ffi::{dyad_gpu_rotate, dyad_gpu_swiglu};

/// `silu(gate) * up`; `None` if the kernel does not support the tensors.
pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Option<Tensor> {
    if gate.size() != up.size() || Backend::of(&[gate, up], GPU_VECTOR) != Backend::Gpu {
        return None;
    }
    // SAFETY: two live tensors of the same size that the kernel supports, and a place for the result.
    Some(made(|out| unsafe { dyad_gpu_swiglu(gate.as_ptr(), up.as_ptr(), out) }))
}

/// Rotates `[tokens, heads, width]` by angles with contiguous cosines and sines `[tokens, 1, width]`. The first half of each row
/// of sines is negated. `None` if the kernel does not support the tensors.
pub(super) fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Option<Tensor> {
    let (size, angles) = (x.size(), cosines.size());
    let contiguous = cosines.is_contiguous() && sines.is_contiguous();
    if size[0] != angles[0]
        || size[2] != angles[2]
        || !contiguous
        || Backend::of(&[x, cosines, sines], 2 * GPU_VECTOR) != Backend::Gpu
    {
        return None;
    }
    // SAFETY: three live tensors of matching sizes that the kernel supports, and a place for the result.
    Some(made(|out| unsafe { dyad_gpu_rotate(x.as_ptr(), cosines.as_ptr(), sines.as_ptr(), out) }))
}
