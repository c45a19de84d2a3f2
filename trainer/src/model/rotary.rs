//! Rotary positions and the scalings of their frequencies.

use dyad_families::{ModelConfig, RopeScaling};
use dyad_torch::backend::on_gpu_path;
use dyad_torch::ops::layer;
use dyad_torch::transfer::upload;
use tch::{Kind, Tensor};

/// Cosines and sines of one packed batch's positions, `[tokens, 1, head_dim]` each. Computed once per micro-batch, for every layer of
/// policy and reference.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
    /// The first half of the sines is negated, as [`layer::rotate_signed`] expects: on GPUs.
    signed: bool,
}

impl Rotary {
    /// For the given positions, in the precision of the passes; frequencies are computed in float32 as transformers does.
    #[must_use]
    pub fn new(config: &ModelConfig, positions: &Tensor, kind: Kind) -> Self {
        let inv_freq = upload(&inverse_frequencies(config), positions.device());
        let half = positions.to_kind(Kind::Float).unsqueeze(1) * inv_freq.unsqueeze(0);
        let signed = on_gpu_path(positions.device());
        // Sine is odd and cosine even: negated angles negate only the sines.
        let first = if signed { -&half } else { half.shallow_clone() };
        let angles = Tensor::cat(&[&first, &half], 1).unsqueeze(1);
        Self { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind), signed }
    }

    /// Rotates `[tokens, heads, head_dim]`.
    pub(super) fn apply(&self, x: &Tensor) -> Tensor {
        if !self.signed {
            return layer::rotate(x, &self.cos, &self.sin);
        }
        layer::rotate_signed(x, &self.cos, &self.sin)
    }

    #[cfg(test)]
    pub(super) fn of_angles(angles: &Tensor, kind: Kind) -> Self {
        Self { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind), signed: false }
    }

    #[cfg(test)]
    fn composed(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let rotated = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        x * &self.cos + rotated * &self.sin
    }
}

/// `theta^(-2i/d)` for each pair of dimensions, after scaling.
fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let half = config.head_dim / 2;
    (0..half)
        .map(|i| {
            let base = 1.0 / config.rope_theta.powf(2.0 * i as f64 / config.head_dim as f64);
            scaled(base, &config.rope_scaling) as f32
        })
        .collect()
}

fn scaled(inv_freq: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Default => inv_freq,
        RopeScaling::Linear { factor } => inv_freq / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let wavelength = 2.0 * std::f64::consts::PI / inv_freq;
            let original = original_max_position_embeddings;
            if wavelength < original / high_freq_factor {
                inv_freq
            } else if wavelength > original / low_freq_factor {
                inv_freq / factor
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels_agree::{KINDS, agree, leaf};
    use tch::Device;

    #[test]
    fn fused_rotation_equals_its_composition() {
        tch::manual_seed(2);
        for kind in KINDS {
            let angles = Tensor::randn([19, 6], (Kind::Float, Device::Cpu));
            let angles = Tensor::cat(&[&angles, &angles], 1).unsqueeze(1);
            let rotary = Rotary::of_angles(&angles, kind);
            let inputs = [leaf(&[19, 3, 12], kind)];
            agree(&inputs, || rotary.apply(&inputs[0]), || rotary.composed(&inputs[0]));
        }
    }
}
