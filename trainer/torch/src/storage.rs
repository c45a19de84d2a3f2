//! Releases and reallocates the memory behind tensors; pinned memory.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Device, Kind, Tensor};

use crate::error::{TorchError, check};
use crate::ffi::{RawError, dyad_pinned, dyad_storage_allocate, dyad_storage_bare, dyad_storage_release};

/// A tensor of zeros for [`release_memory`] and [`allocate_memory`]. `[length]`
pub fn releasable_zeros(length: i64, kind: Kind, device: Device) -> Tensor {
    let like = Tensor::empty([0], (kind, device));
    let mut raw = std::ptr::null_mut();
    // SAFETY: a live tensor whose options are copied, and a place for the new tensor.
    must(unsafe { dyad_storage_bare(like.as_ptr(), length, &raw mut raw) });
    // SAFETY: on success the bridge has left a fresh tensor that we own.
    let mut tensor = unsafe { Tensor::from_ptr(raw) };
    allocate_memory(&tensor);
    let _ = tensor.zero_();
    tensor
}

/// Frees the memory behind a tensor and all its views. The views keep their shapes, and autograd keeps its references to them.
pub fn release_memory(tensor: &Tensor) {
    // SAFETY: the tensor is live; libtorch refuses to read a storage without memory.
    must(unsafe { dyad_storage_release(tensor.as_ptr()) });
}

/// Allocates memory again for a tensor that covers its whole storage; its values are undefined.
pub fn allocate_memory(tensor: &Tensor) {
    // SAFETY: the tensor is live, and its storage was made by libtorch's own allocator.
    must(unsafe { dyad_storage_allocate(tensor.as_ptr()) });
}

/// Panics on an error, which can only be out of memory. [`crate::panics`] turns the panic into a fault, as for tch's operators.
fn must(raw: RawError) {
    if let Err(error) = check(raw) {
        panic!("memory of a tensor: {error}");
    }
}

/// A copy of a host tensor in pinned memory, which a GPU reads directly. tch's `pin_memory` passes a device, for which libtorch
/// prints a deprecation warning.
pub fn pinned(host: &Tensor) -> Result<Tensor, TorchError> {
    let mut raw = std::ptr::null_mut();
    // SAFETY: a live tensor, and a place for the result, which is a fresh tensor that we own on success.
    unsafe {
        check(dyad_pinned(host.as_ptr(), &raw mut raw))?;
        Ok(Tensor::from_ptr(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::grad;

    /// Views and saved graphs stay valid when the memory is released; sharded weights depend on it.
    #[test]
    fn a_graph_survives_releasing_the_memory_of_its_weights() {
        let mut flat = releasable_zeros(3, Kind::Float, Device::Cpu);
        flat.copy_(&Tensor::from_slice(&[2.0f32, 3.0, 5.0]));
        let weight = flat.narrow(0, 1, 2).view([2, 1]).detach().set_requires_grad(true);
        let x = Tensor::from_slice(&[1.0f32, 10.0]).view([1, 2]).set_requires_grad(true);
        let y = x.matmul(&weight);
        release_memory(&flat);
        allocate_memory(&flat);
        // `data()` has its own version counter, so autograd does not count this write as a change.
        flat.data().copy_(&Tensor::from_slice(&[2.0f32, 3.0, 5.0]));
        let grads = grad(&[&y], &[&y.ones_like()], &[&x, &weight]).unwrap();
        let values: Vec<f32> = grads[0].as_ref().unwrap().flatten(0, -1).try_into().unwrap();
        assert_eq!(values, [3.0, 5.0]);
        assert_eq!(weight.double_value(&[1, 0]), 5.0);
    }
}
