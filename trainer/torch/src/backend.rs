//! Chooses the implementation of an operator by kind, device and sizes. Every such choice is made here.
#![expect(unsafe_code, reason = "asks the bridge for CPU features")]

use std::cell::Cell;

use tch::{Device, Kind, Tensor};

use crate::ffi::dyad_products_serve;
use crate::gpu::kernels_are_loaded;

/// An implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The bridge's kernels for CPUs (`cpp/cpu/`).
    Cpu,
    /// The bridge's kernels for GPUs (`cpp/gpu/kernels.cu`).
    Gpu,
    /// libtorch's operators.
    Torch,
}

/// Values that a GPU thread reads at once: the last axis of a tensor must be a multiple of it.
pub const GPU_VECTOR: i64 = 8;

impl Backend {
    /// For operators that work row by row on tensors of one kind. The GPU kernels need a last axis
    /// that is a multiple of `run`.
    #[must_use]
    pub fn of(tensors: &[&Tensor], run: i64) -> Self {
        let Some(kind) = tensors.first().map(|tensor| tensor.kind()) else { return Self::Torch };
        let all = |fits: &dyn Fn(&Tensor) -> bool| tensors.iter().all(|tensor| fits(tensor));
        if !all(&|tensor| tensor.kind() == kind) {
            return Self::Torch;
        }
        let whole_runs = |tensor: &Tensor| tensor.size().last().is_some_and(|width| width % run == 0);
        if matches!(kind, Kind::Float | Kind::BFloat16) && all(&|tensor| !on_gpu_path(tensor.device())) {
            Self::Cpu
        } else if has_gpu_kernels(kind) && all(&|tensor| on_gpu_path(tensor.device()) && whole_runs(tensor)) {
            Self::Gpu
        } else {
            Self::Torch
        }
    }

    /// For operators on the logits of this projection, `[vocab, hidden]`.
    #[must_use]
    pub fn of_logits(weight: &Tensor) -> Self {
        match Self::of(&[weight], 1) {
            Self::Gpu if weight.size()[0] % GPU_VECTOR != 0 => Self::Torch,
            backend => backend,
        }
    }

    /// For products of matrices of one kind. In bfloat16 the bridge's products multiply pairs, so widths must be even.
    #[must_use]
    pub fn of_matrices(matrices: &[&Tensor]) -> Self {
        let Some(kind) = matrices.first().map(|matrix| matrix.kind()) else { return Self::Torch };
        let even =
            |matrix: &Tensor| kind == Kind::Float || matrix.size().last().is_some_and(|width| width % 2 == 0);
        let fits = |matrix: &&Tensor| {
            matrix.dim() == 2 && matrix.kind() == kind && !on_gpu_path(matrix.device()) && matrix.numel() > 0
        };
        match matrices.iter().all(|matrix| fits(matrix) && even(matrix)) && has_products(kind) {
            true => Self::Cpu,
            false => Self::Torch,
        }
    }
}

/// Whether this CPU has the instructions that the bridge's products of matrices of this kind need.
#[must_use]
pub fn has_products(kind: Kind) -> bool {
    // SAFETY: only reads CPU features.
    matches!(kind, Kind::Float | Kind::BFloat16) && unsafe { dyad_products_serve(kind == Kind::BFloat16) }
}

/// Whether the bridge's GPU kernels support this kind and are loaded on the GPU that was opened.
#[must_use]
pub fn has_gpu_kernels(kind: Kind) -> bool {
    kind == Kind::BFloat16 && kernels_are_loaded()
}

thread_local! {
    static AS_ON_GPU: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on this thread with the GPU code paths, even for CPU tensors. Lets tests run those paths without a GPU.
pub fn as_on_gpu<T>(work: impl FnOnce() -> T) -> T {
    let before = AS_ON_GPU.replace(true);
    let result = work();
    AS_ON_GPU.set(before);
    result
}

/// Whether tensors on this device take the GPU code paths.
#[must_use]
pub fn on_gpu_path(device: Device) -> bool {
    device != Device::Cpu || AS_ON_GPU.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeros(size: &[i64], kind: Kind) -> Tensor {
        Tensor::zeros(size, (kind, Device::Cpu))
    }

    #[test]
    fn kind_and_device_choose_the_backend() {
        let (wide, narrow) = (zeros(&[2, 8], Kind::Float), zeros(&[2, 8], Kind::BFloat16));
        assert_eq!(Backend::of(&[&wide, &wide], GPU_VECTOR), Backend::Cpu);
        assert_eq!(Backend::of(&[&narrow], GPU_VECTOR), Backend::Cpu);
        assert_eq!(Backend::of(&[&wide, &narrow], GPU_VECTOR), Backend::Torch);
        assert_eq!(Backend::of(&[&zeros(&[2, 8], Kind::Double)], GPU_VECTOR), Backend::Torch);
        assert_eq!(as_on_gpu(|| Backend::of(&[&wide], GPU_VECTOR)), Backend::Torch, "no kernels for float32");
        assert_eq!(as_on_gpu(|| Backend::of_matrices(&[&wide])), Backend::Torch);
        let odd = zeros(&[2, 7], Kind::BFloat16);
        assert_eq!(Backend::of_matrices(&[&odd]), Backend::Torch);
        assert_eq!(Backend::of_matrices(&[&zeros(&[0, 8], Kind::Float)]), Backend::Torch);
    }
}
