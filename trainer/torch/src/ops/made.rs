//! Takes over the result tensors of the bridge's operators.
#![expect(unsafe_code, reason = "takes over tensors that the bridge made")]

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::check;
use crate::ffi::RawError;

/// The new tensor that a kernel made. Panics on an error, which is a bug in the caller, as tch's operators do.
pub(super) fn made(kernel: impl FnOnce(*mut *mut C_tensor) -> RawError) -> Tensor {
    let mut raw = std::ptr::null_mut();
    if let Err(error) = check(kernel(&raw mut raw)) {
        panic!("fused kernel: {error}");
    }
    // SAFETY: on success the kernel has left a fresh tensor that we own.
    unsafe { Tensor::from_ptr(raw) }
}
