//! Operators of a decoder layer: norms, rotations, linear layers, SwiGLU, attention over segments. All are differentiable.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::gpu_kernels;
use super::made::made;
use super::segment::Segment;
use crate::backend::{Backend, GPU_VECTOR, on_gpu_path};
use crate::error::{TorchError, check};
use crate::ffi::{
    RawLinear, dyad_accumulate, dyad_kernel_threads, dyad_linears, dyad_rms_norm, dyad_rotate,
    dyad_rotate_half, dyad_segmented_attention, dyad_swiglu,
};

impl RawLinear {
    fn plain(weight: &Tensor, bias: Option<&Tensor>) -> Self {
        let none = std::ptr::null();
        Self { weight: weight.as_ptr(), bias: pointer(bias), onto: none, a: none, b: none, scale: 0.0 }
    }
}

fn pointer(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(std::ptr::null(), |tensor| tensor.as_ptr())
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, computed in float32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    rms_norm_with_residual(x, weight, eps).0
}

/// The norm, and `x` again for the residual connection: on CPUs the norm's backward kernel adds the gradients of both.
pub fn rms_norm_with_residual(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    if Backend::of(&[x, weight], 1) == Backend::Cpu {
        return cpu_rms_norm(x, weight, eps);
    }
    // On a GPU one kernel launch forward and one backward.
    let normed = x.internal_fused_rms_norm(weight.size().as_slice(), Some(weight), eps).0;
    (normed, x.shallow_clone())
}

fn cpu_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    assert_eq!(x.size().last(), weight.size().last(), "one weight per column");
    let mut residual = std::ptr::null_mut();
    // SAFETY: two live tensors of matching sizes, and a place for each result.
    let y = made(|out| unsafe { dyad_rms_norm(x.as_ptr(), weight.as_ptr(), eps, out, &raw mut residual) });
    // SAFETY: on success the kernel has left a second fresh tensor that we own.
    (y, unsafe { Tensor::from_ptr(residual) })
}

/// Rotates `[tokens, heads, width]` by angles with contiguous cosines and sines `[tokens, 1, width]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (size, angles) = (x.size(), cos.size());
    assert!(size[0] == angles[0] && size[2] == angles[2] && cos.is_contiguous() && sin.is_contiguous());
    // SAFETY: three live tensors of matching sizes, and a place for the result.
    made(|out| unsafe { dyad_rotate(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), out) })
}

/// The same for the GPU path, by the bridge's kernel if it supports the tensors. The first half of each row of `sin` is negated.
pub fn rotate_signed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    gpu_kernels::rotate(x, cos, sin).unwrap_or_else(|| rotate_half(x, cos, sin))
}

/// The same on any device, in three launches. The first half of each row of `sin` is negated.
pub fn rotate_half(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    // SAFETY: three live tensors, and a place for the result; the operators check sizes.
    made(|out| unsafe { dyad_rotate_half(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), out) })
}

/// Arguments of one linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearArgs<'a> {
    /// `[out, in]`.
    pub weight: &'a Tensor,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
    /// The layer's adapter.
    pub adapter: Option<AdapterArgs<'a>>,
}

/// Arguments of a low-rank update.
#[derive(Clone, Copy, Debug)]
pub struct AdapterArgs<'a> {
    /// `[rank, in]`.
    pub a: &'a Tensor,
    /// `[out, rank]`.
    pub b: &'a Tensor,
    /// `lora_alpha / lora_r`.
    pub scale: f64,
}

/// Linear layers of one input `[tokens, in]`, adapters included, on any device: `[tokens, out]` each. `own_products` uses the
/// bridge's products, which must support all matrices. Only they can add the results to `onto`, `[tokens, out]`, and only without
/// a bias.
pub fn linears<const N: usize>(
    x: &Tensor,
    layers: [LinearArgs<'_>; N],
    onto: Option<&Tensor>,
    own_products: bool,
) -> [Tensor; N] {
    let raw = layers.map(|layer| {
        let adapter = layer.adapter;
        assert!(
            onto.is_none() || (own_products && layer.bias.is_none()),
            "`onto` needs the bridge's products and no bias"
        );
        RawLinear {
            onto: pointer(onto),
            a: pointer(adapter.map(|adapter| adapter.a)),
            b: pointer(adapter.map(|adapter| adapter.b)),
            scale: adapter.map_or(0.0, |adapter| adapter.scale),
            ..RawLinear::plain(layer.weight, layer.bias)
        }
    });
    run(x, &raw, own_products)
}

/// `x wᵀ + bias` by the bridge's own products, which must support the matrices.
pub(crate) fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let [y] = run(x, &[RawLinear::plain(weight, bias)], true);
    y
}

fn run<const N: usize>(x: &Tensor, linears: &[RawLinear; N], own_products: bool) -> [Tensor; N] {
    let mut ys = [std::ptr::null_mut(); N];
    // SAFETY: live tensors, or null for optional ones, and a place for each result; libtorch's operators check sizes, and callers
    // check them for the bridge's own products.
    let done = check(unsafe { dyad_linears(x.as_ptr(), linears.as_ptr(), N, own_products, ys.as_mut_ptr()) });
    if let Err(error) = done {
        panic!("linear layers: {error}");
    }
    // SAFETY: on success the bridge has left fresh tensors that we own.
    ys.map(|y| unsafe { Tensor::from_ptr(y) })
}

/// `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    if Backend::of(&[gate, up], GPU_VECTOR) != Backend::Cpu {
        return gpu_kernels::swiglu(gate, up).unwrap_or_else(|| gate.silu() * up);
    }
    assert_eq!(gate.size(), up.size(), "one gate per value");
    // SAFETY: two live tensors of the same size, and a place for the result.
    made(|out| unsafe { dyad_swiglu(gate.as_ptr(), up.as_ptr(), out) })
}

/// Number of threads that share a kernel's work.
pub fn kernel_threads() -> Result<usize, TorchError> {
    let mut threads = 0;
    // SAFETY: writes one integer.
    check(unsafe { dyad_kernel_threads(&raw mut threads) })?;
    Ok(threads)
}

/// `total += part` for any kinds, in place: every handle to `total` sees the change.
pub fn accumulate(total: &Tensor, part: &Tensor) {
    let narrow = total.kind() == Kind::Float && part.kind() == Kind::BFloat16;
    let plain = total.size() == part.size() && total.is_contiguous() && part.is_contiguous();
    if !narrow || !plain || on_gpu_path(total.device()) || on_gpu_path(part.device()) {
        let mut total = total.shallow_clone();
        tch::no_grad(|| total += part);
        return;
    }
    // SAFETY: two live, contiguous CPU tensors of the same size and of the kinds that the bridge expects.
    if let Err(error) = check(unsafe { dyad_accumulate(total.as_ptr(), part.as_ptr()) }) {
        panic!("fused kernel: {error}");
    }
}

/// Attention over packed segments: queries `[tokens, heads, width]`, keys and values `[tokens, kv heads, width]`.
pub fn segmented_attention(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[Segment]) -> Tensor {
    let mut layout = Vec::new();
    for segment in segments {
        layout.extend([segment.start, segment.prompt, segment.branches.len() as i64]);
        layout.extend(&segment.branches);
    }
    // SAFETY: three live tensors, an array of the given length, and a place for the result.
    made(|out| unsafe {
        dyad_segmented_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), layout.as_ptr(), layout.len(), out)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::dyad_kernel_lanes;

    /// Without OpenMP the bridge still compiles, but its loops run on one thread.
    #[test]
    fn kernels_share_their_work_between_all_threads() {
        tch::set_num_threads(2);
        assert_eq!(kernel_threads().unwrap(), 2);
    }

    #[test]
    fn fused_kernels_use_the_requested_instructions() {
        let v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let v4 = ["avx512f", "avx512bw", "avx512dq", "avx512vl"];
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let v4 = v4.iter().all(|flag| info.split_whitespace().any(|word| word == *flag));
        let asked = std::env::var("DYAD_CPU_CAPABILITY").unwrap_or_default();
        let expected = if asked.is_empty() && v4 {
            16
        } else if asked != "default" && v3 {
            8
        } else {
            4
        };
        // SAFETY: reads a number.
        assert_eq!(unsafe { dyad_kernel_lanes() }, expected);
    }

    #[test]
    fn head_kernels_are_right_with_every_instruction_set() {
        dyad_torch_testing::run_with_older_instruction_sets(&[
            "ops::head_tile::tests::fused_head_equals_its_composition",
            "ops::head_tile::tests::equal_logits_do_not_diverge",
            "ops::head_tile::tests::nan_logits_give_nan_log_probabilities",
            "ops::layer::tests::fused_kernels_use_the_requested_instructions",
        ]);
    }
}
