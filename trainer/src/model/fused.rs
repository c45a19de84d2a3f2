//! Safe face of the fused CPU kernels in `ext/kernels.cpp` and `ext/attention.cpp`. Each has its derivative; elsewhere than
//! on the CPU in float32 or bfloat16 the operators that [`super::blocks`] composes do the same.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::segment::Segment;
use crate::backend::{made, takes_gpu_path};
use crate::ext::{RawError, TorchError, check};

unsafe extern "C" {
    fn dyad_rms_norm(
        x: *const C_tensor,
        weight: *const C_tensor,
        eps: f64,
        y: *mut *mut C_tensor,
        beside: *mut *mut C_tensor,
    ) -> RawError;
    fn dyad_rotate(
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;
    fn dyad_swiglu(gate: *const C_tensor, up: *const C_tensor, y: *mut *mut C_tensor) -> RawError;
    fn dyad_kernel_threads(threads: *mut usize) -> RawError;
    #[cfg(test)]
    fn dyad_kernel_lanes() -> i64;
    fn dyad_rotate_half(
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;
    fn dyad_linears(
        x: *const C_tensor,
        linears: *const RawLinear,
        count: usize,
        ours: bool,
        ys: *mut *mut C_tensor,
    ) -> RawError;
    fn dyad_accumulate(total: *const C_tensor, part: *const C_tensor) -> RawError;
    fn dyad_segmented_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        layout: *const i64,
        count: usize,
        out: *mut *mut C_tensor,
    ) -> RawError;
}

/// A linear layer as the bridge sees it; null where there is no bias, nothing to add to, or no adapter.
#[repr(C)]
struct RawLinear {
    weight: *const C_tensor,
    bias: *const C_tensor,
    onto: *const C_tensor,
    a: *const C_tensor,
    b: *const C_tensor,
    scale: f64,
}

impl RawLinear {
    fn plain(weight: &Tensor, bias: Option<&Tensor>) -> Self {
        let none = std::ptr::null();
        Self { weight: weight.as_ptr(), bias: pointer(bias), onto: none, a: none, b: none, scale: 0.0 }
    }
}

fn pointer(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(std::ptr::null(), |tensor| tensor.as_ptr())
}

/// Whether these kernels serve such tensors.
#[must_use]
pub fn serves(tensors: &[&Tensor]) -> bool {
    let kind = tensors.first().map(|tensor| tensor.kind());
    matches!(kind, Some(Kind::Float | Kind::BFloat16))
        && tensors.iter().all(|tensor| !takes_gpu_path(tensor.device()) && Some(tensor.kind()) == kind)
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, and `x` again, for what goes on beside the norm.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    assert_eq!(x.size().last(), weight.size().last(), "one weight per column");
    let mut beside = std::ptr::null_mut();
    // SAFETY: two live tensors of matching sizes, and a place for each result.
    let y = made(|out| unsafe { dyad_rms_norm(x.as_ptr(), weight.as_ptr(), eps, out, &raw mut beside) });
    // SAFETY: on success the kernel has left a second fresh tensor that we own.
    (y, unsafe { Tensor::from_ptr(beside) })
}

/// Rotates `[tokens, heads, width]` by angles with contiguous cosines and sines `[tokens, 1, width]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (size, angles) = (x.size(), cos.size());
    assert!(size[0] == angles[0] && size[2] == angles[2] && cos.is_contiguous() && sin.is_contiguous());
    // SAFETY: three live tensors of matching sizes, and a place for the result.
    made(|out| unsafe { dyad_rotate(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), out) })
}

/// The same on any device, in three launches; `sin` is negative in its first half.
pub fn rotate_half(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    // SAFETY: three live tensors, and a place for the result; the operators check sizes.
    made(|out| unsafe { dyad_rotate_half(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), out) })
}

/// One linear layer as the bridge takes it.
#[derive(Clone, Copy, Debug)]
pub struct LinearArgs<'a> {
    /// `[out, in]`.
    pub weight: &'a Tensor,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
    /// The adapter beside it.
    pub adapter: Option<AdapterArgs<'a>>,
}

/// A low-rank update as the bridge takes it.
#[derive(Clone, Copy, Debug)]
pub struct AdapterArgs<'a> {
    /// `[rank, in]`.
    pub a: &'a Tensor,
    /// `[out, rank]`.
    pub b: &'a Tensor,
    /// `lora_alpha / lora_r`.
    pub scale: f64,
}

/// Linear layers of one input `[tokens, in]`, adapters included, on any device: `[tokens, out]` each. `ours` takes the
/// bridge's own products, which must serve all matrices; they alone add to `onto`, `[tokens, out]`, in layers without a bias.
pub fn linears<const N: usize>(
    x: &Tensor,
    layers: [LinearArgs<'_>; N],
    onto: Option<&Tensor>,
    ours: bool,
) -> [Tensor; N] {
    let raw = layers.map(|layer| {
        let adapter = layer.adapter;
        assert!(
            onto.is_none() || (ours && layer.bias.is_none()),
            "only products of ours add, and no bias too"
        );
        RawLinear {
            onto: pointer(onto),
            a: pointer(adapter.map(|adapter| adapter.a)),
            b: pointer(adapter.map(|adapter| adapter.b)),
            scale: adapter.map_or(0.0, |adapter| adapter.scale),
            ..RawLinear::plain(layer.weight, layer.bias)
        }
    });
    run(x, &raw, ours)
}

/// `x wᵀ + bias` by the bridge's own products, which must serve.
pub(crate) fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let [y] = run(x, &[RawLinear::plain(weight, bias)], true);
    y
}

fn run<const N: usize>(x: &Tensor, linears: &[RawLinear; N], ours: bool) -> [Tensor; N] {
    let mut ys = [std::ptr::null_mut(); N];
    // SAFETY: live tensors, null where they may be missing, and a place for each result; the operators check sizes, and callers
    // those of our own products.
    let done = check(unsafe { dyad_linears(x.as_ptr(), linears.as_ptr(), N, ours, ys.as_mut_ptr()) });
    if let Err(error) = done {
        panic!("linear layers: {error}");
    }
    // SAFETY: on success the bridge has left fresh tensors that we own.
    ys.map(|y| unsafe { Tensor::from_ptr(y) })
}

/// `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!(gate.size(), up.size(), "one gate per value");
    // SAFETY: two live tensors of the same size, and a place for the result.
    made(|out| unsafe { dyad_swiglu(gate.as_ptr(), up.as_ptr(), out) })
}

/// Threads that share a kernel's work.
pub fn kernel_threads() -> Result<usize, TorchError> {
    let mut threads = 0;
    // SAFETY: writes one integer.
    check(unsafe { dyad_kernel_threads(&raw mut threads) })?;
    Ok(threads)
}

/// `total += part`, whatever the kinds; `total` is changed through every handle to it.
pub fn accumulate(total: &Tensor, part: &Tensor) {
    let narrow = total.kind() == Kind::Float && part.kind() == Kind::BFloat16;
    let plain = total.size() == part.size() && total.is_contiguous() && part.is_contiguous();
    if !narrow || !plain || takes_gpu_path(total.device()) || takes_gpu_path(part.device()) {
        let mut total = total.shallow_clone();
        tch::no_grad(|| total += part);
        return;
    }
    // SAFETY: two live, contiguous CPU tensors of the same size and of the kinds that the bridge asks for.
    if let Err(error) = check(unsafe { dyad_accumulate(total.as_ptr(), part.as_ptr()) }) {
        panic!("fused kernel: {error}");
    }
}

/// Attention over packed segments: `[tokens, heads, width]`, and `[tokens, kv heads, width]` keys and values.
pub fn segmented_attention(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[Segment]) -> Tensor {
    let mut layout = Vec::new();
    for segment in segments {
        layout.extend([segment.start, segment.prompt, segment.branches.len() as i64]);
        layout.extend(&segment.branches);
    }
    // SAFETY: three live tensors, an array as long as said, and a place for the result.
    made(|out| unsafe {
        dyad_segmented_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), layout.as_ptr(), layout.len(), out)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without OpenMP the bridge compiles as well, and its loops run on one thread.
    #[test]
    fn kernels_share_their_work_between_all_threads() {
        tch::set_num_threads(2);
        assert_eq!(kernel_threads().unwrap(), 2);
    }

    #[test]
    fn fused_kernels_take_the_instructions_that_were_asked_for() {
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

    /// The tests of fused kernels once more, in processes that take the loops of lesser CPUs.
    #[test]
    fn kernels_are_right_with_every_set_of_instructions() {
        for capability in ["avx2", "default"] {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["tests::fused_", "is_no_number", "equal_logits"])
                .env("DYAD_CPU_CAPABILITY", capability)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && !said.contains(" 0 passed"), "{capability}: {said}");
        }
    }
}
