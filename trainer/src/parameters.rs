//! Trainable parameters in flat buckets: master weights, gradients and optimizer moments, one buffer each per bucket.
//!
//! Parameters are grouped in *units*, in forward order: embedding, each decoder layer, final norm with head. A bucket is a
//! run of units; walking backward through the units, a bucket's gradient is complete when its lowest unit is done, and its
//! all-reduce starts there while lower units still compute.

use std::ops::Range;

use tch::{Kind, Tensor};

/// Units are merged into a bucket until it holds this many bytes, so that adapters do not pay one message per layer.
const BUCKET_BYTES: i64 = 8 << 20;

/// A parameter: its tensor in the passes' precision and its slices of the bucket's buffers.
#[derive(Debug)]
pub struct Parameter {
    /// Name in checkpoints.
    pub name: String,
    /// What the model computes with; requires grad.
    pub leaf: Tensor,
    /// Float32 weights; the same memory as `leaf` when the passes are float32.
    pub master: Tensor,
    /// Float32 gradient.
    pub grad: Tensor,
    /// Running mean of the gradient.
    pub exp_avg: Tensor,
    /// Running mean of the squared gradient.
    pub exp_avg_sq: Tensor,
}

impl Parameter {
    /// Weight decay spares biases and norms, as transformers does.
    #[must_use]
    pub fn decays(&self) -> bool {
        self.master.dim() > 1
    }
}

/// Units whose gradients travel together.
#[derive(Debug)]
pub struct Bucket {
    /// Flat float32 gradient of all parameters.
    pub grad: Tensor,
    /// Units it covers.
    pub units: Range<usize>,
}

/// All trainable parameters of a run.
#[derive(Debug)]
pub struct Parameters {
    /// Parameters of each unit, forward order.
    pub units: Vec<Vec<Parameter>>,
    /// Buckets, in the order in which their gradients complete.
    pub buckets: Vec<Bucket>,
}

/// A trainable tensor of the model, float32, with its checkpoint name.
pub type Named<'a> = (String, &'a mut Tensor);

impl Parameters {
    /// Moves the given float32 tensors into flat buffers and leaves, in their place, trainable leaves of kind `compute`.
    #[must_use]
    pub fn adopt(units: Vec<Vec<Named<'_>>>, compute: Kind) -> Self {
        let sizes: Vec<i64> =
            units.iter().map(|unit| unit.iter().map(|(_, tensor)| tensor.numel() as i64).sum()).collect();
        let mut units: Vec<Option<Vec<Named<'_>>>> = units.into_iter().map(Some).collect();
        let mut adopted: Vec<Vec<Parameter>> = Vec::new();
        adopted.resize_with(units.len(), Vec::new);
        let mut buckets = Vec::new();
        for range in bucket_ranges(&sizes) {
            let total: i64 = sizes[range.clone()].iter().sum();
            let members: Vec<_> =
                range.clone().filter_map(|unit| Some((unit, units[unit].take()?))).collect();
            let Some(device) =
                members.iter().flat_map(|(_, unit)| unit).map(|(_, tensor)| tensor.device()).next()
            else {
                continue;
            };
            let buffer = || Tensor::zeros([total], (Kind::Float, device));
            let buffers =
                Buffers { master: buffer(), grad: buffer(), exp_avg: buffer(), exp_avg_sq: buffer() };
            let mut offset = 0;
            for (unit, tensors) in members {
                for (name, tensor) in tensors {
                    adopted[unit].push(buffers.adopt(name, tensor, offset, compute));
                    offset += tensor.numel() as i64;
                }
            }
            buckets.push(Bucket { grad: buffers.grad, units: range });
        }
        Self { units: adopted, buckets }
    }

    /// Every parameter, forward order.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.units.iter().flatten()
    }

    /// Number of trainable values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.iter().map(|parameter| parameter.master.numel() as u64).sum()
    }

    /// Forgets the gradients of the last step.
    pub fn zero_grad(&mut self) {
        for bucket in &mut self.buckets {
            let _ = bucket.grad.zero_();
        }
    }

    /// Copies updated master weights to the tensors that the model computes with.
    pub fn publish(&mut self) {
        tch::no_grad(|| {
            for parameter in
                self.units.iter_mut().flatten().filter(|parameter| parameter.leaf.kind() != Kind::Float)
            {
                parameter.leaf.copy_(&parameter.master);
            }
        });
    }
}

struct Buffers {
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl Buffers {
    fn adopt(&self, name: String, tensor: &mut Tensor, offset: i64, compute: Kind) -> Parameter {
        let (len, shape) = (tensor.numel() as i64, tensor.size());
        let slice = |flat: &Tensor| flat.narrow(0, offset, len).view(shape.as_slice());
        let mut master = slice(&self.master);
        tch::no_grad(|| master.copy_(tensor));
        // `detach` makes a leaf over the same memory, so float32 passes see every optimizer step without a copy.
        *tensor = master.to_kind(compute).detach().set_requires_grad(true);
        Parameter {
            name,
            leaf: tensor.shallow_clone(),
            master,
            grad: slice(&self.grad),
            exp_avg: slice(&self.exp_avg),
            exp_avg_sq: slice(&self.exp_avg_sq),
        }
    }
}

/// Splits units into buckets from the last unit down; ranges come in the order in which they complete.
fn bucket_ranges(sizes: &[i64]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut end, mut bytes) = (sizes.len(), 0);
    for unit in (0..sizes.len()).rev() {
        bytes += 4 * sizes[unit];
        if bytes >= BUCKET_BYTES || unit == 0 {
            if bytes > 0 {
                ranges.push(unit..end);
            }
            (end, bytes) = (unit, 0);
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn buckets_cover_every_unit_once_from_the_top() {
        let ranges = |sizes: &[i64]| -> Vec<(usize, usize)> {
            bucket_ranges(sizes).into_iter().map(|range| (range.start, range.end)).collect()
        };
        assert_eq!(ranges(&[10, 1, 1, 5]), [(0, 4)]);
        let big = BUCKET_BYTES / 4;
        assert_eq!(ranges(&[big, 1, big, 5]), [(2, 4), (0, 2)]);
        assert_eq!(ranges(&[0, 1, 1, 0]), [(0, 4)]);
    }

    #[test]
    fn float32_leaves_share_the_masters_memory() {
        let mut a = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let mut b = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        let parameters =
            Parameters::adopt(vec![vec![("a".into(), &mut a)], vec![("b".into(), &mut b)]], Kind::Float);
        let mut master = parameters.units[0][0].master.shallow_clone();
        let _ = tch::no_grad(|| master.fill_(7.0));
        assert_eq!(a.double_value(&[1, 1]), 7.0);
        assert!(a.requires_grad() && a.is_leaf());
        assert!(parameters.units[0][0].decays() && !parameters.units[1][0].decays());
    }

    #[test]
    fn bfloat16_leaves_follow_on_publish() {
        let mut a = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let mut parameters = Parameters::adopt(vec![vec![("a".into(), &mut a)]], Kind::BFloat16);
        let _ = tch::no_grad(|| parameters.units[0][0].master.shallow_clone().fill_(3.0));
        assert_eq!(a.double_value(&[0]), 1.0);
        parameters.publish();
        assert_eq!((a.double_value(&[0]), a.kind()), (3.0, Kind::BFloat16));
    }
}
