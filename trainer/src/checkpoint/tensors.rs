//! Tensors to safetensors files, one at a time, in shards.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use dyad_proto::Fault;
use safetensors::{Dtype, View, serialize_to_file};
use tch::{Device, Kind, Tensor};

use super::cannot_write;

/// Largest file of a sharded model, the size transformers cuts at.
const SHARD_BYTES: usize = 5_000_000_000;

/// A tensor and the precision it is stored in; brought to the host only while it is being written.
#[derive(Debug)]
pub(super) struct Stored {
    tensor: Tensor,
    shape: Vec<usize>,
    kind: Kind,
}

impl Stored {
    pub(super) fn new(tensor: &Tensor, kind: Kind) -> Self {
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        Self { tensor: tensor.detach(), shape, kind }
    }

    fn bytes(&self) -> usize {
        self.tensor.numel() * self.kind.elt_size_in_bytes()
    }
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        match self.kind {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Double => Dtype::F64,
            Kind::Uint8 => Dtype::U8,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let host = self.tensor.to_device(Device::Cpu).to_kind(self.kind).contiguous();
        let mut bytes = vec![0; self.bytes()];
        host.copy_data_u8(&mut bytes, self.tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes()
    }
}

pub(super) type NamedStored = Vec<(String, Stored)>;

/// One file with PyTorch's format mark, which transformers asks for.
pub(super) fn write_file(path: &Path, tensors: &[(String, Stored)]) -> Result<(), Fault> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|(name, stored)| (name.as_str(), stored));
    serialize_to_file(views, Some(metadata), path).map_err(|error| cannot_write(path, &error))
}

/// `model.safetensors`, or shards with their index where the model is larger than one file should be.
pub(super) fn write_model(dir: &Path, tensors: &[(String, Stored)]) -> Result<(), Fault> {
    let shards = shards(tensors, SHARD_BYTES);
    if let [only] = shards.as_slice() {
        return write_file(&dir.join("model.safetensors"), only);
    }
    let mut weight_map = serde_json::Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_file(&dir.join(&file), shard)?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let total: usize = tensors.iter().map(|(_, stored)| stored.bytes()).sum();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let path = dir.join("model.safetensors.index.json");
    std::fs::write(&path, format!("{index:#}\n")).map_err(|error| cannot_write(&path, &error))
}

/// Consecutive tensors of at most `limit` bytes together; a larger one stands alone.
fn shards(tensors: &[(String, Stored)], limit: usize) -> Vec<&[(String, Stored)]> {
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
        let tensor = |len: i64| Stored::new(&Tensor::ones([len], (Kind::Float, Device::Cpu)), Kind::Float);
        let tensors: NamedStored = [3, 1, 1, 9].iter().map(|&len| (len.to_string(), tensor(len))).collect();
        let sizes: Vec<usize> = shards(&tensors, 16).iter().map(|shard| shard.len()).collect();
        assert_eq!(sizes, [2, 1, 1]);
        assert_eq!(shards(&tensors, 1000).len(), 1);
    }

    #[test]
    fn bfloat16_is_written_as_its_own_bytes() {
        let stored = Stored::new(&Tensor::from_slice(&[1.0f32, -2.0]), Kind::BFloat16);
        assert_eq!(&*(&stored).data(), [0x80, 0x3f, 0x00, 0xc0]);
    }
}
