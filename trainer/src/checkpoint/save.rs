//! Writes `checkpoint-N/` and `final/`.

use std::path::{Path, PathBuf};

use dyad_proto::Fault;
use tch::{Kind, Tensor};

use super::tensors::{NamedStored, Stored, write_file, write_model};
use super::{OPTIMIZER_FILE, STATE_FILE, State, cannot_write, files};
use crate::lora::{self, ADAPTER_CONFIG, ADAPTER_WEIGHTS, PeftConfig};
use crate::model::{Model, Part, blocks::Linear};
use crate::parameters::Parameters;

/// What stays the same over a run: where files come from and how weights are stored.
#[derive(Clone, Debug)]
pub struct Saver {
    /// Folder of the run.
    pub output_dir: PathBuf,
    /// Folders that config and tokenizer files are copied from, the first that has one wins.
    pub sources: Vec<PathBuf>,
    /// Precision of the saved weights: the source's own.
    pub stored: Kind,
    /// The adapter's description in LoRA runs.
    pub adapter: Option<PeftConfig>,
    /// Also write the merged model into `final/merged`.
    pub merge: bool,
}

impl Saver {
    /// `checkpoint-N/`: all that a resume needs.
    pub fn checkpoint(
        &self,
        model: &mut Model,
        parameters: &Parameters,
        state: &State,
    ) -> Result<PathBuf, Fault> {
        let target = self.output_dir.join(format!("checkpoint-{}", state.step));
        files::write_folder(&target, |dir| {
            self.weights(dir, model, parameters)?;
            write_file(&dir.join(OPTIMIZER_FILE), &self.optimizer_tensors(parameters))?;
            write_json(&dir.join(STATE_FILE), state)
        })?;
        Ok(target)
    }

    /// `final/`: the model alone, ready to serve.
    pub fn finish(&self, model: &mut Model, parameters: &Parameters) -> Result<PathBuf, Fault> {
        let target = self.output_dir.join("final");
        files::write_folder(&target, |dir| {
            self.weights(dir, model, parameters)?;
            if self.adapter.is_some() && self.merge {
                self.merged(&dir.join("merged"), model)
            } else {
                Ok(())
            }
        })?;
        Ok(target)
    }

    fn weights(&self, dir: &Path, model: &mut Model, parameters: &Parameters) -> Result<(), Fault> {
        let sources: Vec<&Path> = self.sources.iter().map(PathBuf::as_path).collect();
        files::copy_companions(&sources, dir)?;
        let trained = |kind: Kind| -> NamedStored {
            parameters.iter().map(|one| (one.name.clone(), Stored::new(&one.master, kind))).collect()
        };
        let Some(adapter) = &self.adapter else { return write_model(dir, &trained(self.stored)) };
        // An adapter folder must not look like a whole model.
        let config = dir.join("config.json");
        if config.exists() {
            std::fs::remove_file(&config).map_err(|error| cannot_write(&config, &error))?;
        }
        let adapter = PeftConfig { target_modules: lora::adapted_modules(model).into(), ..adapter.clone() };
        write_json(&dir.join(ADAPTER_CONFIG), &adapter)?;
        write_file(&dir.join(ADAPTER_WEIGHTS), &trained(Kind::Float))
    }

    fn optimizer_tensors(&self, parameters: &Parameters) -> NamedStored {
        // Adapters are always stored in float32 themselves.
        let masters = self.adapter.is_none() && self.stored != Kind::Float;
        let mut tensors = NamedStored::new();
        for one in parameters.iter() {
            let mut add = |suffix: &str, tensor: &Tensor| {
                tensors.push((format!("{}.{suffix}", one.name), Stored::new(tensor, Kind::Float)));
            };
            add("exp_avg", &one.exp_avg);
            add("exp_avg_sq", &one.exp_avg_sq);
            if masters {
                add("master", &one.master);
            }
        }
        tensors
    }

    fn merged(&self, dir: &Path, model: &mut Model) -> Result<(), Fault> {
        std::fs::create_dir_all(dir).map_err(|error| cannot_write(dir, &error))?;
        let sources: Vec<&Path> = self.sources.iter().map(PathBuf::as_path).collect();
        files::copy_companions(&sources, dir)?;
        write_model(dir, &self.merged_tensors(model))
    }

    fn merged_tensors(&self, model: &mut Model) -> NamedStored {
        let updates: Vec<(String, Tensor)> = model
            .layers
            .iter_mut()
            .enumerate()
            .flat_map(|(index, layer)| {
                let merged = |(name, part): (&str, Part<'_>)| match part {
                    Part::Linear(linear) => {
                        Some((format!("model.layers.{index}.{name}.weight"), merged_weight(linear)?))
                    }
                    Part::Norm(_) => None,
                };
                layer.parts().into_iter().filter_map(merged).collect::<Vec<_>>()
            })
            .collect();
        let replacement =
            |name: &str| updates.iter().find(|(updated, _)| updated == name).map(|(_, tensor)| tensor);
        model
            .named_tensors()
            .into_iter()
            .map(|(name, tensor)| {
                let stored = Stored::new(replacement(&name).unwrap_or(tensor), self.stored);
                (name, stored)
            })
            .collect()
    }
}

/// `W + scale B A`, summed in float32.
fn merged_weight(linear: &Linear) -> Option<Tensor> {
    let adapter = linear.adapter.as_ref()?;
    let wide = |tensor: &Tensor| tensor.detach().to_kind(Kind::Float);
    Some(wide(&linear.weight) + wide(&adapter.b).matmul(&wide(&adapter.a)) * adapter.scale)
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), Fault> {
    let text = serde_json::to_string_pretty(value).map_err(|error| cannot_write(path, &error))?;
    std::fs::write(path, text + "\n").map_err(|error| cannot_write(path, &error))
}
