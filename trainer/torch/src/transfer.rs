//! Copies between host and device. Every such copy of a training step goes through here, so that profiles show it. Copies to the
//! device do not wait, because they come from pinned memory.
//!
//! - TRN-T1: inside a step only [`read`] makes the host wait for the device. After the passes have begun, a step calls it once, at its
//!   end. Before the passes it reads values that ranks agree on: the number of micro-batches (`zero_stage` 2 and 3), the number of pairs
//!   with an objective that couples them, and on several
//!   GPUs the rows of the embedding that the step looks up.

use tch::{Device, Tensor, kind::Element};

use crate::recorder::Span;
use crate::storage::pinned;

/// Name of the span in which the host waits for the device.
pub const READ: &str = "read";

/// Copies host values to a tensor on the device. The copy is queued and the host does not wait; libtorch keeps the pinned buffer
/// until the copy is done.
pub fn upload<T: Element>(values: &[T], device: Device) -> Tensor {
    let host = Tensor::from_slice(values);
    if !device.is_cuda() || values.is_empty() {
        return host.to_device(device);
    }
    let kind = host.kind();
    // If no pinned memory is available, copy from pageable memory: same result, but the host waits.
    pinned(&host).unwrap_or(host).to_device_(device, kind, true, false)
}

/// Values of a tensor in order. Waits for the device, inside a span named [`READ`].
#[must_use]
pub fn read<T: Element>(tensor: &Tensor) -> Vec<T> {
    let _span = Span::enter(READ);
    values(tensor)
}

/// Values of a tensor, in order. Waits for all work that they depend on.
#[must_use]
pub fn values<T: Element>(tensor: &Tensor) -> Vec<T> {
    let host = tensor.to_device(Device::Cpu).to_kind(T::KIND).contiguous();
    let mut values = vec![T::ZERO; host.numel()];
    host.copy_data(&mut values, host.numel());
    values
}

/// Lists of integers that are uploaded in one copy and split on the device.
#[derive(Debug, Default)]
pub struct Pack {
    values: Vec<i64>,
    lengths: Vec<i64>,
}

impl Pack {
    /// Adds a list. [`Pack::upload`] returns the lists in the order in which they were added.
    pub fn add(&mut self, list: impl IntoIterator<Item = i64>) {
        let before = self.values.len();
        self.values.extend(list);
        self.lengths.push((self.values.len() - before) as i64);
    }

    /// Adds a list of 32-bit integers, two in each 64-bit value; see [`narrow_view`].
    pub fn add_narrow(&mut self, list: &[i32]) {
        let word = |pair: &[i32]| {
            let high = pair.get(1).copied().unwrap_or(0);
            i64::from(pair[0] as u32) | (i64::from(high) << 32)
        };
        self.add(list.chunks(2).map(word));
    }

    /// Uploads all lists and returns one view for each, in order.
    #[must_use]
    pub fn upload(&self, device: Device) -> Vec<Tensor> {
        upload(&self.values, device).split_with_sizes(self.lengths.as_slice(), 0)
    }
}

/// The first `len` values of a list that [`Pack::add_narrow`] added, as int32.
pub fn narrow_view(words: &Tensor, len: usize) -> Tensor {
    words.view_dtype(tch::Kind::Int).narrow(0, 0, len as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_lists_unpack_unchanged() {
        let mut pack = Pack::default();
        pack.add([1, -2, 3]);
        pack.add([]);
        pack.add_narrow(&[7, 0, i32::MAX]);
        pack.add_narrow(&[5, 6]);
        let lists = pack.upload(Device::Cpu);
        let narrow = |tensor: &Tensor, len| values::<i32>(&narrow_view(tensor, len));
        assert_eq!((values(&lists[0]), values(&lists[1])), (vec![1_i64, -2, 3], Vec::<i64>::new()));
        assert_eq!((narrow(&lists[2], 3), narrow(&lists[3], 2)), (vec![7, 0, i32::MAX], vec![5, 6]));
    }
}
