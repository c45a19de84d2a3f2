//! Trainable parameters in flat buckets: weights, gradients and optimizer states, one buffer each per bucket.
//!
//! Parameters are grouped in *units*, in forward order: embedding, each decoder layer, final norm with head. A bucket is a run of units.
//! In the backward pass a bucket's gradient is complete when its lowest unit is done; its reduction starts then, while lower units still
//! compute. With sharding each rank updates its own part of every bucket.
//!
//! The files: `bucket` is one bucket, `gradients` adds up and reduces, `embedding_rows` handles the embedding's looked-up rows, and `checkpoint_view` saves and
//! restores.

mod bucket;
mod checkpoint_view;
mod embedding_rows;
mod gradients;

use std::ops::Range;
use std::rc::Rc;

pub use bucket::{Bucket, Parameter};
pub use checkpoint_view::{Source, WholeTensor};
use dyad_proto::run_config::Optim;
use tch::{Device, Kind, Tensor};

use crate::model::weights::names::{ADAPTER_PREFIX, MAGNITUDE};
use crate::optimizer::states::{MASTER, States};
use crate::zero::ranges::{Layout, Sharding, bucket_ranges};
use crate::zero::unit_weights::{Link, Residence, UnitWeights, part};
use dyad_torch::storage::releasable_zeros;

/// How parameters are kept.
#[derive(Clone, Debug)]
pub struct Keeping {
    /// Precision of the passes.
    pub compute: Kind,
    /// What is sharded over the ranks.
    pub sharding: Sharding,
    /// Precision in which gradients are sent.
    pub travels_as: Kind,
    /// The ranks, once connected.
    pub link: Link,
    /// Precision of the moments.
    pub optim: Optim,
    /// Units are merged into a bucket until it has at least this many bytes, so that adapters do not send one message per layer.
    pub bucket_bytes: i64,
    /// Keep masters and moments on the host.
    pub offload_optimizer: bool,
}

/// Bytes by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Weights that the passes compute with.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// Moments, and masters if they are not the weights.
    pub optimizer: u64,
}

/// All trainable parameters of a run.
#[derive(Debug)]
pub struct Parameters {
    /// Parameters of each unit, forward order.
    pub units: Vec<Vec<Parameter>>,
    /// Buckets, in the order in which their gradients complete.
    pub buckets: Vec<Bucket>,
    keeping: Keeping,
    /// Buckets whose gradients are being reduced into parts, oldest first.
    in_flight: std::collections::VecDeque<usize>,
    /// Rows of the embedding that this step looks up, if they are reduced separately.
    rows: Option<embedding_rows::LookedUpRows>,
}

/// A trainable tensor of the model, float32, with its checkpoint name.
pub type Named<'a> = (String, &'a mut Tensor);

impl Parameters {
    /// No parameters yet, for `units` units.
    #[must_use]
    pub fn none(units: usize, keeping: Keeping) -> Self {
        let mut empty = Vec::new();
        empty.resize_with(units, Vec::new);
        let in_flight = std::collections::VecDeque::new();
        Self { units: empty, buckets: Vec::new(), keeping, in_flight, rows: None }
    }

    /// Moves the given float32 tensors into flat buffers and replaces them by trainable leaves. Small units share a bucket.
    #[must_use]
    pub fn adopt(units: Vec<Vec<Named<'_>>>, keeping: Keeping) -> Self {
        let bytes: Vec<i64> =
            units.iter().map(|unit| unit.iter().map(|(_, tensor)| 4 * tensor.numel() as i64).sum()).collect();
        let ranges = bucket_ranges(&bytes, keeping.bucket_bytes);
        let mut parameters = Self::none(units.len(), keeping);
        let mut units: Vec<Option<Vec<Named<'_>>>> = units.into_iter().map(Some).collect();
        for range in ranges {
            let members = range.clone().filter_map(|unit| Some((unit, units[unit].take()?))).collect();
            parameters.add_bucket(range, members);
        }
        parameters
    }

    /// Adopts one unit as a bucket of its own.
    pub fn adopt_unit(&mut self, unit: usize, tensors: Vec<Named<'_>>) {
        if !tensors.is_empty() {
            self.add_bucket(unit..unit + 1, vec![(unit, tensors)]);
            self.buckets.sort_by_key(|bucket| std::cmp::Reverse(bucket.units.start));
        }
    }

    /// Adds a run of units: one bucket, and another one for the tensors that stay float32 in narrower passes.
    fn add_bucket(&mut self, units: Range<usize>, members: Vec<(usize, Vec<Named<'_>>)>) {
        let compute = self.keeping.compute;
        let named = members
            .into_iter()
            .flat_map(|(unit, tensors)| tensors.into_iter().map(move |(name, tensor)| (unit, name, tensor)));
        let (wide, usual): (Vec<_>, Vec<_>) =
            named.partition(|(_, name, _)| compute != Kind::Float && stays_wide(name));
        self.add_flat(units.clone(), usual, compute);
        self.add_flat(units, wide, Kind::Float);
    }

    fn add_flat(&mut self, units: Range<usize>, mut named: Vec<(usize, String, &mut Tensor)>, compute: Kind) {
        let Keeping { sharding, link, optim, offload_optimizer, .. } = &self.keeping;
        let Some(device) = named.first().map(|(_, _, tensor)| tensor.device()) else { return };
        let shapes: Vec<(i64, bool)> =
            named.iter().map(|(_, name, tensor)| (tensor.numel() as i64, decays(name, tensor))).collect();
        let layout = Layout::new(&shapes, *sharding);
        let state_device = if *offload_optimizer { Device::Cpu } else { device };
        let masters_are_weights = compute == Kind::Float && state_device == device;
        let own = sharding.own(layout.len);
        let copied = (!masters_are_weights).then(|| {
            let tensors: Vec<&Tensor> = named.iter().map(|(_, _, tensor)| &**tensor).collect();
            copied_part(&tensors, &layout, &own, state_device)
        });
        let mut tensors: Vec<&mut Tensor> = named.iter_mut().map(|(_, _, tensor)| &mut **tensor).collect();
        let weights = Rc::new(UnitWeights::adopt(&mut tensors, layout.clone(), compute, *sharding, link));
        let grad = match sharding.of_gradients() {
            true => releasable_zeros(layout.len, Kind::Float, device),
            false => Tensor::zeros([layout.len], (Kind::Float, device)),
        };
        for ((unit, name, tensor), slot) in named.into_iter().zip(&layout.slots) {
            *tensor = tensor.detach().set_requires_grad(true);
            let grad = grad.narrow(0, slot.offset, slot.len).view(tensor.size().as_slice());
            self.units[unit].push(Parameter { name, leaf: tensor.shallow_clone(), grad });
        }
        let decaying = (layout.decaying - own.start).clamp(0, own.end - own.start);
        let master = copied.unwrap_or_else(|| weights.own());
        let states = States::new(master, decaying, *optim);
        let total = sharding.of_gradients().then(|| part(&grad, own).zeros_like());
        let mut bucket = Bucket {
            units,
            grad,
            weights,
            states,
            masters_are_weights,
            total,
            reduction: None,
            open: true,
            cleared: false,
        };
        if bucket.total.is_some() {
            bucket.close();
        }
        self.buckets.push(bucket);
    }

    /// The parameters of a bucket, in the order of its layout.
    fn of_bucket<'a>(&'a self, bucket: &'a Bucket) -> impl Iterator<Item = &'a Parameter> {
        let units = self.units[bucket.units.clone()].iter().flatten();
        units.filter(|parameter| parameter.leaf.kind() == bucket.weights.kind())
    }

    /// Every parameter, forward order.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.units.iter().flatten()
    }

    /// The parameter of a unit that is this tensor of the model, in full fine-tuning or beside adapters; `None` if it is frozen.
    #[must_use]
    pub fn find(&self, unit: usize, name: &str) -> Option<&Parameter> {
        let is_it = |parameter: &&Parameter| {
            parameter.name.strip_prefix(ADAPTER_PREFIX).unwrap_or(&parameter.name) == name
        };
        self.units[unit].iter().find(is_it)
    }

    /// Number of trainable values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.iter().map(|parameter| parameter.leaf.numel() as u64).sum()
    }

    /// Adds the buffers of the weights to the units of the model that computes with them.
    pub fn reside(&self, residence: &mut Residence) {
        for bucket in &self.buckets {
            bucket.units.clone().for_each(|unit| residence.add(unit, &bucket.weights));
        }
    }

    /// The ranks that share these parameters.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.keeping.link
    }

    /// Bytes that this rank keeps between steps.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let mut sum = Bytes::default();
        for bucket in &self.buckets {
            sum.weights += bucket.weights.resident_bytes();
            sum.gradients += bytes(bucket.total.as_ref().unwrap_or(&bucket.grad));
            let state_tensors = bucket.states.state_tensors().into_iter();
            let apart = state_tensors
                .filter(|state_tensor| state_tensor.suffix != MASTER || !bucket.masters_are_weights);
            sum.optimizer += apart.map(|state_tensor| bytes(state_tensor.values)).sum::<u64>();
        }
        sum
    }

    /// What is sharded over the ranks.
    #[must_use]
    pub fn sharding(&self) -> Sharding {
        self.keeping.sharding
    }
}

/// As in transformers, biases and norms get no weight decay. DoRA's magnitudes get it.
fn decays(name: &str, tensor: &Tensor) -> bool {
    tensor.dim() > 1 || name.ends_with(MAGNITUDE)
}

/// Whether passes in a narrower precision use this tensor in float32.
fn stays_wide(name: &str) -> bool {
    name.ends_with(MAGNITUDE)
}

/// The part `own` of the buffer that these float32 tensors would fill.
fn copied_part(tensors: &[&Tensor], layout: &Layout, own: &Range<i64>, device: Device) -> Tensor {
    let buffer = Tensor::zeros([own.end - own.start], (Kind::Float, device));
    for (tensor, slot) in tensors.iter().zip(&layout.slots) {
        if let Some((from, to)) = slot.overlap(own) {
            tch::no_grad(|| part(&buffer, to).copy_(&part(&tensor.flatten(0, -1), from)));
        }
    }
    buffer
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn keeping(compute: Kind) -> Keeping {
        Keeping {
            compute,
            sharding: Sharding::NONE,
            travels_as: Kind::Float,
            link: Link::default(),
            optim: Optim::Adamw,
            bucket_bytes: 1 << 20,
            offload_optimizer: false,
        }
    }

    #[test]
    fn float32_leaves_share_the_masters_memory() {
        let mut a = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let mut b = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        let units = vec![vec![("a".into(), &mut a)], vec![("b".into(), &mut b)]];
        let parameters = Parameters::adopt(units, keeping(Kind::Float));
        let _ = tch::no_grad(|| parameters.buckets[0].states.master.shallow_clone().fill_(7.0));
        assert_eq!(a.double_value(&[1, 1]), 7.0);
        assert!(a.requires_grad() && a.is_leaf());
        assert_eq!(parameters.count(), 7);
    }

    #[test]
    fn magnitudes_stay_float32_in_bfloat16_passes_and_decay() {
        let mut a = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let mut m = Tensor::from_slice(&[1.001f32, 2.0]);
        let units = vec![vec![("x.lora_A.weight".into(), &mut a), (format!("x{MAGNITUDE}"), &mut m)]];
        let mut parameters = Parameters::adopt(units, keeping(Kind::BFloat16));
        assert_eq!((a.kind(), m.kind()), (Kind::BFloat16, Kind::Float));
        assert!((m.double_value(&[0]) - 1.001).abs() < 1e-6);
        let kept = parameters.collect(false).unwrap();
        let names: Vec<&str> = kept.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(kept.len(), 2, "{names:?}");
        for one in &kept {
            assert_eq!(one.tensor.size(), if one.name.ends_with(MAGNITUDE) { m.size() } else { a.size() });
        }
        assert!(parameters.buckets.iter().all(|bucket| bucket.weights.layout().decaying > 0));
        parameters.restore(&|_, _, shape| Ok(Tensor::full(shape, 3.0, (Kind::Float, Device::Cpu)))).unwrap();
        assert_eq!((a.double_value(&[1, 1]), m.double_value(&[1])), (3.0, 3.0));
    }

    #[test]
    fn bfloat16_leaves_follow_on_publish() {
        let mut a = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let mut parameters = Parameters::adopt(vec![vec![("a".into(), &mut a)]], keeping(Kind::BFloat16));
        let _ = tch::no_grad(|| parameters.buckets[0].states.master.shallow_clone().fill_(3.0));
        assert_eq!(a.double_value(&[0]), 1.0);
        parameters.publish().unwrap();
        assert_eq!((a.double_value(&[0]), a.kind()), (3.0, Kind::BFloat16));
    }
}
