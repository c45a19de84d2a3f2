//! Memory behind tensors, taken away and given back; pinned memory.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Device, Kind, Tensor};

use crate::error::{TorchError, check};
use crate::ffi::{RawError, dyad_pinned, dyad_storage_allocate, dyad_storage_bare, dyad_storage_release};

/// A tensor of zeros whose memory is meant to be taken away and given back. `[length]`
pub fn releasable_zeros(length: i64, kind: Kind, device: Device) -> Tensor {
    let like = Tensor::empty([0], (kind, device));
    let mut raw = std::ptr::null_mut();
    // SAFETY: a live tensor to imitate, and a place for the new one.
    must(unsafe { dyad_storage_bare(like.as_ptr(), length, &raw mut raw) });
    // SAFETY: on success the bridge has left a fresh tensor that we own.
    let mut tensor = unsafe { Tensor::from_ptr(raw) };
    allocate_memory(&tensor);
    let _ = tensor.zero_();
    tensor
}

/// Frees the memory behind a tensor and all its views; shapes, and what autograd keeps of them, stay.
pub fn release_memory(tensor: &Tensor) {
    // SAFETY: the tensor is live; libtorch refuses to read a storage without memory.
    must(unsafe { dyad_storage_release(tensor.as_ptr()) });
}

/// Gives a tensor that covers its whole storage memory again; its values are undefined.
pub fn allocate_memory(tensor: &Tensor) {
    // SAFETY: the tensor is live, and its storage was made by libtorch's own allocator.
    must(unsafe { dyad_storage_allocate(tensor.as_ptr()) });
}

/// What only running out of memory can refuse; [`crate::panics`] turns that into a fault, as with tch's own operators.
fn must(raw: RawError) {
    if let Err(error) = check(raw) {
        panic!("memory of a tensor: {error}");
    }
}

/// A copy of a host tensor in memory that a GPU reads by itself. tch's own call names a device, which libtorch deprecates aloud.
pub fn pinned(host: &Tensor) -> Result<Tensor, TorchError> {
    let mut raw = std::ptr::null_mut();
    // SAFETY: a live tensor, and a place for the result, which is fresh and ours on success.
    unsafe {
        check(dyad_pinned(host.as_ptr(), &raw mut raw))?;
        Ok(Tensor::from_ptr(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::grad;

    /// Views and saved graphs outlive the memory: what sharded weights rest on.
    #[test]
    fn a_graph_survives_its_weights_memory() {
        let mut flat = releasable_zeros(3, Kind::Float, Device::Cpu);
        flat.copy_(&Tensor::from_slice(&[2.0f32, 3.0, 5.0]));
        let weight = flat.narrow(0, 1, 2).view([2, 1]).detach().set_requires_grad(true);
        let x = Tensor::from_slice(&[1.0f32, 10.0]).view([1, 2]).set_requires_grad(true);
        let y = x.matmul(&weight);
        release_memory(&flat);
        allocate_memory(&flat);
        // Written through another version counter, so that autograd does not take it for a change.
        flat.data().copy_(&Tensor::from_slice(&[2.0f32, 3.0, 5.0]));
        let grads = grad(&[&y], &[&y.ones_like()], &[&x, &weight]).unwrap();
        let values: Vec<f32> = grads[0].as_ref().unwrap().flatten(0, -1).try_into().unwrap();
        assert_eq!(values, [3.0, 5.0]);
        assert_eq!(weight.double_value(&[1, 0]), 5.0);
    }
}
