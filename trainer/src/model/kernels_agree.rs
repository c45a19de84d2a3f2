//! Tests that compare a fused kernel with its composition from libtorch's operators, and their helpers.

use dyad_torch::autograd::grad;
use dyad_torch::ops::layer;
use tch::{Device, Kind, Tensor};

/// A random tensor that requires a gradient.
pub(super) fn leaf(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
}

/// Largest difference, relative to the largest value.
pub(super) fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((&a - &b).abs().max() / b.abs().max()).double_value(&[])
}

/// Asserts that a fused kernel and its composition give the same values and gradients: up to rounding in float32, up to a few units in
/// the last place in bfloat16.
pub(super) fn agree(inputs: &[Tensor], fused: impl Fn() -> Tensor, composed: impl Fn() -> Tensor) {
    let tolerance = if inputs[0].kind() == Kind::Float { 2e-6 } else { 2e-2 };
    let (ours, theirs) = (fused(), composed());
    assert_eq!((ours.kind(), ours.size()), (theirs.kind(), theirs.size()));
    assert!(difference(&ours, &theirs) < tolerance, "values differ by {}", difference(&ours, &theirs));
    let output_grad = Tensor::randn_like(&ours);
    let inputs: Vec<&Tensor> = inputs.iter().collect();
    let ours = grad(&[&ours], &[&output_grad], &inputs).unwrap();
    let theirs = grad(&[&theirs], &[&output_grad], &inputs).unwrap();
    for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        let worst = difference(ours.as_ref().unwrap(), theirs.as_ref().unwrap());
        assert!(worst < tolerance, "gradient {index} differs by {worst}");
    }
}

/// The precisions of the passes.
pub(super) const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// The reference for both kernels. Casts back before applying the weight, as Llama does.
fn composed_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let variance = wide.square().mean_dim(-1i64, true, Kind::Float);
    (wide * (variance + eps).rsqrt()).to_kind(x.kind()) * weight
}

#[test]
fn fused_rms_norm_equals_its_composition() {
    tch::manual_seed(1);
    for (kind, columns) in KINDS.into_iter().flat_map(|kind| [(kind, 7), (kind, 64), (kind, 100)]) {
        let inputs = [leaf(&[37, columns], kind), leaf(&[columns], kind)];
        let [x, weight] = &inputs;
        agree(&inputs, || layer::rms_norm(x, weight, 1e-5), || composed_rms_norm(x, weight, 1e-5));
        let beside = || {
            let (normed, x) = layer::rms_norm_with_residual(x, weight, 1e-5);
            normed * 3 + x
        };
        agree(&inputs, beside, || composed_rms_norm(x, weight, 1e-5) * 3 + x);
    }
}

#[test]
fn layer_kernels_are_right_with_every_instruction_set() {
    dyad_torch_testing::run_with_older_instruction_sets(&[
        "model::attention::tests::fused_attention_equals_its_composition",
        "model::attention::tests::nan_in_a_query_stays_in_its_row",
        "model::kernels_agree::fused_rms_norm_equals_its_composition",
        "model::linear::tests::fused_layers_of_one_input_equal_their_composition",
        "model::mlp::tests::fused_swiglu_equals_its_composition",
        "model::rotary::tests::fused_rotation_equals_its_composition",
    ]);
}
