//! Writes tensors to safetensors files, one at a time, in shards.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::path::Path;

use dyad_proto::Fault;
use dyad_proto::manifest::Sum;
use safetensors::{Dtype, SafeTensorError, View, serialize_to_file};
use tch::{Device, Kind, Tensor};

use super::cannot_write;
use super::files::Sums;
use crate::model::weights::is_finite;
use crate::observe::progress;

/// Largest file of a sharded model; transformers uses the same limit.
const SHARD_BYTES: usize = 5_000_000_000;

/// A tensor and its storage precision. It is copied to the host only while it is being written.
#[derive(Debug)]
pub(super) struct StoredTensor {
    tensor: Tensor,
    shape: Vec<usize>,
    kind: Kind,
}

impl StoredTensor {
    pub(super) fn new(tensor: &Tensor, kind: Kind) -> Self {
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        Self { tensor: tensor.detach(), shape, kind }
    }

    fn bytes(&self) -> usize {
        self.tensor.numel() * self.kind.elt_size_in_bytes()
    }

    fn dtype(&self) -> Dtype {
        match self.kind {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Double => Dtype::F64,
            Kind::Uint8 => Dtype::U8,
            _ => Dtype::F32,
        }
    }

    /// The bytes, and whether all numbers are finite in the stored precision.
    fn data(&self) -> (Vec<u8>, bool) {
        progress::advance();
        let host = self.tensor.to_device(Device::Cpu).to_kind(self.kind).contiguous();
        let mut bytes = vec![0; self.bytes()];
        host.copy_data_u8(&mut bytes, self.tensor.numel());
        (bytes, is_finite(&host))
    }
}

pub(super) type NamedStored = Vec<(String, StoredTensor)>;

/// Checksums of written files, and their tensors that are not finite.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) sums: Sums,
    /// Tensors with NaN or infinite numbers in them.
    pub(super) not_finite: BTreeSet<String>,
}

impl Written {
    pub(super) fn and(mut self, other: Self) -> Self {
        self.sums.extend(other.sums);
        self.not_finite.extend(other.not_finite);
        self
    }
}

/// Writes one file with PyTorch's format mark, which transformers requires. Computes the checksum from the bytes in memory.
pub(super) fn write_file(path: &Path, tensors: &[(String, StoredTensor)]) -> Result<Written, Fault> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let (sum, not_finite) = (Cell::new(Sum::EMPTY), RefCell::default());
    let view = |(name, stored)| Viewed { name, stored, sum: &sum, not_finite: &not_finite };
    let views = tensors.iter().map(|(name, stored)| (name.as_str(), view((name, stored))));
    serialize_to_file(views, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(error) => cannot_write(path, &error),
        error => cannot_write(path, &io::Error::other(error)),
    })?;
    let header = header_sum(path).map_err(|error| cannot_write(path, &error))?;
    let sums = Sums::from([(path.to_owned(), header.then(sum.get()))]);
    Ok(Written { sums, not_finite: not_finite.into_inner() })
}

/// Checksum of the part before the tensors: the header's length and the header.
fn header_sum(path: &Path) -> io::Result<Sum> {
    let mut file = dyad_proto::files::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
    Ok(Sum::EMPTY.and(&length).and(&header))
}

/// Adds a tensor to the checksum and checks it for NaN when it is written. The writer asks for each tensor once, in the order of the
/// file.
struct Viewed<'a> {
    name: &'a str,
    stored: &'a StoredTensor,
    sum: &'a Cell<Sum>,
    not_finite: &'a RefCell<BTreeSet<String>>,
}

impl View for Viewed<'_> {
    fn dtype(&self) -> Dtype {
        self.stored.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.stored.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let (bytes, finite) = self.stored.data();
        if !finite {
            self.not_finite.borrow_mut().insert(self.name.to_owned());
        }
        self.sum.set(self.sum.get().and(&bytes));
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.stored.bytes()
    }
}

/// Writes `model.safetensors`, or shards with an index if the model is larger than one file should be.
pub(super) fn write_model(dir: &Path, tensors: &[(String, StoredTensor)]) -> Result<Written, Fault> {
    let shards = shards(tensors, SHARD_BYTES);
    if let [only] = shards.as_slice() {
        return write_file(&dir.join("model.safetensors"), only);
    }
    let mut weight_map = serde_json::Map::new();
    let mut written = Written::default();
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        written = written.and(write_file(&dir.join(&file), shard)?);
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let total: usize = tensors.iter().map(|(_, stored)| stored.bytes()).sum();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let path = dir.join("model.safetensors.index.json");
    std::fs::write(&path, format!("{index:#}\n")).map_err(|error| cannot_write(&path, &error))?;
    Ok(written)
}

/// Splits tensors, in order, into shards of at most `limit` bytes; a larger tensor gets its own shard.
fn shards(tensors: &[(String, StoredTensor)], limit: usize) -> Vec<&[(String, StoredTensor)]> {
    let mut shards = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (index, (_, stored)) in tensors.iter().enumerate() {
        if index > start && filled + stored.bytes() > limit {
            shards.push(&tensors[start..index]);
            (start, filled) = (index, 0);
        }
        filled += stored.bytes();
    }
    shards.push(&tensors[start..]);
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_every_tensor_in_order() {
        let tensor =
            |len: i64| StoredTensor::new(&Tensor::ones([len], (Kind::Float, Device::Cpu)), Kind::Float);
        let tensors: NamedStored = [3, 1, 1, 9].iter().map(|&len| (len.to_string(), tensor(len))).collect();
        let sizes: Vec<usize> = shards(&tensors, 16).iter().map(|shard| shard.len()).collect();
        assert_eq!(sizes, [2, 1, 1]);
        assert_eq!(shards(&tensors, 1000).len(), 1);
    }

    #[test]
    fn bfloat16_is_written_as_its_own_bytes() {
        let stored = StoredTensor::new(&Tensor::from_slice(&[1.0f32, -2.0]), Kind::BFloat16);
        assert_eq!(stored.data(), (vec![0x80, 0x3f, 0x00, 0xc0], true));
    }

    #[test]
    fn tensors_that_overflow_in_the_stored_precision_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let tensor =
            |name: &str, kind| (name.to_owned(), StoredTensor::new(&Tensor::from_slice(&[7e4f32]), kind));
        let tensors = [tensor("wide", Kind::Float), tensor("narrow", Kind::Half)];
        let written = write_model(dir.path(), &tensors).unwrap();
        assert_eq!(written.not_finite, BTreeSet::from(["narrow".to_owned()]));
    }

    #[test]
    fn checksums_taken_while_writing_match_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = |name: &str, kind| {
            let tensor = Tensor::arange(7, (Kind::Float, Device::Cpu));
            (name.to_owned(), StoredTensor::new(&tensor, kind))
        };
        let tensors = [tensor("b", Kind::BFloat16), tensor("a", Kind::Float), tensor("c", Kind::Uint8)];
        let path = dir.path().join("some.safetensors");
        let written = write_file(&path, &tensors).unwrap();
        assert!(written.not_finite.is_empty());
        assert_eq!(written.sums, Sums::from([(path.clone(), Sum::of_file(&path).unwrap())]));
    }
}
