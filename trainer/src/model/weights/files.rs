//! The safetensors files of a folder, mapped into memory: which files there are, which tensors they hold, and whether both match the
//! index.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use dyad_data::adapter::ADAPTER_WEIGHTS;
use dyad_data::files::is_there;
use dyad_proto::{Fault, lfs};
use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Weights of a model in one file.
const SINGLE: &str = "model.safetensors";
/// Lists the files of a sharded model.
const INDEX: &str = "model.safetensors.index.json";

/// Mapped safetensors files.
#[derive(Debug)]
pub(super) struct MappedFiles {
    files: Vec<(PathBuf, Mmap)>,
    /// By the names under which callers ask for tensors.
    index: HashMap<String, TensorLocation>,
}

/// Where a tensor is.
#[derive(Clone, Debug)]
pub(super) struct TensorLocation {
    file: usize,
    /// Its name in the file.
    pub(super) name: String,
    dtype: Dtype,
    shape: Vec<i64>,
    /// Its bytes in the file.
    bytes: Range<usize>,
}

impl MappedFiles {
    /// Maps the given files.
    pub(super) fn open(paths: Vec<PathBuf>) -> Result<Self, Fault> {
        let mut opened = Self { files: Vec::new(), index: HashMap::new() };
        for path in paths {
            let map = map_file(&path)?;
            let tensors = tensors_in(&path, &map, opened.files.len())?;
            opened.files.push((path, map));
            for stored in tensors {
                if let Some(other) = opened.index.get(&stored.name) {
                    opened.same(other, &stored)?;
                }
                opened.index.insert(stored.name.clone(), stored);
            }
        }
        Ok(opened)
    }

    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    pub(super) fn of_model(dir: &Path) -> Result<Self, Fault> {
        if is_there(&dir.join(SINGLE)) {
            return Self::open(vec![dir.join(SINGLE)]);
        }
        if !is_there(&dir.join(INDEX)) {
            return Err(no_weights(dir));
        }
        let map = weight_map(&dir.join(INDEX))?;
        let mut names: Vec<&String> = map.values().collect();
        names.sort_unstable();
        names.dedup();
        let files = Self::open(names.into_iter().map(|name| dir.join(name)).collect())?;
        files.hold(&dir.join(INDEX), &map)?;
        Ok(files)
    }

    /// Fails unless every tensor of the index is in the file that it names.
    fn hold(&self, index: &Path, map: &BTreeMap<String, String>) -> Result<(), Fault> {
        let absent = |(tensor, file): &(&String, &String)| {
            if self.index.get(*tensor).is_some_and(|stored| self.files[stored.file].0.ends_with(file)) {
                return false;
            }
            // The tensor may be in two files.
            let named = self.files.iter().find(|(path, _)| path.ends_with(file));
            let tensors = named.and_then(|(path, map)| tensors_in(path, map, 0).ok()).unwrap_or_default();
            !tensors.iter().any(|stored| stored.name == **tensor)
        };
        match map.iter().find(absent) {
            None => Ok(()),
            Some((tensor, file)) => Err(Fault::input(format!(
                "{}: tensor {tensor} should be in {file}, and is not",
                index.display()
            ))
            .hint("index and shards are of different models, or a shard is an older one; fetch all of them again")),
        }
    }

    /// Fails if a tensor that is in two files differs between them.
    fn same(&self, a: &TensorLocation, b: &TensorLocation) -> Result<(), Fault> {
        if self.equal(a, b) {
            return Ok(());
        }
        let path = |stored: &TensorLocation| self.files[stored.file].0.display().to_string();
        let places = format!("in {} and in {}", path(a), path(b));
        Err(Fault::input(format!("tensor {} is {places}, with different values", a.name))
            .hint("the folder holds the shards of two models; fetch one of them into an empty folder"))
    }

    /// Whether two tensors have the same shape and values.
    pub(super) fn equal(&self, a: &TensorLocation, b: &TensorLocation) -> bool {
        if a.shape != b.shape {
            return false;
        }
        if a.dtype == b.dtype {
            return self.bytes(a) == self.bytes(b);
        }
        let wide = |stored: &TensorLocation| {
            let tensor = Tensor::from_data_size(self.bytes(stored), &stored.shape, kind(stored.dtype)?);
            Some(tensor.to_kind(Kind::Double))
        };
        matches!((wide(a), wide(b)), (Some(a), Some(b)) if a == b)
    }

    fn bytes(&self, stored: &TensorLocation) -> &[u8] {
        &self.files[stored.file].1[stored.bytes.clone()]
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    pub(super) fn stored(&self, name: &str) -> Option<&TensorLocation> {
        self.index.get(name)
    }

    /// The same files, restricted to these tensors under these names.
    pub(super) fn renamed(self, index: HashMap<String, TensorLocation>) -> Self {
        Self { index, ..self }
    }

    pub(super) fn path(&self, name: &str) -> &Path {
        self.index.get(name).map_or(Path::new(""), |stored| &self.files[stored.file].0)
    }

    /// Copies a tensor to another device, in its stored precision.
    #[expect(unsafe_code, reason = "a tensor over mapped memory")]
    pub(super) fn sent(&self, name: &str, shape: &[i64], device: Device) -> Result<Tensor, Fault> {
        let (bytes, found, kind) = self.view(name)?;
        check_shape(name, self.path(name), &found, shape)?;
        let mut strides = vec![1; found.len()];
        for axis in (1..found.len()).rev() {
            strides[axis - 1] = strides[axis] * found[axis];
        }
        // SAFETY: the map outlives the tensor, which is only read, and only until the copy returns. safetensors has checked that there
        // are as many bytes as the shape needs.
        let mapped = unsafe { Tensor::from_blob(bytes.as_ptr(), &found, &strides, kind, Device::Cpu) };
        Ok(mapped.to_device(device))
    }

    /// Bytes, shape and precision of a tensor. Fails if it is missing or has an unsupported dtype.
    pub(super) fn view(&self, name: &str) -> Result<(&[u8], Vec<i64>, Kind), Fault> {
        let missing = || Fault::input(format!("missing tensor {name}"));
        let stored = self.index.get(name).ok_or_else(missing)?;
        let kind = kind(stored.dtype).ok_or_else(|| self.unsupported(stored))?;
        Ok((self.bytes(stored), stored.shape.clone(), kind))
    }

    /// Fails unless every tensor is stored as floating-point numbers of a supported dtype.
    pub(super) fn check_floating(&self) -> Result<(), Fault> {
        let odd = |stored: &&TensorLocation| kind(stored.dtype).is_none_or(|kind| kind == Kind::Uint8);
        let first = self.index.values().filter(odd).min_by_key(|stored| &stored.name);
        first.map_or(Ok(()), |stored| Err(self.unsupported(stored)))
    }

    fn unsupported(&self, stored: &TensorLocation) -> Fault {
        let path = self.files[stored.file].0.display();
        Fault::input(format!("tensor {} in {path}: unsupported dtype {:?}", stored.name, stored.dtype)).hint(
            "weights must be F32, F16, BF16 or F64; quantised ones are not supported: name the model that they were made from",
        )
    }
}

/// The error for a folder without weights; its hint names other files of weights.
fn no_weights(dir: &Path) -> Fault {
    let mut found: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flat_map(|entries| entries.flatten())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|end| name.ends_with(end)))
        .collect();
    found.sort();
    let fault = Fault::input(format!("no weights in {}", dir.display()));
    match found.first() {
        Some(name) if name.ends_with(".safetensors") => fault.hint(format!(
            "there is {name}, but neither {SINGLE} nor {INDEX}, which says what is in which file; fetch the index"
        )),
        Some(name) => fault.hint(format!(
            "{name} is not read; convert it with transformers' save_pretrained, which writes {SINGLE}"
        )),
        None => fault.hint(format!("expected {SINGLE}, or {INDEX} with its shards")),
    }
}

/// Reads from the index which file each tensor is in.
fn weight_map(index: &Path) -> Result<BTreeMap<String, String>, Fault> {
    let bad = |what: String| {
        Fault::input(format!("{}: {what}", index.display())).hint("fetch the model's index again")
    };
    let text = dyad_proto::files::read_to_string(index).map_err(|error| bad(error.to_string()))?;
    lfs::refuse_pointer(index, text.as_bytes())?;
    let json: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map =
        json.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("no `weight_map`".into()))?;
    let entry = |(tensor, file): (&String, &Value)| match file.as_str() {
        Some(file) if is_plain(file) => Ok((tensor.clone(), file.to_owned())),
        _ => Err(bad(format!("the file of {tensor} is {file}, not the name of a file in this folder"))),
    };
    let map: BTreeMap<String, String> = map.iter().map(entry).collect::<Result<_, _>>()?;
    if map.is_empty() { Err(bad("`weight_map` is empty".into())) } else { Ok(map) }
}

/// True for a single path component that does not leave the folder.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains('/')
}

#[expect(unsafe_code, reason = "memory mapping")]
fn map_file(path: &Path) -> Result<Mmap, Fault> {
    let cannot = |error: std::io::Error| {
        Fault::input(format!("cannot read {}: {error}", path.display()))
            .hint("the model folder is incomplete")
    };
    let file = dyad_proto::files::open(path).map_err(cannot)?;
    // SAFETY: the map is read-only. Users must not change a model folder while a process uses it.
    unsafe { Mmap::map(&file) }.map_err(cannot)
}

/// Lists the tensors of a file. Fails unless they fill the file.
fn tensors_in(path: &Path, map: &Mmap, file: usize) -> Result<Vec<TensorLocation>, Fault> {
    lfs::refuse_pointer(path, map)?;
    let (header, metadata) = SafeTensors::read_metadata(map).map_err(|error| damaged(path, &error))?;
    // Tensors follow the header's length and the header.
    let start = size_of::<u64>() + header;
    let stored = |(name, info): (String, &TensorInfo)| TensorLocation {
        file,
        name,
        dtype: info.dtype,
        shape: info.shape.iter().map(|&size| size as i64).collect(),
        bytes: start + info.data_offsets.0..start + info.data_offsets.1,
    };
    Ok(metadata.tensors().into_iter().map(stored).collect())
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

/// Fails if a tensor's shape differs from the model's.
pub(super) fn check_shape(name: &str, path: &Path, found: &[i64], expected: &[i64]) -> Result<(), Fault> {
    if found == expected {
        return Ok(());
    }
    let hint = match found {
        [0] => {
            "the file was saved from DeepSpeed ZeRO-3 without gathering the weights; convert its checkpoint with zero_to_fp32.py"
        }
        _ if path.ends_with(ADAPTER_WEIGHTS) => {
            "r or rank_pattern of adapter_config.json does not belong to these weights"
        }
        _ => "config.json does not belong to these weights",
    };
    Err(Fault::input(format!(
        "tensor {name} in {} has shape {found:?}, expected {expected:?}",
        path.display()
    ))
    .hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::test_files::{File as Made, write};

    fn index(dir: &Path, entries: &[(&str, &str)]) {
        let map: serde_json::Map<String, Value> =
            entries.iter().map(|(tensor, file)| ((*tensor).to_owned(), (*file).into())).collect();
        std::fs::write(dir.join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    }

    #[test]
    fn an_index_must_name_plain_files_that_hold_its_tensors() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a.safetensors"), &[Made::f32("x", &[1], &[1.0])]);
        index(dir.path(), &[("x", "a.safetensors")]);
        assert!(MappedFiles::of_model(dir.path()).unwrap().contains("x"));
        for path in ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "", "./a.safetensors"] {
            index(dir.path(), &[("x", path)]);
            let fault = MappedFiles::of_model(dir.path()).unwrap_err();
            assert!(fault.message.contains("not the name of a file in this folder"), "{path}: {fault}");
        }
        index(dir.path(), &[("x", "a.safetensors"), ("y", "a.safetensors")]);
        let fault = MappedFiles::of_model(dir.path()).unwrap_err();
        assert!(fault.message.ends_with("tensor y should be in a.safetensors, and is not"), "{fault}");
        index(dir.path(), &[("x", "b.safetensors")]);
        assert!(MappedFiles::of_model(dir.path()).unwrap_err().message.contains("cannot read"));
    }

    #[test]
    fn a_tensor_of_two_shards_must_be_the_same_in_both() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a.safetensors"), &[Made::f32("x", &[1], &[1.0])]);
        write(
            &dir.path().join("b.safetensors"),
            &[Made::f32("x", &[1], &[1.0]), Made::f32("y", &[1], &[2.0])],
        );
        index(dir.path(), &[("x", "b.safetensors"), ("y", "b.safetensors")]);
        MappedFiles::of_model(dir.path()).unwrap();
        let both =
            || MappedFiles::open(vec![dir.path().join("a.safetensors"), dir.path().join("b.safetensors")]);
        both().unwrap();
        write(&dir.path().join("a.safetensors"), &[Made::f32("x", &[1], &[3.0])]);
        let fault = both().unwrap_err();
        assert!(
            fault.message.contains("tensor x is in") && fault.message.contains("different values"),
            "{fault}"
        );
    }

    #[test]
    fn the_error_for_a_folder_without_weights_names_similar_files() {
        let dir = tempfile::tempdir().unwrap();
        let hint = || MappedFiles::of_model(dir.path()).unwrap_err().hint;
        assert!(hint().starts_with("expected model.safetensors"));
        std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert!(hint().starts_with("pytorch_model.bin is not read"));
        std::fs::write(dir.path().join("model-00001-of-00002.safetensors"), "").unwrap();
        assert!(hint().starts_with("there is model-00001-of-00002.safetensors, but neither"));
    }

    #[test]
    fn lfs_pointers_and_truncated_files_are_reported_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SINGLE);
        std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
        assert!(
            MappedFiles::of_model(dir.path())
                .unwrap_err()
                .message
                .ends_with("is a Git LFS pointer, not the file itself")
        );
        write(&path, &[Made::f32("x", &[2], &[1.0, 2.0])]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(
            MappedFiles::of_model(dir.path())
                .unwrap_err()
                .message
                .contains("is not a valid safetensors file")
        );
        std::fs::write(&path, [bytes.as_slice(), b"more"].concat()).unwrap();
        assert!(
            MappedFiles::of_model(dir.path())
                .unwrap_err()
                .message
                .contains("is not a valid safetensors file")
        );
    }
}
