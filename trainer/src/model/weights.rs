//! Tensors of a Hugging Face model folder, by name, from one or many safetensors files, mapped rather than read.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

/// All tensors of a folder; data stay on disk until asked for.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    files: Vec<(PathBuf, Mmap)>,
    /// Tensor name -> index into `files`.
    index: HashMap<String, usize>,
}

impl Weights {
    /// Maps `model.safetensors` or the shards that `model.safetensors.index.json` names.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let paths = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            shards(dir, &index)?
        } else {
            return Err(Fault::input(format!("no weights in {}", dir.display())).hint(
                "expected model.safetensors, or model.safetensors.index.json with its shards; \
                 convert other formats with transformers' save_pretrained(safe_serialization=True)",
            ));
        };
        Self::open_files(dir, paths)
    }

    /// Maps the given safetensors files; `dir` names them in errors.
    pub fn open_files(dir: &Path, paths: Vec<PathBuf>) -> Result<Self, Fault> {
        let mut weights = Self { dir: dir.to_owned(), files: Vec::new(), index: HashMap::new() };
        for path in paths {
            let map = map_file(&path)?;
            let names = SafeTensors::read_metadata(&map)
                .map_err(|error| damaged(&path, &error))?
                .1
                .tensors()
                .into_keys()
                .collect::<Vec<_>>();
            weights.index.extend(names.into_iter().map(|name| (name, weights.files.len())));
            weights.files.push((path, map));
        }
        Ok(weights)
    }

    /// Whether a tensor of this name is there.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Copies a tensor to the CPU in its stored precision after checking its shape.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, Fault> {
        let Some(&file) = self.index.get(name) else {
            return Err(Fault::input(format!("missing tensor {name} in {}", self.dir.display()))
                .hint("the checkpoint is incomplete, or config.json is of another model"));
        };
        let (path, map) = &self.files[file];
        let tensors = SafeTensors::deserialize(map).map_err(|error| damaged(path, &error))?;
        let view = tensors.tensor(name).map_err(|error| damaged(path, &error))?;
        let found: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        if found != shape {
            return Err(Fault::input(format!(
                "tensor {name} in {} has shape {found:?}, expected {shape:?}",
                path.display()
            ))
            .hint("config.json does not belong to these weights"));
        }
        let kind = kind(view.dtype()).ok_or_else(|| {
            Fault::input(format!("tensor {name} in {}: unsupported dtype {:?}", path.display(), view.dtype()))
        })?;
        Ok(Tensor::from_data_size(view.data(), &found, kind))
    }

    /// A tensor in the precision and on the device it will live in.
    pub fn load(&self, name: &str, shape: &[i64], place: Place) -> Result<Tensor, Fault> {
        Ok(self.tensor(name, shape)?.to_device(place.device).to_kind(place.kind))
    }
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
