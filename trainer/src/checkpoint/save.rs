//! Writes `checkpoint-N/` and `final/`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dyad_data::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use dyad_proto::Fault;
use dyad_proto::checkpoint_state::CheckpointState;
use dyad_proto::run_folder::FINAL;
use tch::{Device, Kind};

use super::files::{self, Home, Sums};
use super::tensors::{NamedStored, StoredTensor, Written, write_file, write_model};
use super::{OPTIMIZER_FILE, STATE_FILE, cannot_write};
use crate::model::Model;
use crate::model::lora::Adapters;
use crate::model::weights::Reading;
use crate::model::weights::listed;
use crate::model::weights::names::ADAPTER_PREFIX;
use crate::optimizer::states::MASTER;
use crate::session::drain::Recorded;
use crate::zero::parameters::WholeTensor;
use dyad_torch::place::Place;

/// What all saves of a run have in common: where files come from and how weights are stored.
#[derive(Clone, Debug)]
pub struct Saver {
    /// Folder of the run.
    pub home: Home,
    /// Folder whose tokenizer and template the run reads.
    pub tokenizer: PathBuf,
    /// `tokenizer_class` for the tokenizer's configuration in adapter folders, which have no `config.json` of the model.
    pub tokenizer_class: Option<&'static str>,
    /// The model underneath an adapter.
    pub base: PathBuf,
    /// Precision of the saved weights: the source's own.
    pub stored: Kind,
    /// The adapters of LoRA runs.
    pub adapter: Option<SavedAdapter>,
    /// Also write the merged model into `final/merged`.
    pub merge: bool,
    /// Tensors that held NaN or infinite numbers when the run began. Usually these are rows that no token uses.
    pub not_finite: BTreeSet<String>,
}

/// Adapters, and the name of the model underneath.
#[derive(Clone, Debug)]
pub struct SavedAdapter {
    /// Layers, ranks and scales.
    pub adapters: Adapters,
    /// Name for `base_model_name_or_path`.
    pub base: String,
}

impl Saver {
    /// Writes `checkpoint-N/`, with everything that a resume needs. The folder appears only after `recorded` has returned.
    pub fn checkpoint(
        &self,
        kept: &[WholeTensor],
        state: &CheckpointState,
        recorded: impl FnOnce() -> Recorded,
    ) -> Result<PathBuf, Fault> {
        self.home.write(&format!("checkpoint-{}", state.step), |dir| {
            let weights = self.weights(dir, kept)?;
            let written = weights.and(write_file(&dir.join(OPTIMIZER_FILE), &self.optimizer_tensors(kept))?);
            let sums = self.finite(state.step, written)?;
            let Recorded { num_tokens, evaluations, .. } = recorded();
            let (num_tokens, evaluations) = (Some(num_tokens), Some(evaluations));
            write_json(&dir.join(STATE_FILE), &CheckpointState { num_tokens, evaluations, ..state.clone() })?;
            Ok(sums)
        })
    }

    /// Writes `final/`: the model, ready to serve, and the run's state, which shows a later resume that the run is complete.
    pub fn finish(&self, kept: &[WholeTensor], state: &CheckpointState) -> Result<PathBuf, Fault> {
        self.home.write(FINAL, |dir| {
            let mut written = self.weights(dir, kept)?;
            if let Some(adapter) = self.adapter.as_ref().filter(|_| self.merge) {
                written = written.and(self.merged(&dir.join("merged"), &adapter.adapters, kept)?);
            }
            let sums = self.finite(state.step, written)?;
            write_json(&dir.join(STATE_FILE), state)?;
            Ok(sums)
        })
    }

    /// Fails if the model has NaN or infinite numbers in tensors that were finite at the start.
    fn finite(&self, step: u64, written: Written) -> Result<Sums, Fault> {
        let was = |name: &String| {
            // A module that is trained whole beside adapters began as the base's.
            let of_base = name.strip_prefix(ADAPTER_PREFIX).unwrap_or(name);
            self.not_finite.contains(name) || self.not_finite.contains(of_base)
        };
        let new: Vec<&str> =
            written.not_finite.iter().filter(|name| !was(name)).map(String::as_str).collect();
        if new.is_empty() {
            return Ok(written.sums);
        }
        Err(Fault::failed(format!(
            "step {step}: nothing is saved, as NaN or infinite numbers are in {}",
            listed(&new)
        ))
        .hint(format!(
            "lower learning_rate; numbers may also have become too large for {:?}, the precision that the model is stored in",
            self.stored
        )))
    }

    fn weights(&self, dir: &Path, kept: &[WholeTensor]) -> Result<Written, Fault> {
        files::copy_companions(&self.base, &self.tokenizer, dir)?;
        let trained = |kind: Kind| -> NamedStored {
            masters(kept).map(|one| (one.name.clone(), StoredTensor::new(&one.tensor, kind))).collect()
        };
        let Some(adapter) = &self.adapter else { return write_model(dir, &trained(self.stored)) };
        // An adapter folder must not look like a whole model.
        let config = dir.join("config.json");
        if config.exists() {
            std::fs::remove_file(&config).map_err(|error| cannot_write(&config, &error))?;
        }
        if let Some(class) = self.tokenizer_class {
            name_class(&dir.join("tokenizer_config.json"), class)?;
        }
        write_json(&dir.join(ADAPTER_CONFIG), &adapter.adapters.to_json(&adapter.base))?;
        write_file(&dir.join(ADAPTER_WEIGHTS), &trained(Kind::Float))
    }

    fn optimizer_tensors(&self, kept: &[WholeTensor]) -> NamedStored {
        // Adapters are always stored in float32 themselves.
        let with_masters = self.adapter.is_none() && self.stored != Kind::Float;
        kept.iter()
            .filter(|one| one.suffix != MASTER || with_masters)
            .map(|one| {
                (format!("{}.{}", one.name, one.suffix), StoredTensor::new(&one.tensor, one.tensor.kind()))
            })
            .collect()
    }

    fn merged(&self, dir: &Path, adapters: &Adapters, kept: &[WholeTensor]) -> Result<Written, Fault> {
        std::fs::create_dir_all(dir).map_err(|error| cannot_write(dir, &error))?;
        // The merged model differs from the base only in its weights, so its configuration comes from the base.
        files::copy_companions(&self.base, &self.tokenizer, dir)?;
        // Load the source again: the weights of the passes may be narrower, and sharded over the ranks.
        let place = Place { device: Device::Cpu, kind: Kind::Float };
        let again = Reading { again: true, ..Reading::default() };
        let mut model = Model::load_units(&self.base, place, &again, &mut |_, _| {})?;
        if adapters.unties_head() && model.untied_head.is_none() {
            model.untied_head = Some(model.embedding.shallow_clone());
            let config = dir.join("config.json");
            let mut fields = dyad_data::files::object(&config)?.unwrap_or_default();
            fields.insert("tie_word_embeddings".to_owned(), false.into());
            write_json(&config, &fields)?;
        }
        let find = |name: &str| {
            masters(kept).find(|one| one.name == name).map(|one| one.tensor.to_device(Device::Cpu))
        };
        let tensors: NamedStored = model
            .named_tensors()
            .into_iter()
            .map(|(name, tensor)| {
                let merged = adapters.merged(&name, &tensor.detach(), &find);
                (name, StoredTensor::new(merged.as_ref().unwrap_or(tensor), self.stored))
            })
            .collect();
        write_model(dir, &tensors)
    }
}

fn masters(kept: &[WholeTensor]) -> impl Iterator<Item = &WholeTensor> {
    kept.iter().filter(|one| one.suffix == MASTER)
}

/// Without the model's config.json, only `tokenizer_class` says which tokenizer this is.
fn name_class(config: &Path, class: &str) -> Result<(), Fault> {
    let mut fields = dyad_data::files::object(config)?.unwrap_or_default();
    fields.insert("tokenizer_class".to_owned(), class.into());
    write_json(config, &fields)
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), Fault> {
    let text = serde_json::to_string_pretty(value).map_err(|error| cannot_write(path, &error.into()))?;
    std::fs::write(path, text + "\n").map_err(|error| cannot_write(path, &error))
}
