//! Tensors of a Hugging Face model folder, by name, from one or many safetensors files, mapped into memory.
//!
//! `files` maps the files, `claim` matches their tensors with the model's, and [`relay`] sends them from one rank to the others.

mod claim;
mod files;
pub mod names;
pub mod relay;
#[cfg(test)]
mod test_files;

use dyad_torch::place::Place;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use dyad_data::adapter::ADAPTER_WEIGHTS;
use dyad_data::files::is_there;
use dyad_proto::Fault;
use tch::{Device, Kind, Tensor};

pub use self::claim::Wanted;
pub(crate) use self::claim::listed;
use crate::observe::progress;
use files::{MappedFiles, check_shape};
use relay::{Relay, Relayed};

/// How the ranks of a run read the files of a model.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// One rank reads and the others get the bytes from it; otherwise every rank reads.
    pub relay: Option<Relay>,
    /// Digest of all loaded tensors, to compare ranks with each other, and a resumed run with its checkpoint.
    pub digest: Option<Digested>,
    /// The folder has been loaded before: do not repeat its warnings.
    pub again: bool,
    /// Check names and shapes only, and read no weights: tensors hold zeros that take no memory.
    pub shapes_alone: bool,
}

/// A digest of tensors and their names that does not depend on their order, and the names of tensors with NaN or infinite numbers.
#[derive(Clone, Debug, Default)]
pub struct Digested {
    sum: Rc<Cell<u64>>,
    not_finite: Rc<RefCell<BTreeSet<String>>>,
}

impl Digested {
    /// Adds a tensor.
    pub fn add(&self, name: &str, tensor: &Tensor) {
        if !is_finite(tensor) {
            self.not_finite.borrow_mut().insert(name.to_owned());
        }
        let name = name.bytes().fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
        let both = (name ^ (word_sum(tensor) as u64).wrapping_mul(MIX)).wrapping_mul(MIX);
        self.sum.set(self.sum.get().wrapping_add(both ^ (both >> 29)));
    }

    /// Names of the tensors with NaN or infinite numbers in them.
    #[must_use]
    pub fn not_finite(&self) -> BTreeSet<String> {
        self.not_finite.borrow().clone()
    }

    /// The digest as it is shown and stored.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{:016x}", self.sum.get())
    }
}

/// All tensors of a folder. Their data stay on disk, or at the rank that reads, until they are needed.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    source: Source,
    digest: Option<Digested>,
    shapes_alone: bool,
}

#[derive(Debug)]
enum Source {
    Files(MappedFiles),
    Relayed(Relayed),
}

impl Weights {
    /// Maps `model.safetensors` or the shards that `model.safetensors.index.json` names.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        Self::opened(dir, || MappedFiles::of_model(dir), &Reading::default())
    }

    /// Maps the given safetensors files; `dir` names them in errors.
    pub fn open_files(dir: &Path, paths: Vec<PathBuf>) -> Result<Self, Fault> {
        Self::opened(dir, || MappedFiles::open(paths), &Reading::default())
    }

    /// The same tensors; each one that is read from now on is added to `read`.
    #[must_use]
    pub fn counted(self, read: &Digested) -> Self {
        Self { digest: Some(read.clone()), ..self }
    }

    /// A folder's tensors under the wanted names. Fails if one is missing. If one rank reads for all, only that rank opens files; it also
    /// reports unused tensors: as an error in an adapter, as a warning in a model.
    pub fn claim(dir: &Path, wanted: &Wanted, reading: &Reading) -> Result<Self, Fault> {
        let files = || {
            let files = match wanted {
                Wanted::Model { .. } => MappedFiles::of_model(dir)?,
                Wanted::Adapter { .. } => MappedFiles::open(vec![adapter_file(dir)?])?,
            };
            let claimed = wanted.claim(dir, files)?;
            if !reading.again {
                claimed.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            }
            Ok(claimed.files)
        };
        Self::opened(dir, files, reading)
    }

    fn opened(
        dir: &Path,
        files: impl FnOnce() -> Result<MappedFiles, Fault>,
        reading: &Reading,
    ) -> Result<Self, Fault> {
        let reads = reading.relay.as_ref().is_none_or(|relay| relay.communicator.rank() == relay::READER);
        let files = reads.then(files).transpose()?;
        let source = match (&reading.relay, files) {
            (None, Some(files)) => Source::Files(files),
            (None, None) => return Err(Fault::failed("no rank reads the weights")),
            (Some(relay), files) => Source::Relayed(Relayed::new(relay.clone(), files)?),
        };
        Ok(Self {
            dir: dir.to_owned(),
            source,
            digest: reading.digest.clone(),
            shapes_alone: reading.shapes_alone,
        })
    }

    /// All names.
    pub fn names(&self) -> Vec<&str> {
        match &self.source {
            Source::Files(files) => files.names().collect(),
            Source::Relayed(relayed) => relayed.names().collect(),
        }
    }

    /// True if there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Files(files) => files.contains(name),
            Source::Relayed(relayed) => relayed.shape(name).is_some(),
        }
    }

    /// Copies a tensor in its stored precision, after checking its shape. The copy is on the CPU, or on the device of the relay.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, Fault> {
        progress::advance();
        if !self.contains(name) {
            return Err(Fault::input(format!("missing tensor {name} in {}", self.dir.display()))
                .hint("the checkpoint is incomplete, or config.json is of another model"));
        }
        let tensor = match &self.source {
            Source::Files(files) => {
                let (bytes, found, kind) = files.view(name)?;
                check_shape(name, files.path(name), &found, shape)?;
                if self.shapes_alone {
                    return Ok(Tensor::zeros([1], (kind, Device::Cpu)).expand(shape, false));
                }
                Tensor::from_data_size(bytes, &found, kind)
            }
            Source::Relayed(relayed) => {
                check_shape(name, &self.dir, relayed.shape(name).unwrap_or_default(), shape)?;
                relayed.tensor(name)?
            }
        };
        self.count(name, &tensor);
        Ok(tensor)
    }

    fn count(&self, name: &str, tensor: &Tensor) {
        if let Some(digest) = &self.digest {
            digest.add(name, tensor);
        }
    }

    /// A tensor in the precision and on the device of `place`.
    pub fn load(&self, name: &str, shape: &[i64], place: Place) -> Result<Tensor, Fault> {
        progress::advance();
        if self.shapes_alone {
            // A conversion would allocate memory for every number.
            return self.tensor(name, shape);
        }
        let stored = match &self.source {
            // Straight from the file's pages, which saves a copy on the host.
            Source::Files(files) if place.device.is_cuda() && self.contains(name) => {
                let stored = files.sent(name, shape, place.device)?;
                self.count(name, &stored);
                stored
            }
            _ => self.tensor(name, shape)?.to_device(place.device),
        };
        Ok(stored.to_kind(place.kind))
    }
}

/// Path of an adapter folder's weights.
fn adapter_file(dir: &Path) -> Result<PathBuf, Fault> {
    let path = dir.join(ADAPTER_WEIGHTS);
    if is_there(&path) {
        return Ok(path);
    }
    let fault = Fault::input(format!("no {ADAPTER_WEIGHTS} in {}", dir.display()));
    Err(match dir.join("adapter_model.bin").is_file() {
        true => fault.hint("adapter_model.bin is not read; load the adapter with PEFT and save it again"),
        false => fault.hint("the adapter folder is incomplete"),
    })
}

/// Multiplier that spreads a value over all bits of a digest.
const MIX: u64 = 0x5851_F42D_4C95_7F2D;
/// Constants of FNV-1a.
const BASIS: u64 = 0xCBF2_9CE4_8422_2325;
const PRIME: u64 = 0x0100_0000_01B3;

/// Sum of a tensor's bytes, in words of eight bytes if their number is a multiple of eight.
fn word_sum(tensor: &Tensor) -> i64 {
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    let word = if bytes.is_multiple_of(8) { Kind::Int64 } else { Kind::Uint8 };
    tensor.detach().flatten(0, -1).view_dtype(word).sum(Kind::Int64).int64_value(&[])
}

/// Numbers to check at a time: few enough to stay in a core's cache.
const PIECE: i64 = 1 << 18;

/// True if a tensor holds neither NaN nor infinite numbers.
pub(crate) fn is_finite(tensor: &Tensor) -> bool {
    if !tensor.is_floating_point() {
        return true;
    }
    let flat = tensor.detach().flatten(0, -1);
    let of_piece = |start: i64| {
        let piece = flat.narrow(0, start, PIECE.min(flat.numel() as i64 - start));
        let kind = if piece.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        // A sum of finite numbers may overflow; NaN and infinity never become finite in a sum.
        let sum = piece.sum(kind).double_value(&[]);
        sum.is_finite() || piece.isfinite().all().int64_value(&[]) != 0
    };
    (0..flat.numel() as i64).step_by(PIECE as usize).all(of_piece)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::test_files::{File, write};

    #[test]
    fn a_digest_depends_on_names_and_values_but_not_on_their_order() {
        let (a, b) = (Tensor::from_slice(&[1.0f32, 2.0]), Tensor::from_slice(&[3.0f32, 4.0]));
        let of = |tensors: &[(&str, &Tensor)]| {
            let digest = Digested::default();
            tensors.iter().for_each(|(name, tensor)| digest.add(name, tensor));
            digest.text()
        };
        let both = of(&[("a", &a), ("b", &b)]);
        assert_eq!(of(&[("b", &b), ("a", &a)]), both);
        assert_ne!(of(&[("a", &b), ("b", &a)]), both);
        assert_ne!(of(&[("a", &a)]), both);
        assert_ne!(of(&[("a", &a), ("b", &(&b + 1e-6))]), both);
    }

    #[test]
    fn is_finite_finds_nan_and_infinity_and_accepts_large_sums() {
        let ones = || Tensor::ones([PIECE + 5], (Kind::Float, Device::Cpu));
        assert!(is_finite(&ones()) && is_finite(&(ones() * 1e38)));
        assert!(is_finite(&(ones() * 60_000.0).to_kind(Kind::Half)));
        assert!(is_finite(&Tensor::zeros([0], (Kind::Float, Device::Cpu))));
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
            for (at, value) in [(0, f64::NAN), (PIECE + 4, f64::INFINITY), (PIECE - 1, f64::NEG_INFINITY)] {
                let tensor = ones().to_kind(kind);
                let _ = tensor.get(at).fill_(value);
                assert!(!is_finite(&tensor), "{kind:?} {value} at {at}");
            }
        }
        let digest = Digested::default();
        digest.add("good", &ones());
        digest.add("bad", &(ones() / 0.0));
        assert_eq!(digest.not_finite(), BTreeSet::from(["bad".to_owned()]));
    }

    #[test]
    fn reads_by_name_and_checks_the_shape() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("model.safetensors"), &[File::f32("a", &[2, 1], &[1.0, 2.0])]);
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
}
