//! From the run's configuration to models and parameters that can train.

use std::path::{Path, PathBuf};

use dyad_data::hub;
use dyad_proto::run_config::TrainingMethod;
use dyad_proto::{Fault, RunConfig};
use tch::{Device, Kind};

use crate::checkpoint::save::Saver;
use crate::device::compute_kind;
use crate::lora::{self, ADAPTER_CONFIG, LoraSpec, PeftConfig};
use crate::model::weights::Place;
use crate::model::{EMBEDDING, FINAL_NORM, HEAD, Model, ModelConfig, layer_tensors, stored_kind};
use crate::parameters::{Named, Parameters};

/// Local folders that a run starts from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Whole model whose weights are the start.
    pub base: PathBuf,
    /// Adapter on top of it that the run continues.
    pub adapter: Option<PathBuf>,
    /// Where tokenizer and config files come from, first match wins.
    pub companions: Vec<PathBuf>,
}

impl Sources {
    /// Finds or downloads what `model` and `from_checkpoint` name.
    pub fn resolve(config: &RunConfig) -> Result<Self, Fault> {
        let model = hub::resolve(&config.model)?;
        let start = config.from_checkpoint.as_deref().map(hub::resolve).transpose()?;
        if model.join(ADAPTER_CONFIG).is_file() && !model.join("config.json").is_file() {
            return Err(Fault::input(format!("model {} is an adapter, not a whole model", config.model))
                .hint(
                    "name the base model in `model` and the adapter in `from_checkpoint`, with lora = true",
                ));
        }
        let adapter = start.clone().filter(|dir| dir.join(ADAPTER_CONFIG).is_file());
        if let (Some(dir), false) = (&adapter, config.lora) {
            return Err(Fault::input(format!(
                "from_checkpoint {} is an adapter, but lora is false",
                dir.display()
            ))
            .hint("set lora = true to continue the adapter, or start from its merged model"));
        }
        let base = start.clone().filter(|_| adapter.is_none()).unwrap_or_else(|| model.clone());
        Ok(Self { base, adapter, companions: start.into_iter().chain([model]).collect() })
    }

    /// Folder of the tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Path {
        self.companions.iter().find(|dir| dir.join("tokenizer.json").is_file()).unwrap_or(&self.base)
    }

    /// Most tokens of a sequence: what the run asks for, else what the model was made for.
    pub fn max_seq_length(&self, config: &RunConfig) -> Result<usize, Fault> {
        let limit = ModelConfig::load(&self.base)?.max_position_embeddings.max(1) as usize;
        let asked = config.max_seq_length.map_or(limit, |length| length as usize);
        if asked > limit {
            tracing::warn!(
                max_seq_length = asked,
                max_position_embeddings = limit,
                "longer than the model was made for"
            );
        }
        Ok(asked)
    }
}

/// Models and parameters, before the ranks are connected.
#[derive(Debug)]
pub struct Parts {
    /// The model that trains.
    pub policy: Model,
    /// The frozen model that DPO holds against it.
    pub reference: Option<Model>,
    /// Trainable parameters of the policy.
    pub parameters: Parameters,
    /// Writes checkpoints of the policy.
    pub saver: Saver,
}

impl Parts {
    /// Loads everything onto the device.
    pub fn load(config: &RunConfig, sources: &Sources, device: Device) -> Result<Self, Fault> {
        let kind = compute_kind(config.dtype, device);
        let compares = config.training_method == TrainingMethod::Dpo;
        let (policy, reference, parameters, adapter) = match config.lora {
            true => adapters(config, sources, Place { device, kind }, compares)?,
            false => full(sources, Place { device, kind }, compares)?,
        };
        let saver = Saver {
            output_dir: PathBuf::from(&config.output_dir),
            sources: sources.companions.clone(),
            stored: stored_kind(&policy.config.torch_dtype),
            adapter,
            merge: config.merge_adapter,
        };
        Ok(Self { policy, reference, parameters, saver })
    }
}

type Loaded = (Model, Option<Model>, Parameters, Option<PeftConfig>);

fn full(sources: &Sources, place: Place, compares: bool) -> Result<Loaded, Fault> {
    let mut policy = Model::load(&sources.base, Place { kind: Kind::Float, ..place })?;
    let parameters = Parameters::adopt(every_tensor(&mut policy), place.kind);
    policy.place = place;
    let reference = compares.then(|| policy.frozen_copy());
    Ok((policy, reference, parameters, None))
}

fn adapters(config: &RunConfig, sources: &Sources, place: Place, compares: bool) -> Result<Loaded, Fault> {
    let mut policy = Model::load(&sources.base, place)?;
    let spec = LoraSpec::new(config, sources.adapter.as_deref())?;
    lora::attach(&mut policy, &spec, config.random_seed)?;
    let reference = match (compares, &sources.adapter) {
        (false, _) => None,
        // B is zero: the base itself is the start.
        (true, None) => Some(policy.share()),
        (true, Some(_)) => Some(lora::frozen_reference(&mut policy)),
    };
    let layers = lora::named_tensors(&mut policy);
    let units = [Vec::new()].into_iter().chain(layers).chain([Vec::new()]).collect();
    let parameters = Parameters::adopt(units, place.kind);
    let base = if config.from_checkpoint.is_some() && sources.adapter.is_none() {
        sources.base.display().to_string()
    } else {
        config.model.clone()
    };
    Ok((policy, reference, parameters, Some(spec.peft_config(&base))))
}

/// Units of full fine-tuning: embedding, each layer, final norm with the untied head.
fn every_tensor(model: &mut Model) -> Vec<Vec<Named<'_>>> {
    let mut units: Vec<Vec<Named<'_>>> = vec![vec![(EMBEDDING.to_owned(), &mut model.embedding)]];
    units.extend(
        model.layers.iter_mut().enumerate().map(|(index, layer)| layer_tensors(index, layer.as_mut())),
    );
    let mut top: Vec<Named<'_>> = vec![(FINAL_NORM.to_owned(), &mut model.final_norm)];
    top.extend(model.untied_head.as_mut().map(|head| (HEAD.to_owned(), head)));
    units.push(top);
    units
}
