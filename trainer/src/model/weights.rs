//! Tensors of a Hugging Face model folder, by name, from one or many safetensors files, mapped rather than read.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use dyad_proto::Fault;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::relay::{self, Relay, Relayed};

/// How the ranks of a run come by the files of a model.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// One rank reads and the others get the bytes from it; otherwise every rank reads.
    pub relay: Option<Relay>,
    /// Adds up what has been loaded, so that ranks can compare.
    pub digest: Option<Rc<Cell<i64>>>,
}

/// All tensors of a folder; data stay on disk, or at the rank that reads, until asked for.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    source: Source,
    digest: Option<Rc<Cell<i64>>>,
}

#[derive(Debug)]
enum Source {
    Files(Files),
    Relayed(Relayed),
}

/// Mapped safetensors files.
#[derive(Debug)]
pub(super) struct Files {
    files: Vec<(PathBuf, Mmap)>,
    /// Tensor name -> index into `files`.
    index: HashMap<String, usize>,
}

impl Weights {
    /// Maps `model.safetensors` or the shards that `model.safetensors.index.json` names.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        Self::open_by(dir, &Reading::default())
    }

    /// The same; where one rank reads, only there.
    pub fn open_by(dir: &Path, reading: &Reading) -> Result<Self, Fault> {
        Self::open_paths(dir, || model_files(dir), reading)
    }

    /// Maps the given safetensors files; `dir` names them in errors.
    pub fn open_files(dir: &Path, paths: Vec<PathBuf>) -> Result<Self, Fault> {
        Self::open_files_by(dir, paths, &Reading::default())
    }

    /// The same; where one rank reads, only there.
    pub fn open_files_by(dir: &Path, paths: Vec<PathBuf>, reading: &Reading) -> Result<Self, Fault> {
        Self::open_paths(dir, || Ok(paths), reading)
    }

    fn open_paths(
        dir: &Path,
        paths: impl FnOnce() -> Result<Vec<PathBuf>, Fault>,
        reading: &Reading,
    ) -> Result<Self, Fault> {
        let reads = reading.relay.as_ref().is_none_or(|relay| relay.communicator.rank() == relay::READER);
        let files = reads.then(|| Files::open(paths()?)).transpose()?;
        let source = match (&reading.relay, files) {
            (None, Some(files)) => Source::Files(files),
            (None, None) => return Err(Fault::failed("nobody reads the weights")),
            (Some(relay), files) => Source::Relayed(Relayed::new(relay.clone(), files)?),
        };
        Ok(Self { dir: dir.to_owned(), source, digest: reading.digest.clone() })
    }

    /// Whether a tensor of this name is there.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Files(files) => files.index.contains_key(name),
            Source::Relayed(relayed) => relayed.shape(name).is_some(),
        }
    }

    /// Copies a tensor in its stored precision, after checking its shape: to the CPU, or where it was sent.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, Fault> {
        if !self.contains(name) {
            return Err(Fault::input(format!("missing tensor {name} in {}", self.dir.display()))
                .hint("the checkpoint is incomplete, or config.json is of another model"));
        }
        let tensor = match &self.source {
            Source::Files(files) => {
                let (bytes, found, kind) = files.view(name)?;
                check_shape(name, files.path(name), &found, shape)?;
                Tensor::from_data_size(bytes, &found, kind)
            }
            Source::Relayed(relayed) => {
                check_shape(name, &self.dir, relayed.shape(name).unwrap_or_default(), shape)?;
                relayed.tensor(name)?
            }
        };
        if let Some(digest) = &self.digest {
            digest.set(digest.get().wrapping_mul(MIX).wrapping_add(word_sum(&tensor)));
        }
        Ok(tensor)
    }

    /// A tensor in the precision and on the device it will live in.
    pub fn load(&self, name: &str, shape: &[i64], place: Place) -> Result<Tensor, Fault> {
        let stored = match (&self.source, &self.digest) {
            // Straight from the file's pages: no copy on the host that is only copied again.
            (Source::Files(files), None) if place.device.is_cuda() && self.contains(name) => {
                files.sent(name, shape, place.device)?
            }
            _ => self.tensor(name, shape)?.to_device(place.device),
        };
        Ok(stored.to_kind(place.kind))
    }
}

impl Files {
    fn open(paths: Vec<PathBuf>) -> Result<Self, Fault> {
        let mut opened = Self { files: Vec::new(), index: HashMap::new() };
        for path in paths {
            let map = map_file(&path)?;
            let names = SafeTensors::read_metadata(&map)
                .map_err(|error| damaged(&path, &error))?
                .1
                .tensors()
                .into_keys()
                .collect::<Vec<_>>();
            opened.index.extend(names.into_iter().map(|name| (name, opened.files.len())));
            opened.files.push((path, map));
        }
        Ok(opened)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    fn path(&self, name: &str) -> &Path {
        self.index.get(name).map_or(Path::new(""), |&file| &self.files[file].0)
    }

    /// A tensor on another device, in its stored precision.
    #[expect(unsafe_code, reason = "a tensor over mapped memory")]
    fn sent(&self, name: &str, shape: &[i64], device: Device) -> Result<Tensor, Fault> {
        let (bytes, found, kind) = self.view(name)?;
        check_shape(name, self.path(name), &found, shape)?;
        let mut strides = vec![1; found.len()];
        for axis in (1..found.len()).rev() {
            strides[axis - 1] = strides[axis] * found[axis];
        }
        // SAFETY: the map outlives the tensor, which is only read, and is read before the copy returns; safetensors has checked
        // that there are as many bytes as the shape wants.
        let mapped = unsafe { Tensor::from_blob(bytes.as_ptr(), &found, &strides, kind, Device::Cpu) };
        Ok(mapped.to_device(device))
    }

    /// Bytes, shape and precision of a tensor that is there.
    pub(super) fn view(&self, name: &str) -> Result<(&[u8], Vec<i64>, Kind), Fault> {
        let missing = || Fault::input(format!("missing tensor {name}"));
        let (path, map) = &self.files[*self.index.get(name).ok_or_else(missing)?];
        let tensors = SafeTensors::deserialize(map).map_err(|error| damaged(path, &error))?;
        let view = tensors.tensor(name).map_err(|error| damaged(path, &error))?;
        let kind = kind(view.dtype()).ok_or_else(|| {
            Fault::input(format!("tensor {name} in {}: unsupported dtype {:?}", path.display(), view.dtype()))
        })?;
        Ok((view.data(), view.shape().iter().map(|&size| size as i64).collect(), kind))
    }
}

/// Makes the order of tensors count in a digest.
const MIX: i64 = 0x5851_F42D_4C95_7F2D;

/// Sum of a tensor's bytes, eight at a time where that comes out even.
fn word_sum(tensor: &Tensor) -> i64 {
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    let word = if bytes.is_multiple_of(8) { Kind::Int64 } else { Kind::Uint8 };
    tensor.flatten(0, -1).view_dtype(word).sum(Kind::Int64).int64_value(&[])
}

fn check_shape(name: &str, path: &Path, found: &[i64], expected: &[i64]) -> Result<(), Fault> {
    if found == expected {
        return Ok(());
    }
    let path = path.display();
    Err(Fault::input(format!("tensor {name} in {path} has shape {found:?}, expected {expected:?}"))
        .hint("config.json does not belong to these weights"))
}

fn model_files(dir: &Path) -> Result<Vec<PathBuf>, Fault> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.is_file() {
        return Ok(vec![single]);
    }
    if index.is_file() {
        return shards(dir, &index);
    }
    Err(Fault::input(format!("no weights in {}", dir.display())).hint(
        "expected model.safetensors, or model.safetensors.index.json with its shards; \
         convert other formats with transformers' save_pretrained(safe_serialization=True)",
    ))
}

/// Where and in which precision a tensor lives.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Device.
    pub device: Device,
    /// Precision.
    pub kind: Kind,
}

fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>, Fault> {
    let bad = |what: String| Fault::input(format!("{}: {what}", index.display()));
    let text = std::fs::read_to_string(index).map_err(|error| bad(error.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map = json
        .get("weight_map")
        .and_then(|map| map.as_object())
        .ok_or_else(|| bad("no `weight_map`".into()))?;
    let mut names: Vec<&str> = map.values().filter_map(|value| value.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

#[expect(unsafe_code, reason = "memory mapping")]
fn map_file(path: &Path) -> Result<Mmap, Fault> {
    let cannot = |error: std::io::Error| {
        Fault::input(format!("cannot read {}: {error}", path.display()))
            .hint("the model folder is incomplete")
    };
    let file = File::open(path).map_err(cannot)?;
    // SAFETY: the map is read-only; a model folder that changes under a running process is the user's to avoid.
    unsafe { Mmap::map(&file) }.map_err(cannot)
}

fn damaged(path: &Path, error: &safetensors::SafeTensorError) -> Fault {
    Fault::input(format!("{} is not a valid safetensors file: {error}", path.display()))
        .hint("the download or copy was cut short; fetch the file again")
}

fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F64 => Some(Kind::Double),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::U8 => Some(Kind::Uint8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn folder_with(name: &str, shape: &[usize], values: &[f32]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
        safetensors::serialize_to_file([(name, view)], None, &dir.path().join("model.safetensors")).unwrap();
        dir
    }

    #[test]
    fn reads_by_name_and_checks_the_shape() {
        let dir = folder_with("a", &[2, 1], &[1.0, 2.0]);
        let weights = Weights::open(dir.path()).unwrap();
        let values: Vec<f32> = weights.tensor("a", &[2, 1]).unwrap().flatten(0, -1).try_into().unwrap();
        assert_eq!(values, [1.0, 2.0]);
        let message = weights.tensor("a", &[1, 2]).unwrap_err().message;
        assert!(
            message.contains("tensor a in") && message.ends_with("has shape [2, 1], expected [1, 2]"),
            "{message}"
        );
        assert!(weights.tensor("b", &[1]).unwrap_err().message.starts_with("missing tensor b in"));
    }

    #[test]
    fn a_truncated_file_is_named() {
        let dir = folder_with("a", &[2, 1], &[1.0, 2.0]);
        let path = dir.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..20]).unwrap();
        assert!(Weights::open(dir.path()).unwrap_err().message.contains("model.safetensors is not a valid"));
    }
}
