//! Matrix products of linear layers and of the LM head: the bridge's own (`cpp/cpu/product.cpp`) where they are faster, otherwise
//! libtorch's.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Kind, Tensor};

use super::layer::{self, accumulate};
use super::made::made;
use crate::backend::Backend;
use crate::error::check;
use crate::ffi::{dyad_add_outer, dyad_add_outer_wide, dyad_product};

/// Whether the bridge's products support `x wᵀ + bias` and its derivative.
#[must_use]
pub fn projects(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> bool {
    let out_is_even = weight.kind() == Kind::Float || weight.size()[0] % 2 == 0;
    let bias_fits = bias.is_none_or(|bias| bias.kind() == weight.kind() && bias.is_contiguous());
    out_is_even && bias_fits && weight.is_contiguous() && Backend::of_matrices(&[x, weight]) == Backend::Cpu
}

/// `x wᵀ + bias` with its derivative: `[rows, in]` and `[out, in]` to `[rows, out]`.
pub fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    if !projects(x, weight, bias) {
        return x.linear(weight, bias);
    }
    assert_eq!(x.size().last(), weight.size().last(), "one input per column of the weight");
    layer::project(x, weight, bias)
}

/// `a b`, without a derivative: `[rows, terms]` and `[terms, columns]` to `[rows, columns]`.
pub fn times(a: &Tensor, b: &Tensor) -> Tensor {
    if Backend::of_matrices(&[a, b]) != Backend::Cpu {
        return a.matmul(b);
    }
    let (a, b) = (a.contiguous(), b.contiguous());
    assert_eq!(a.size()[1], b.size()[0], "one column of `a` per row of `b`");
    // SAFETY: two live, contiguous tensors of matching sizes and of a supported kind, and a place for the result.
    made(|out| unsafe { dyad_product(a.as_ptr(), b.as_ptr(), out) })
}

/// `sum += aᵀ b` in float32: `[terms, rows]` and `[terms, columns]` to `[rows, columns]`, in place: every handle to `sum` sees the
/// change.
pub fn add_outer(sum: &Tensor, a: &Tensor, b: &Tensor) {
    if sum.kind() == Kind::Float && sum.is_contiguous() && Backend::of_matrices(&[a, b]) == Backend::Cpu {
        let (a, b) = (a.contiguous(), b.contiguous());
        assert!(a.size()[0] == b.size()[0] && sum.size() == [a.size()[1], b.size()[1]], "one row per term");
        // SAFETY: three live, contiguous tensors of matching sizes, the first float32, the others of a supported kind.
        if let Err(error) = check(unsafe { dyad_add_outer(sum.as_ptr(), a.as_ptr(), b.as_ptr()) }) {
            panic!("adding a product: {error}");
        }
    } else if a.kind() == Kind::Float {
        // One fused multiply-accumulate avoids a second tensor of the sum's size.
        let _ = sum.shallow_clone().addmm_(&a.tr(), b);
    } else if !add_wide(sum, a, b) {
        accumulate(sum, &a.tr().matmul(b));
    }
}

/// `sum += aᵀ b` in one operator if the device has one (bfloat16 factors on CUDA); returns whether it did.
fn add_wide(sum: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    let mut done = false;
    // SAFETY: three live tensors, and a place for the answer; the operator checks sizes.
    let added = unsafe { dyad_add_outer_wide(sum.as_ptr(), a.as_ptr(), b.as_ptr(), &raw mut done) };
    if let Err(error) = check(added) {
        panic!("adding a product: {error}");
    }
    done
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::autograd::{grad, grad_into};
    use crate::backend::as_on_gpu;

    /// (rows, inputs, outputs): smaller than a block; several blocks and panels with remainders; more terms than one slab; more
    /// columns than rows.
    const SHAPES: [(i64, i64, i64); 6] =
        [(1, 4, 6), (37, 70, 100), (130, 514, 200), (700, 66, 130), (65, 5000, 34), (33, 64, 9000)];
    const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    /// Asserts a small largest difference from the float64 product, relative to the largest value. Float32 rounds each of up to
    /// 9000 additions; bfloat16 keeps eight bits of a result, which is rounded up to twice.
    fn close(found: &Tensor, exact: &Tensor, what: &str) {
        let tolerance = if found.kind() == Kind::Float { 2e-6 } else { 1e-2 };
        let worst = ((found.to_kind(Kind::Double) - exact).abs().max() / exact.abs().max()).double_value(&[]);
        assert!(worst < tolerance, "{what} {:?} {:?}: differs by {worst}", found.kind(), found.size());
    }

    fn exact(tensor: &Tensor) -> Tensor {
        tensor.to_kind(Kind::Double)
    }

    #[test]
    fn products_match_float64() {
        tch::manual_seed(6);
        for (kind, (rows, inputs, outputs)) in
            KINDS.iter().flat_map(|kind| SHAPES.map(|shape| (*kind, shape)))
        {
            let (x, w) = (random(&[rows, inputs], kind), random(&[outputs, inputs], kind));
            let (dy, bias) = (random(&[rows, outputs], kind), random(&[outputs], kind));
            let plain = exact(&x).matmul(&exact(&w).tr());
            close(&project(&x, &w, None), &plain, "x wᵀ");
            close(&project(&x, &w, Some(&bias)), &(plain + exact(&bias)), "x wᵀ + bias");
            close(&times(&dy, &w), &exact(&dy).matmul(&exact(&w)), "dy w");
            let sum = random(&[outputs, inputs], Kind::Float);
            let expected = exact(&sum) + exact(&dy).tr().matmul(&exact(&x));
            add_outer(&sum, &dy, &x);
            // libtorch rounds the product to `kind` before it adds it: compare with that kind's tolerance.
            let sum = if Backend::of_matrices(&[&dy, &x]) == Backend::Cpu { sum } else { sum.to_kind(kind) };
            close(&sum, &expected, "sum + dyᵀ x");
        }
    }

    /// Compares returned gradients and gradients added to a sink with libtorch's.
    #[test]
    fn gradients_match_libtorchs_linear_layer() {
        tch::manual_seed(7);
        for kind in KINDS {
            let leaf = |size: &[i64]| random(size, kind).set_requires_grad(true);
            let inputs = [leaf(&[37, 70]), leaf(&[100, 70]), leaf(&[100])];
            let [x, w, bias] = &inputs;
            let inputs = [w, x, bias];
            let output_grad = random(&[37, 100], kind);
            let forward = || project(x, w, Some(bias));
            let expected = as_on_gpu(|| grad(&[&forward()], &[&output_grad], &inputs).unwrap());
            let handed_out = grad(&[&forward()], &[&output_grad], &inputs).unwrap();
            let sink = w.ones_like().to_kind(Kind::Float).detach();
            let added = grad_into(&[&forward()], &[&output_grad], &inputs, &[&sink]).unwrap();
            for (index, expected) in
                expected.iter().map(|gradient| exact(gradient.as_ref().unwrap())).enumerate()
            {
                let close = |found: &Tensor| close(&found.to_kind(kind), &expected, "gradient");
                close(handed_out[index].as_ref().unwrap());
                match &added[index] {
                    Some(gradient) => close(gradient),
                    None => close(&(&sink - 1.0)),
                }
            }
            let sunk: Vec<bool> = added.iter().map(Option::is_none).collect();
            assert_eq!(sunk, [Backend::of_matrices(&[x, w]) == Backend::Cpu, false, false]);
        }
    }

    #[test]
    fn the_input_of_a_frozen_weight_gets_its_gradient() {
        let x = random(&[40, 32], Kind::Float).set_requires_grad(true);
        let w = random(&[16, 32], Kind::Float);
        let y = project(&x, &w, None);
        let gradients = grad(&[&y], &[&y.ones_like()], &[&x]).unwrap();
        close(gradients[0].as_ref().unwrap(), &exact(&y.ones_like()).matmul(&exact(&w)), "dx");
    }
}
