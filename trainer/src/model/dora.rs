//! DoRA (Liu et al. 2024, arXiv 2402.09353) as in PEFT: a layer with an adapter computes with the weight `m V / ||V||` instead of
//! `V = W + scale B A`. `||V||` holds one norm per output and counts as a constant in the backward pass; the magnitudes `m` are trained.

use std::cell::OnceCell;

use dyad_torch::ops::product;
use tch::{Kind, Tensor};

/// The magnitudes of one adapted layer.
#[derive(Debug)]
pub struct Dora {
    /// `[out]`, float32 in every precision of the passes: an update may be smaller than bfloat16 can show.
    pub magnitude: Tensor,
    /// `||W||²` per output, which never changes. `[out]`, float32
    squares: OnceCell<Tensor>,
}

/// The matrices of `V = W + scale B A`.
#[derive(Clone, Copy, Debug)]
pub struct Adapted<'a> {
    /// `W`, `[out, in]`.
    pub weight: &'a Tensor,
    /// `A`, `[rank, in]`.
    pub a: &'a Tensor,
    /// `B`, `[out, rank]`.
    pub b: &'a Tensor,
    /// The adapter's scale.
    pub scale: f64,
}

impl Dora {
    /// These magnitudes.
    #[must_use]
    pub fn new(magnitude: Tensor) -> Self {
        Self { magnitude, squares: OnceCell::new() }
    }

    /// Magnitudes with which the layer still computes `V`.
    #[must_use]
    pub fn fresh(adapted: Adapted<'_>) -> Self {
        let squares = adapted.squares();
        let magnitude = adapted.norms(&squares);
        Self { magnitude, squares: OnceCell::from(squares) }
    }

    /// `m / ||V|| - 1` in the precision of `x`, `[out]`. It is small, so a narrow precision keeps more of it than of `m / ||V||`.
    pub fn stretch(&self, adapted: Adapted<'_>, kind: Kind) -> Tensor {
        let norms = adapted.norms(self.squares.get_or_init(|| adapted.squares()));
        (&self.magnitude / norms - 1.0).to_kind(kind)
    }

    /// The same magnitudes, detached from training.
    #[must_use]
    pub fn frozen(&self) -> Self {
        Self::new(self.magnitude.detach().copy())
    }
}

impl Adapted<'_> {
    fn squares(self) -> Tensor {
        tch::no_grad(|| {
            self.weight.to_kind(Kind::Float).square().sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
        })
    }

    /// `||V||` without the matrix `B A`: `||W||² + 2 scale (W Aᵀ) · B + scale² (B A Aᵀ) · B`, row by row.
    fn norms(self, squares: &Tensor) -> Tensor {
        tch::no_grad(|| {
            let rows = |product: Tensor, other: &Tensor| {
                (product * other).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
            };
            let crossed = product::project(self.a, self.weight, None).tr().to_kind(Kind::Float);
            let (a, b) = (self.a.to_kind(Kind::Float), self.b.to_kind(Kind::Float));
            let update = b.matmul(&a.matmul(&a.tr()));
            let sum =
                squares + rows(crossed, &b) * (2.0 * self.scale) + rows(update, &b) * self.scale.powi(2);
            sum.sqrt()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn norms_equal_those_of_the_whole_matrix() {
        tch::manual_seed(5);
        let random = |rows: i64, columns: i64| Tensor::randn([rows, columns], (Kind::Float, Device::Cpu));
        let (weight, a, b) = (random(24, 40), random(3, 40), random(24, 3));
        let adapted = Adapted { weight: &weight, a: &a, b: &b, scale: 0.7 };
        let whole = &weight + b.matmul(&a) * 0.7;
        let expected = whole.square().sum_dim_intlist([1i64].as_slice(), false, Kind::Float).sqrt();
        let dora = Dora::fresh(adapted);
        assert!((&dora.magnitude - &expected).abs().max().double_value(&[]) < 1e-4);
        assert!(dora.stretch(adapted, Kind::Float).abs().max().double_value(&[]) == 0.0);
        let doubled = Dora::new(&expected * 2.0);
        assert!((doubled.stretch(adapted, Kind::Float) - 1.0).abs().max().double_value(&[]) < 1e-5);
    }
}
