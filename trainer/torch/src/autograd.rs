//! Gradients for output gradients that the caller passes; tch has no such function.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{TorchError, check};
use crate::ffi::dyad_autograd_grad;

pub(crate) fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}

/// Gradients of `sum <output, output_grad>` with respect to each input; `None` if no output depends on it. Frees the graph.
pub fn grad(
    outputs: &[&Tensor],
    output_grads: &[&Tensor],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TorchError> {
    grad_into(outputs, output_grads, inputs, &[])
}

/// Like [`grad`], with sinks for the first `sinks.len()` inputs. A sink is a contiguous float32 tensor of the input's size. If a
/// linear layer of [`crate::ops`] can add the gradient to the sink, it does and the result is `None`; otherwise the gradient is
/// returned.
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

#[cfg(test)]
mod tests {
    use tch::Device;

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

    #[test]
    fn libtorch_errors_come_back_as_text() {
        let x = Tensor::from_slice(&[1.0]);
        assert!(grad(&[&x], &[&x], &[&x]).unwrap_err().0.contains("require"));
    }
}
