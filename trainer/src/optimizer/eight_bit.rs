//! Moments in eight bits a value: blockwise dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861).
//!
//! A block of 256 values shares its largest magnitude; each value is the nearest of 256 fractions of it, which are dense near
//! zero (seven decades) and near the largest. Second moments that are not zero never become zero, because the step divides by
//! their root.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::zero::unit_weights::part;
use dyad_torch::adamw::{AdamHyper, AdamSlot, adamw_8bit, fused_adamw};
use dyad_torch::error::TorchError;

/// Values that share a scale.
pub const BLOCK: i64 = 256;
/// Values that are converted to float32 at a time.
const CHUNK: i64 = 1 << 20;
/// The same on a GPU, which computes smaller chunks in less time than their launch takes.
const GPU_CHUNK: i64 = 1 << 26;
/// Decades that the fractions span.
const DECADES: i32 = 7;

/// Range of the fractions that codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// From -1 to 1.
    Signed,
    /// From 0 to 1.
    Unsigned,
}

impl Map {
    /// The 256 fractions, ascending.
    fn fractions(self) -> Vec<f32> {
        let mut fractions = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let count = 1 << (decade + i32::from(self == Self::Unsigned));
            let scale = 10f64.powi(decade - DECADES + 1);
            for index in 0..count {
                // Middles of equal intervals of [0.1, 1].
                let middle = 0.1 + 0.9 * (f64::from(index) + 0.5) / f64::from(count);
                fractions.push((scale * middle) as f32);
                if self == Self::Signed {
                    fractions.push((-scale * middle) as f32);
                }
            }
        }
        fractions.sort_by(f32::total_cmp);
        fractions
    }
}

/// Quantised values.
#[derive(Debug)]
pub struct EightBit {
    /// Index of the fraction. `[values]`, uint8
    pub codes: Tensor,
    /// Largest magnitude of each block. `[values / 256]`
    pub absmax: Tensor,
    map: Map,
    fractions: Tensor,
    /// Midpoints between neighbouring fractions; the last is infinite.
    middles: Tensor,
    /// Code at which the kernel's search begins, by cell.
    starts: Tensor,
}

/// The kernel's cells of one sign: exponents from -25 to 0, and eight bits of mantissa.
const CELLS: u32 = (25 << 8) + 1;

/// Code of the lowest value of each cell, positive ones first.
fn starts(middles: &[f32]) -> Vec<i32> {
    let below = |value: f32| middles.iter().filter(|&&middle| middle < value).count() as i32;
    let edge = |cell: u32| if cell == 0 { 0.0 } else { f32::from_bits((cell + (102 << 8)) << 15) };
    let positive = (0..CELLS).map(|cell| below(edge(cell)));
    let negative = (0..CELLS).map(|cell| below(-edge(cell + 1)));
    positive.chain(negative).collect()
}

impl EightBit {
    /// All zero; `len` must be a multiple of the block.
    #[must_use]
    pub fn zeros(len: i64, map: Map, device: Device) -> Self {
        let fractions = map.fractions();
        let between = fractions.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
        let middles: Vec<f32> = between.chain([f32::INFINITY]).collect();
        let zero = fractions.iter().position(|&fraction| fraction == 0.0).unwrap_or(0);
        Self {
            codes: Tensor::full([len], zero as i64, (Kind::Uint8, device)),
            absmax: Tensor::zeros([len / BLOCK], (Kind::Float, device)),
            map,
            fractions: Tensor::from_slice(&fractions).to_device(device),
            middles: Tensor::from_slice(&middles).to_device(device),
            starts: Tensor::from_slice(&starts(&middles)),
        }
    }

    fn read(&self, range: &Range<i64>) -> Tensor {
        let codes = part(&self.codes, range.clone()).to_kind(Kind::Int);
        let fractions = self.fractions.index_select(0, &codes).view([-1, BLOCK]);
        (fractions * part(&self.absmax, blocks(range)).unsqueeze(1)).view([-1])
    }

    fn write(&mut self, range: &Range<i64>, values: &Tensor) {
        let values = values.view([-1, BLOCK]);
        let absmax = values.abs().amax([1i64].as_slice(), false);
        // The clamp keeps a block of zeros from becoming NaN.
        let scaled = &values / absmax.clamp_min(f64::from(f32::MIN_POSITIVE)).unsqueeze(1);
        let mut codes = scaled.bucketize(&self.middles, true, false);
        if self.map == Map::Unsigned {
            codes = codes.maximum(&values.gt(0.0).to_kind(Kind::Int));
        }
        part(&self.codes, range.clone()).copy_(&codes.view([-1]));
        part(&self.absmax, blocks(range)).copy_(&absmax);
    }
}

fn blocks(range: &Range<i64>) -> Range<i64> {
    range.start / BLOCK..range.end / BLOCK
}

/// AdamW's two moments.
#[derive(Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub exp_avg: EightBit,
    /// Running mean of the squared gradient.
    pub exp_avg_sq: EightBit,
}

impl Moments {
    /// All zero; `len` must be a multiple of the block.
    #[must_use]
    pub fn zeros(len: i64, device: Device) -> Self {
        let zeros = |map| EightBit::zeros(len, map, device);
        Self { exp_avg: zeros(Map::Signed), exp_avg_sq: zeros(Map::Unsigned) }
    }

    /// One AdamW step of the values of `range`; `parameter` and `gradient` hold these values in float32.
    pub fn update(
        &mut self,
        range: Range<i64>,
        parameter: &Tensor,
        gradient: &Tensor,
        step: u64,
        hyper: AdamHyper,
    ) -> Result<(), TorchError> {
        if parameter.device() != Device::Cpu {
            return self.composed(range, parameter, gradient, step, hyper);
        }
        let block = blocks(&range);
        let (first, second) = (&self.exp_avg, &self.exp_avg_sq);
        let views = [first, second].map(|moment| {
            let (codes, absmax) = (part(&moment.codes, range.clone()), part(&moment.absmax, block.clone()));
            [
                codes,
                absmax,
                moment.fractions.shallow_clone(),
                moment.middles.shallow_clone(),
                moment.starts.shallow_clone(),
            ]
        });
        let [first, second] = &views;
        let tensors: Vec<&Tensor> = first.iter().chain(second).collect();
        adamw_8bit(parameter, gradient, &tensors, step, hyper)
    }

    /// The same with libtorch's operators, chunk by chunk in float32.
    fn composed(
        &mut self,
        range: Range<i64>,
        parameter: &Tensor,
        gradient: &Tensor,
        step: u64,
        hyper: AdamHyper,
    ) -> Result<(), TorchError> {
        let step = &Tensor::full([], step as f64, (Kind::Float, parameter.device()));
        tch::no_grad(|| {
            let most = if parameter.device().is_cuda() { GPU_CHUNK } else { CHUNK };
            for start in range.clone().step_by(most as usize) {
                let chunk = start..(start + most).min(range.end);
                let within = chunk.start - range.start..chunk.end - range.start;
                let (first, second) = (self.exp_avg.read(&chunk), self.exp_avg_sq.read(&chunk));
                let slot = AdamSlot {
                    parameter: &part(parameter, within.clone()),
                    gradient: &part(gradient, within),
                    exp_avg: &first,
                    exp_avg_sq: &second,
                };
                fused_adamw(&[slot], step, None, hyper)?;
                self.exp_avg.write(&chunk, &first);
                self.exp_avg_sq.write(&chunk, &second);
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_256_ascending_and_dense_near_zero() {
        for (map, lowest) in [(Map::Signed, -1.0), (Map::Unsigned, 0.0)] {
            let fractions = map.fractions();
            assert_eq!(fractions.len(), 256);
            assert!(fractions.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(fractions[0] >= lowest && fractions[255] == 1.0 && fractions.contains(&0.0));
            let smallest = fractions.iter().copied().filter(|&fraction| fraction > 0.0).fold(1.0, f32::min);
            assert!(smallest < 1e-6, "{smallest}");
        }
    }

    /// Half the widest gap between neighbouring fractions of a decade: 0.9 / 64 / 2 of the decade's end for signed ones.
    #[test]
    fn values_come_back_within_the_maps_precision() {
        tch::manual_seed(1);
        let values = Tensor::randn([4 * BLOCK], (Kind::Float, Device::Cpu));
        for (map, values, tolerance) in
            [(Map::Signed, values.shallow_clone(), 0.01), (Map::Unsigned, values.square(), 0.005)]
        {
            let mut kept = EightBit::zeros(4 * BLOCK, map, Device::Cpu);
            kept.write(&(0..4 * BLOCK), &values);
            let error =
                (kept.read(&(0..4 * BLOCK)) - &values).view([-1, BLOCK]).abs().amax([1i64].as_slice(), false);
            let worst = (error / &kept.absmax).max().double_value(&[]);
            assert!(worst < tolerance, "{map:?}: {worst}");
        }
    }

    /// The kernel rounds in another order than libtorch's operators, so a value between two fractions may get either.
    #[test]
    fn the_kernel_equals_its_composition() {
        tch::manual_seed(2);
        let options = (Kind::Float, Device::Cpu);
        let len = 40 * BLOCK;
        let (kernel, composed) = (Tensor::randn([len], options), Tensor::zeros([len], options));
        composed.shallow_clone().copy_(&kernel);
        let hyper = AdamHyper { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, weight_decay: 0.1, eps: 1e-8 };
        let (mut a, mut b) = (Moments::zeros(len, Device::Cpu), Moments::zeros(len, Device::Cpu));
        for step in 1..=3 {
            // Magnitudes over several decades, and zeros.
            let gradient = Tensor::randn([len], options) * Tensor::randn([len], options).exp();
            let gradient = &gradient * gradient.gt(-0.5).to_kind(Kind::Float);
            a.update(0..len, &kernel, &gradient, step, hyper).unwrap();
            b.composed(0..len, &composed, &gradient, step, hyper).unwrap();
            for (ours, theirs) in [(&a.exp_avg, &b.exp_avg), (&a.exp_avg_sq, &b.exp_avg_sq)] {
                let other = (ours.codes.to_kind(Kind::Int) - theirs.codes.to_kind(Kind::Int)).abs();
                assert!(other.max().int64_value(&[]) <= 1);
                assert!(other.count_nonzero(None).int64_value(&[]) < len / 1000);
            }
        }
        // Each of the three steps is at most about 0.01; one code more or less changes it by a hundredth.
        assert!((&kernel - &composed).abs().max().double_value(&[]) < 1e-3);
        assert!((&kernel - &composed).abs().mean(Kind::Float).double_value(&[]) < 1e-6);
    }

    #[test]
    fn small_second_moments_do_not_become_zero_and_zeros_stay() {
        let mut values = vec![0.0f32; BLOCK as usize];
        (values[0], values[1]) = (1.0, 1e-12);
        let mut kept = EightBit::zeros(2 * BLOCK, Map::Unsigned, Device::Cpu);
        kept.write(&(BLOCK..2 * BLOCK), &Tensor::from_slice(&values));
        let read: Vec<f32> = kept.read(&(0..2 * BLOCK)).try_into().unwrap();
        assert!(read[..BLOCK as usize].iter().all(|&value| value == 0.0));
        let read = &read[BLOCK as usize..];
        assert!(
            read[0] == 1.0 && read[1] > 0.0 && read[1] < 1e-5 && read[2..].iter().all(|&value| value == 0.0)
        );
    }
}
