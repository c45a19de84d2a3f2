//! Safe wrappers around the C++ bridge in `ext/`, for what tch 0.24 leaves out of libtorch: autograd, AdamW, storage.
//!
//! The rest of the bridge is declared where it is used: `comm/gloo.rs`, `gpu.rs`, `head/tile.rs`, `model/{fused,product,varlen}.rs`,
//! `profile/recorder.rs`.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

/// What libtorch said, without its backtrace.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct TorchError(pub String);

/// Null on success, else a message that the caller frees.
pub(crate) type RawError = *mut c_char;

unsafe extern "C" {
    fn dyad_autograd_grad(
        outputs: *const *const C_tensor,
        output_grads: *const *const C_tensor,
        n_outputs: usize,
        inputs: *const *const C_tensor,
        n_inputs: usize,
        sinks: *const *const C_tensor,
        gradients: *mut *mut C_tensor,
    ) -> RawError;
    fn dyad_fused_adamw(
        parameters: *const *const C_tensor,
        gradients: *const *const C_tensor,
        exp_avgs: *const *const C_tensor,
        exp_avg_sqs: *const *const C_tensor,
        steps: *const *const C_tensor,
        count: usize,
        divisor: *const C_tensor,
        hyper: *const f64,
    ) -> RawError;
    fn dyad_adamw(
        parameter: *const C_tensor,
        gradient: *const C_tensor,
        exp_avg: *const C_tensor,
        exp_avg_sq: *const C_tensor,
        published: *const C_tensor,
        clear: bool,
        hyper: *const f64,
    ) -> RawError;
    fn dyad_adamw_8bit(
        parameter: *const C_tensor,
        gradient: *const C_tensor,
        moments: *const *const C_tensor,
        hyper: *const f64,
    ) -> RawError;
    fn dyad_storage_bare(like: *const C_tensor, length: i64, tensor: *mut *mut C_tensor) -> RawError;
    fn dyad_storage_release(tensor: *const C_tensor) -> RawError;
    fn dyad_storage_allocate(tensor: *const C_tensor) -> RawError;
    fn dyad_pinned(host: *const C_tensor, pinned: *mut *mut C_tensor) -> RawError;
    fn dyad_cuda_free_bytes(device: c_int, bytes: *mut i64) -> RawError;
    fn dyad_cuda_current_stream(device: c_int, stream: *mut *mut c_void) -> RawError;
    fn dyad_cuda_peak_bytes(device: c_int, bytes: *mut i64) -> RawError;
    fn free(pointer: *mut c_void);
}

/// Turns the bridge's error convention into a `Result`, freeing the message.
pub(crate) fn check(raw: RawError) -> Result<(), TorchError> {
    if raw.is_null() {
        return Ok(());
    }
    // SAFETY: the bridge hands out either null or a malloc'ed, NUL-terminated string that is ours to free, once.
    unsafe {
        let message = CStr::from_ptr(raw).to_string_lossy().trim().to_owned();
        free(raw.cast());
        Err(TorchError(message))
    }
}

fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}

/// Gradients of `sum <output, output_grad>` by each input; `None` where nothing depends on the input. Frees the graph.
pub fn grad(
    outputs: &[&Tensor],
    output_grads: &[&Tensor],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TorchError> {
    grad_into(outputs, output_grads, inputs, &[])
}

/// The same where the first inputs may have a sink each: a contiguous float32 tensor to which the gradient is added if
/// [`crate::model::product`] makes it, and which then is `None`. Others are returned as ever.
pub fn grad_into(
    outputs: &[&Tensor],
    output_grads: &[&Tensor],
    inputs: &[&Tensor],
    sinks: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TorchError> {
    assert_eq!(outputs.len(), output_grads.len(), "one gradient per output");
    assert!(sinks.iter().zip(inputs).all(|(sink, input)| {
        sink.kind() == Kind::Float && sink.is_contiguous() && sink.size() == input.size()
    }));
    let mut sinks = pointers(sinks);
    sinks.resize(inputs.len(), std::ptr::null());
    let mut gradients = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: the arrays hold as many live tensors as the lengths say; each non-null result is a fresh tensor that we own.
    unsafe {
        check(dyad_autograd_grad(
            pointers(outputs).as_ptr(),
            pointers(output_grads).as_ptr(),
            outputs.len(),
            pointers(inputs).as_ptr(),
            inputs.len(),
            sinks.as_ptr(),
            gradients.as_mut_ptr(),
        ))?;
        Ok(gradients.into_iter().map(|raw| (!raw.is_null()).then(|| Tensor::from_ptr(raw))).collect())
    }
}

/// The tensors of one parameter that an optimizer step reads and writes.
#[derive(Debug)]
pub struct AdamSlot<'a> {
    /// Master weights, float32, updated in place.
    pub parameter: &'a Tensor,
    /// Gradient, float32, read only.
    pub gradient: &'a Tensor,
    /// Running mean of the gradient.
    pub exp_avg: &'a Tensor,
    /// Running mean of the squared gradient.
    pub exp_avg_sq: &'a Tensor,
}

/// Hyper-parameters of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamHyper {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// One AdamW step in place; `step` is a float32 scalar tensor that counts from 1. Gradients are divided first by the float32
/// value of `divisor`, where there is one.
pub fn fused_adamw(
    slots: &[AdamSlot<'_>],
    step: &Tensor,
    divisor: Option<&Tensor>,
    hyper: AdamHyper,
) -> Result<(), TorchError> {
    let list = |pick: fn(&AdamSlot<'_>) -> *const C_tensor| -> Vec<*const C_tensor> {
        slots.iter().map(pick).collect()
    };
    let steps = vec![step.as_ptr(); slots.len()];
    let values = [hyper.learning_rate, hyper.beta1, hyper.beta2, hyper.weight_decay, hyper.eps];
    // SAFETY: five arrays of `slots.len()` live tensors each, a live tensor or none, and five doubles.
    unsafe {
        check(dyad_fused_adamw(
            list(|slot| slot.parameter.as_ptr()).as_ptr(),
            list(|slot| slot.gradient.as_ptr()).as_ptr(),
            list(|slot| slot.exp_avg.as_ptr()).as_ptr(),
            list(|slot| slot.exp_avg_sq.as_ptr()).as_ptr(),
            steps.as_ptr(),
            slots.len(),
            divisor.map_or(std::ptr::null(), |divisor| divisor.as_ptr()),
            values.as_ptr(),
        ))
    }
}

/// What a step on the CPU does beside, while the values are at hand.
#[derive(Clone, Copy, Debug)]
pub struct AdamPass<'a> {
    /// Gradients are multiplied by this first.
    pub scale: f64,
    /// Gets the new parameters, bfloat16.
    pub published: Option<&'a Tensor>,
    /// Leaves zeros in the gradient's place.
    pub clears: bool,
}

/// One AdamW step in place and on the CPU, in one pass over memory; `step` counts from 1.
pub fn adamw_in_one_pass(
    slot: &AdamSlot<'_>,
    adam_pass: AdamPass<'_>,
    step: u64,
    hyper: AdamHyper,
) -> Result<(), TorchError> {
    let wide = [slot.parameter, slot.gradient, slot.exp_avg, slot.exp_avg_sq];
    let fits = |tensor: &Tensor, kind| {
        let here = tensor.device() == Device::Cpu && tensor.is_contiguous();
        here && tensor.kind() == kind && tensor.numel() == slot.parameter.numel()
    };
    assert!(wide.into_iter().all(|tensor| fits(tensor, Kind::Float)));
    assert!(adam_pass.published.is_none_or(|tensor| fits(tensor, Kind::BFloat16)));
    let AdamHyper { learning_rate, beta1, beta2, weight_decay, eps } = hyper;
    let values = [learning_rate, beta1, beta2, weight_decay, eps, step as f64, adam_pass.scale];
    // SAFETY: live, contiguous CPU tensors of one length and of the kinds that the bridge asks for, and seven doubles.
    unsafe {
        check(dyad_adamw(
            slot.parameter.as_ptr(),
            slot.gradient.as_ptr(),
            slot.exp_avg.as_ptr(),
            slot.exp_avg_sq.as_ptr(),
            adam_pass.published.map_or(std::ptr::null(), |tensor| tensor.as_ptr()),
            adam_pass.clears,
            values.as_ptr(),
        ))
    }
}

/// One AdamW step on moments of eight bits, on the CPU: codes, largest magnitudes, fractions, their middles and starts of the
/// first moment, then of the second; `step` counts from 1.
pub fn adamw_8bit(
    parameter: &Tensor,
    gradient: &Tensor,
    moments: &[&Tensor],
    step: u64,
    hyper: AdamHyper,
) -> Result<(), TorchError> {
    assert_eq!(moments.len(), 10, "five tensors a moment");
    assert!(moments.iter().chain([&parameter, &gradient]).all(|tensor| tensor.is_contiguous()));
    let AdamHyper { learning_rate, beta1, beta2, weight_decay, eps } = hyper;
    let values = [learning_rate, beta1, beta2, weight_decay, eps, step as f64];
    // SAFETY: live, contiguous CPU tensors of the sizes that a block of 256 asks for, and six doubles.
    unsafe {
        check(dyad_adamw_8bit(
            parameter.as_ptr(),
            gradient.as_ptr(),
            pointers(moments).as_ptr(),
            values.as_ptr(),
        ))
    }
}

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

/// Bytes of a CUDA device that nobody holds.
pub fn cuda_free_bytes(device: usize) -> Result<u64, TorchError> {
    let mut bytes = 0;
    // SAFETY: writes one integer.
    unsafe { check(dyad_cuda_free_bytes(device as c_int, &raw mut bytes))? };
    Ok(bytes.max(0) as u64)
}

/// The driver's handle of libtorch's current stream on a CUDA device; null is the default stream.
pub fn cuda_current_stream(device: usize) -> Result<*mut c_void, TorchError> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    unsafe { check(dyad_cuda_current_stream(device as c_int, &raw mut stream))? };
    Ok(stream)
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

/// Most bytes that libtorch has held for tensors on a CUDA device.
pub fn cuda_peak_bytes(device: usize) -> Result<u64, TorchError> {
    let mut bytes = 0;
    // SAFETY: writes one integer.
    unsafe { check(dyad_cuda_peak_bytes(device as c_int, &raw mut bytes))? };
    Ok(bytes.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grad_multiplies_by_the_output_gradient() {
        let x = Tensor::from_slice(&[1.0, 2.0]).set_requires_grad(true);
        let unused = Tensor::ones([1], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let y = &x * &x;
        let dy = Tensor::from_slice(&[10.0, 100.0]);
        let grads = grad(&[&y], &[&dy], &[&x, &unused]).unwrap();
        let dx: Vec<f64> = grads[0].as_ref().unwrap().try_into().unwrap();
        assert_eq!(dx, [20.0, 400.0]);
        assert!(grads[1].is_none());
    }

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

    #[test]
    fn libtorch_errors_come_back_as_text() {
        let x = Tensor::from_slice(&[1.0]);
        assert!(grad(&[&x], &[&x], &[&x]).unwrap_err().0.contains("require"));
    }

    /// First step of AdamW from zero state moves by lr * sign(g), after the decay by lr * weight_decay.
    #[test]
    fn adamw_first_step_is_the_sign_of_the_gradient() {
        let options = (Kind::Float, Device::Cpu);
        let parameter = Tensor::ones([2], options);
        let gradient = Tensor::from_slice(&[0.5f32, -3.0]);
        let (exp_avg, exp_avg_sq) = (Tensor::zeros([2], options), Tensor::zeros([2], options));
        let slot = AdamSlot {
            parameter: &parameter,
            gradient: &gradient,
            exp_avg: &exp_avg,
            exp_avg_sq: &exp_avg_sq,
        };
        let hyper = AdamHyper { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, weight_decay: 0.5, eps: 1e-8 };
        fused_adamw(&[slot], &Tensor::ones([], options), None, hyper).unwrap();
        let values: Vec<f32> = (&parameter).try_into().unwrap();
        assert!((values[0] - 0.85).abs() < 1e-6 && (values[1] - 1.05).abs() < 1e-6, "{values:?}");
    }
}
