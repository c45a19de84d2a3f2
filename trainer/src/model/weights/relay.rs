//! One rank reads a model's files and the others get the bytes from it.
//!
//! - TRN-R1: all ranks open the same folders and ask for the same tensors in the same order.
//! - TRN-R2: bytes travel as they are stored, so that every rank converts what rank 0 read.
//!
//! Tensors travel in buckets in the order in which models are loaded. While a rank converts one bucket, rank 0 sends the next one and
//! reads ahead.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use dyad_proto::Fault;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::files::MappedFiles;
use crate::error::EngineError;
use dyad_torch::comm::{CommError, Communicator, Pending};
use dyad_torch::transfer::values;

/// Rank that reads the files.
pub(super) const READER: usize = 0;
/// A bucket is closed once it has at least this many bytes.
const BUCKET_BYTES: usize = 64 << 20;
/// Alignment of tensors in a bucket, so that their bytes can be viewed as any kind.
const ALIGNMENT: usize = 64;
const KINDS: [(&str, Kind); 5] = [
    ("F32", Kind::Float),
    ("F64", Kind::Double),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("U8", Kind::Uint8),
];

/// The ranks that load together.
#[derive(Clone, Debug)]
pub struct Relay {
    /// Connects all ranks.
    pub communicator: Arc<dyn Communicator>,
    /// Device of the tensors of collectives.
    pub device: Device,
}

/// A tensor of the folder, as the reader announces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AnnouncedTensor {
    name: String,
    kind: String,
    shape: Vec<i64>,
}

/// Where a tensor's bytes are in the buckets.
#[derive(Clone, Debug, PartialEq)]
struct BufferSlot {
    bucket: usize,
    offset: usize,
    bytes: usize,
    kind: Kind,
    shape: Vec<i64>,
}

/// The tensors of one folder, as they arrive.
pub(super) struct Relayed {
    relay: Relay,
    /// `None` except at the reader.
    files: Option<MappedFiles>,
    slots: HashMap<String, BufferSlot>,
    buckets: Vec<RelayBucket>,
    state: RefCell<RelayState>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct RelayBucket {
    bytes: usize,
    names: Vec<String>,
}

#[derive(Default)]
struct RelayState {
    /// Number of buckets whose broadcast has started.
    started: usize,
    /// The last of them, unless it has arrived.
    coming: Option<(Tensor, Box<dyn Pending>)>,
    /// Bytes of the buckets that have arrived, and how many tensors of each have not been taken.
    here: HashMap<usize, (Tensor, usize)>,
}

impl fmt::Debug for Relayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relayed").field("buckets", &self.buckets.len()).finish_non_exhaustive()
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        // Every rank has started this broadcast, so every rank must finish it.
        if let Some((_, coming)) = self.state.get_mut().coming.take() {
            let _ = coming.wait();
        }
    }
}

impl Relayed {
    /// `files` must be `Some` at the reader and `None` elsewhere.
    pub(super) fn new(relay: Relay, files: Option<MappedFiles>) -> Result<Self, Fault> {
        let own = files.as_ref().map(|files| serde_json::to_vec(&entries(files))).transpose();
        let own = own.map_err(|error| Fault::failed(format!("cannot describe the weights: {error}")))?;
        let announced = announce(&relay, own.unwrap_or_default()).map_err(EngineError::from)?;
        let entries: Vec<AnnouncedTensor> = serde_json::from_slice(&announced)
            .map_err(|error| Fault::failed(format!("rank {READER} announced no weights: {error}")))?;
        let (slots, buckets) = plan(entries, BUCKET_BYTES);
        Ok(Self { relay, files, slots, buckets, state: RefCell::default() })
    }

    /// The shape of a tensor; `None` if there is no tensor of this name.
    pub(super) fn shape(&self, name: &str) -> Option<&[i64]> {
        self.slots.get(name).map(|slot| slot.shape.as_slice())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.keys().map(String::as_str)
    }

    /// A tensor in its stored precision, on the device of the collectives. Each tensor can be taken once.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor, Fault> {
        let slot = self.slots.get(name).ok_or_else(|| Fault::failed(format!("no tensor {name} to relay")))?;
        let mut state = self.state.borrow_mut();
        while !state.here.contains_key(&slot.bucket) {
            let arrived = state.started - usize::from(state.coming.is_some());
            if slot.bucket < arrived {
                return Err(Fault::failed(format!("tensor {name} was taken before")));
            }
            self.advance(&mut state)?;
        }
        let Some((bytes, left)) = state.here.get_mut(&slot.bucket) else {
            return Err(Fault::failed(format!("tensor {name} did not arrive")));
        };
        let stored = bytes.narrow(0, slot.offset as i64, slot.bytes as i64);
        let tensor = stored.view_dtype(slot.kind).view(slot.shape.as_slice()).copy();
        *left -= 1;
        if *left == 0 {
            state.here.remove(&slot.bucket);
        }
        Ok(tensor)
    }

    /// Waits for the bucket that is under way and starts the next one, which the reader reads meanwhile.
    fn advance(&self, state: &mut RelayState) -> Result<(), Fault> {
        if state.coming.is_none() {
            self.start(self.bytes(state.started)?, state)?;
        }
        let next = if state.started < self.buckets.len() { Some(self.bytes(state.started)?) } else { None };
        if let Some((bytes, coming)) = state.coming.take() {
            let index = state.started - 1;
            coming.wait().map_err(EngineError::from)?;
            state.here.insert(index, (bytes, self.buckets[index].names.len()));
        }
        next.map_or(Ok(()), |bytes| self.start(bytes, state))
    }

    fn start(&self, bytes: Tensor, state: &mut RelayState) -> Result<(), Fault> {
        let coming = self.relay.communicator.broadcast(&bytes, READER).map_err(EngineError::from)?;
        state.coming = Some((bytes, coming));
        state.started += 1;
        Ok(())
    }

    /// A bucket's bytes at the reader; elsewhere a buffer for them.
    fn bytes(&self, index: usize) -> Result<Tensor, Fault> {
        let bucket = &self.buckets[index];
        match &self.files {
            Some(files) => Ok(self.read(files, bucket)?.to_device(self.relay.device)),
            None => Ok(Tensor::zeros([bucket.bytes as i64], (Kind::Uint8, self.relay.device))),
        }
    }

    fn read(&self, files: &MappedFiles, bucket: &RelayBucket) -> Result<Tensor, Fault> {
        let mut bytes = vec![0; bucket.bytes];
        for name in &bucket.names {
            let slot = &self.slots[name];
            let (stored, ..) = files.view(name)?;
            bytes[slot.offset..slot.offset + slot.bytes].copy_from_slice(stored);
        }
        Ok(Tensor::from_slice(&bytes))
    }
}

fn entries(files: &MappedFiles) -> Vec<AnnouncedTensor> {
    let mut entries: Vec<AnnouncedTensor> = files
        .names()
        .filter_map(|name| {
            let (_, shape, kind) = files.view(name).ok()?;
            let (kind, _) = KINDS.iter().find(|(_, known)| *known == kind)?;
            Some(AnnouncedTensor { name: name.to_owned(), kind: (*kind).to_owned(), shape })
        })
        .collect();
    entries.sort_by(|a, b| order(&a.name).cmp(&order(&b.name)));
    entries
}

/// Sort key for the order in which models are loaded: embedding, layers by number, the rest.
fn order(name: &str) -> (u8, u64, &str) {
    let after = name.split_once("layers.").and_then(|(_, rest)| rest.split('.').next());
    match after.and_then(|number| number.parse().ok()) {
        Some(layer) => (1, layer, name),
        None if name.contains("embed_tokens") => (0, 0, name),
        None => (2, 0, name),
    }
}

fn plan(
    entries: Vec<AnnouncedTensor>,
    bucket_bytes: usize,
) -> (HashMap<String, BufferSlot>, Vec<RelayBucket>) {
    let mut slots = HashMap::new();
    let mut buckets: Vec<RelayBucket> = Vec::new();
    for AnnouncedTensor { name, kind, shape } in entries {
        let Some((_, kind)) = KINDS.iter().find(|(known, _)| *known == kind) else { continue };
        if buckets.last().is_none_or(|bucket| bucket.bytes >= bucket_bytes) {
            buckets.push(RelayBucket::default());
        }
        let index = buckets.len() - 1;
        let bytes = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        let bucket = &mut buckets[index];
        let slot = BufferSlot { bucket: index, offset: bucket.bytes, bytes, kind: *kind, shape };
        bucket.bytes = (slot.offset + bytes).next_multiple_of(ALIGNMENT);
        bucket.names.push(name.clone());
        slots.insert(name, slot);
    }
    (slots, buckets)
}

/// Broadcasts the reader's bytes to all ranks.
fn announce(relay: &Relay, own: Vec<u8>) -> Result<Vec<u8>, CommError> {
    let length = Tensor::from_slice(&[own.len() as i64]).to_device(relay.device);
    relay.communicator.broadcast(&length, READER)?.wait()?;
    let length = length.int64_value(&[0]);
    let bytes = match relay.communicator.rank() == READER {
        true => Tensor::from_slice(&own).to_device(relay.device),
        false => Tensor::zeros([length], (Kind::Uint8, relay.device)),
    };
    relay.communicator.broadcast(&bytes, READER)?.wait()?;
    Ok(values(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, kind: &str, shape: &[i64]) -> AnnouncedTensor {
        AnnouncedTensor { name: name.into(), kind: kind.into(), shape: shape.to_vec() }
    }

    #[test]
    fn tensors_travel_in_the_order_of_loading() {
        let mut names = [
            "lm_head.weight",
            "model.layers.10.a",
            "model.layers.2.b",
            "model.embed_tokens.weight",
            "model.layers.2.a",
        ];
        names.sort_by(|a, b| order(a).cmp(&order(b)));
        assert_eq!(
            names,
            [
                "model.embed_tokens.weight",
                "model.layers.2.a",
                "model.layers.2.b",
                "model.layers.10.a",
                "lm_head.weight"
            ]
        );
    }

    #[test]
    fn buckets_align_every_tensor_for_its_kind() {
        let entries = vec![
            entry("a", "BF16", &[3]),
            entry("b", "F32", &[40]),
            entry("c", "F64", &[1, 2]),
            entry("unknown", "I64", &[1]),
        ];
        let (slots, buckets) = plan(entries, 200);
        let at = |name: &str| (slots[name].bucket, slots[name].offset, slots[name].bytes);
        assert_eq!((at("a"), at("b"), at("c")), ((0, 0, 6), (0, 64, 160), (1, 0, 16)));
        let shapes: Vec<_> = buckets.iter().map(|bucket| (bucket.bytes, bucket.names.len())).collect();
        assert_eq!(shapes, [(256, 2), (64, 1)]);
        assert!(!slots.contains_key("unknown"));
    }
}
