//! Which implementation computes: the bridge's kernels for CPUs, or what GPUs run.
#![expect(unsafe_code, reason = "takes over tensors that the bridge made")]

use std::cell::Cell;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::ext::{RawError, check};

thread_local! {
    static AS_ON_GPU: Cell<bool> = const { Cell::new(false) };
}

/// Does work on the CPU as GPUs do it, on this thread. Tests reach what GPUs run by it.
pub fn as_on_gpu<T>(work: impl FnOnce() -> T) -> T {
    let before = AS_ON_GPU.replace(true);
    let result = work();
    AS_ON_GPU.set(before);
    result
}

/// Whether a device takes what GPUs run, rather than the bridge's kernels for CPUs.
#[must_use]
pub fn takes_gpu_path(device: Device) -> bool {
    device != Device::Cpu || AS_ON_GPU.get()
}

/// The new tensor that a kernel made. A refusal is a bug of the caller's, as with tch's own operators.
pub(crate) fn made(kernel: impl FnOnce(*mut *mut C_tensor) -> RawError) -> Tensor {
    let mut raw = std::ptr::null_mut();
    if let Err(error) = check(kernel(&raw mut raw)) {
        panic!("fused kernel: {error}");
    }
    // SAFETY: on success the kernel has left a fresh tensor that we own.
    unsafe { Tensor::from_ptr(raw) }
}
