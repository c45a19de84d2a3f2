//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's conventions: initial values, names, merging. [`dyad_data::adapter`]
//! decides which layers have one, and with which rank and scale.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dyad_data::adapter::base::NamedBase;
use dyad_data::adapter::python_regex::PythonRegex;
use dyad_data::adapter::targets::{Adapted, Modules, Targets, check_names, target_modules};
use dyad_data::adapter::{ADAPTER_CONFIG, AdapterConfig};
use dyad_proto::run_config::LoraModules;
use dyad_proto::{Fault, RunConfig, counted};
use tch::{Device, Kind, Tensor};

use crate::model::Model;
use crate::model::layer::Part;
use crate::model::linear::{Adapter, Linear};
use crate::model::weights::{Reading, Wanted, Weights};
use crate::zero::parameters::Named;

/// The adapters of a model, for training, generation, resuming and merging.
#[derive(Clone, Debug)]
pub struct Adapters {
    config: AdapterConfig,
    modules: Modules,
    layers: Vec<Adapted>,
    /// Adapter folder that the weights come from; `None` for new adapters.
    start: Option<PathBuf>,
}

impl Adapters {
    /// Adapters of a run: new ones, or those of the folder that it starts from.
    pub fn of_run(config: &RunConfig, start: Option<&Path>, model: &mut Model) -> Result<Self, Fault> {
        let modules = modules(model);
        if let Some(dir) = start {
            let mut adapters = Self::of_folder(dir, modules)?;
            adapters.refuse_overridden(config, dir)?;
            adapters.config.lora_dropout = dropout(config, &adapters.config);
            return Ok(adapters);
        }
        let targets = targets(config, &modules)?;
        let (r, dropout) = (config.lora_r().into(), config.lora_dropout());
        let plain = AdapterConfig::plain(r, config.lora_alpha(), dropout, targets);
        let layers = plain.select(&modules).map_err(|fault| in_key(MODULES, fault))?;
        Ok(Self { config: plain, modules, layers, start: None })
    }

    /// Adapters of a PEFT folder.
    fn of_folder(dir: &Path, modules: Modules) -> Result<Self, Fault> {
        let config = AdapterConfig::load(dir)?;
        let path = dir.join(ADAPTER_CONFIG);
        config.warnings.iter().for_each(|warning| tracing::warn!("{}: {warning}", path.display()));
        let layers = config.select(&modules).map_err(|fault| in_key(&path.display().to_string(), fault))?;
        Ok(Self { config, modules, layers, start: Some(dir.to_owned()) })
    }

    /// Fails if the user set a key to another value than the adapter has, because the key would silently have no effect.
    fn refuse_overridden(&self, config: &RunConfig, dir: &Path) -> Result<(), Fault> {
        let own = &self.config;
        let differs = |key: &str, asked: String, found: String| {
            Err(Fault::input(format!(
                "config key `{key}` is {asked}, but the adapter that the run starts from has {found}"
            ))
            .hint(format!("{} decides: remove `{key}`, or start without from_checkpoint", dir.display())))
        };
        if let Some(r) = config.lora_r.filter(|r| i64::from(*r) != own.r) {
            return differs("lora_r", r.to_string(), own.r.to_string());
        }
        if let Some(alpha) = config.lora_alpha.filter(|alpha| *alpha != own.lora_alpha) {
            return differs("lora_alpha", alpha.to_string(), own.lora_alpha.to_string());
        }
        let Some(text) = &config.lora_trainable_modules else { return Ok(()) };
        let asked = AdapterConfig {
            targets: targets(config, &self.modules)?,
            ..AdapterConfig::plain(1, 1.0, 0.0, Targets::AllLinear)
        };
        let asked = asked.select(&self.modules).map_err(|fault| in_key(MODULES, fault))?;
        if asked.iter().map(|layer| &layer.name).ne(self.layers.iter().map(|layer| &layer.name)) {
            let found = target_modules(&self.layers, &self.modules);
            let shown = found.iter().take(7).cloned().collect::<Vec<_>>().join(",");
            return differs(
                MODULES,
                format!("{text:?}"),
                format!("{}: {shown}", counted(self.layers.len(), "layer")),
            );
        }
        Ok(())
    }

    /// Name and revision of the model underneath, as the folder gives them.
    #[must_use]
    pub fn base(&self) -> NamedBase<'_> {
        NamedBase { name: self.config.base.as_deref(), revision: self.config.revision.as_deref() }
    }

    /// `adapter_config.json` for a base of this name.
    #[must_use]
    pub fn to_json(&self, base: &str) -> serde_json::Value {
        self.config.to_json(base, target_modules(&self.layers, &self.modules))
    }

    /// `scale B A`, the update of the weight of this name; `None` if it has no adapter. `find` returns a tensor by name.
    pub fn update_of(&self, weight: &str, find: &dyn Fn(&str) -> Option<Tensor>) -> Option<Tensor> {
        let name = weight.strip_suffix(".weight")?;
        let layer = self.layers.iter().find(|layer| layer.name == name)?;
        let [a, b] = tensor_names(name);
        Some(find(&b)?.matmul(&find(&a)?) * layer.scale)
    }

    /// Names of all tensors of the adapters.
    #[must_use]
    pub fn tensor_names(&self) -> Vec<String> {
        self.layers.iter().flat_map(|layer| tensor_names(&layer.name)).collect()
    }
}

const MODULES: &str = "lora_trainable_modules";

/// PEFT's names of the two matrices of a layer.
fn tensor_names(layer: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|matrix| format!("base_model.model.{layer}.{matrix}.weight"))
}

fn in_key(key: &str, fault: Fault) -> Fault {
    Fault { message: format!("{key}: {}", fault.message), ..fault }
}

/// Target modules that the run's configuration asks for. Fails if a name matches no layer.
fn targets(config: &RunConfig, modules: &Modules) -> Result<Targets, Fault> {
    match config.lora_modules()? {
        LoraModules::AllLinear => Ok(Targets::AllLinear),
        LoraModules::Names(names) => check_names(MODULES, &names, modules).map(|()| Targets::Names(names)),
        LoraModules::Pattern(text) => match PythonRegex::whole(&text) {
            Ok(pattern) => Ok(Targets::Pattern(pattern)),
            Err(reason) => Err(Fault::input(format!(
                "config key `{MODULES}`: the regular expression {text:?} is not supported: {reason}"
            ))
            .hint("write all-linear, or names with commas between them: q_proj,v_proj")),
        },
    }
}

/// The run's dropout. Warns if no dropout is set and the adapter was trained with another one.
fn dropout(config: &RunConfig, adapter: &AdapterConfig) -> f64 {
    let own = config.lora_dropout();
    if config.lora_dropout.is_none() && adapter.lora_dropout != own {
        tracing::warn!(
            "the adapter was trained with lora_dropout = {}; this run trains with {own}, as no lora_dropout is set",
            adapter.lora_dropout
        );
    }
    own
}

/// The modules of a model as PEFT names them.
fn modules(model: &mut Model) -> Modules {
    let layers = model.layers.len();
    let parts = model.layers.first_mut().map(|layer| layer.parts()).unwrap_or_default();
    let names = |linear: bool| -> Vec<&'static str> {
        let chosen = parts.iter().filter(|(_, part)| matches!(part, Part::Linear(_)) == linear);
        chosen.map(|(name, _)| *name).collect()
    };
    Modules::of_decoder(layers, &names(true), &names(false))
}

/// Puts the float32 adapters of a PEFT folder onto a model.
pub fn attach_folder(model: &mut Model, dir: &Path) -> Result<Adapters, Fault> {
    let adapters = Adapters::of_folder(dir, modules(model))?;
    attach(model, &adapters, 0, &Reading::default())?;
    Ok(adapters)
}

/// Puts float32 adapters on the chosen layers: those of the start folder, or fresh ones (A uniform as PEFT draws it, B zero).
pub fn attach(model: &mut Model, adapters: &Adapters, seed: u64, reading: &Reading) -> Result<(), Fault> {
    let wanted = Wanted::Adapter { names: adapters.tensor_names() };
    let start = adapters.start.as_ref().map(|dir| Weights::claim(dir, &wanted, reading)).transpose()?;
    let device = model.place.device;
    let chosen: HashMap<&str, &Adapted> =
        adapters.layers.iter().map(|layer| (layer.name.as_str(), layer)).collect();
    // Drawn on the CPU for every device, so that all ranks and machines start with the same values.
    tch::manual_seed(seed as i64);
    for (index, layer) in model.layers.iter_mut().enumerate() {
        for (name, part) in layer.parts() {
            let Part::Linear(linear) = part else { continue };
            let Some(Adapted { name, rank, scale }) =
                chosen.get(format!("model.layers.{index}.{name}").as_str())
            else {
                continue;
            };
            let (outputs, inputs) = (linear.weight.size()[0], linear.weight.size()[1]);
            let (a, b) = match &start {
                Some(weights) => {
                    let [a, b] = tensor_names(name);
                    (weights.tensor(&a, &[*rank, inputs])?, weights.tensor(&b, &[outputs, *rank])?)
                }
                None if reading.shapes_alone => {
                    let of =
                        |shape: [i64; 2]| Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false);
                    (of([*rank, inputs]), of([outputs, *rank]))
                }
                None => fresh(*rank, inputs, outputs),
            };
            let place = |tensor: Tensor| match reading.shapes_alone {
                true => tensor,
                false => tensor.to_kind(Kind::Float).to_device(device),
            };
            let dropout = adapters.config.lora_dropout;
            linear.adapter = Some(Adapter { a: place(a), b: place(b), scale: *scale, dropout });
        }
    }
    Ok(())
}

/// A: Kaiming uniform with a = sqrt(5), which is uniform within 1/sqrt(in); B: zero, so that training starts at the base model.
fn fresh(r: i64, inputs: i64, outputs: i64) -> (Tensor, Tensor) {
    let options = (Kind::Float, Device::Cpu);
    let bound = 1.0 / (inputs as f64).sqrt();
    let mut a = Tensor::empty([r, inputs], options);
    let _ = a.uniform_(-bound, bound);
    (a, Tensor::zeros([outputs, r], options))
}

/// The adapters' tensors by layer with PEFT's names.
pub fn named_tensors(model: &mut Model) -> Vec<Vec<Named<'_>>> {
    let layers = model.layers.iter_mut().enumerate().map(|(index, layer)| {
        let mut named: Vec<Named<'_>> = Vec::new();
        for (name, part) in layer.parts() {
            let Part::Linear(linear) = part else { continue };
            let Some(adapter) = linear.adapter.as_mut() else { continue };
            let [a, b] = tensor_names(&format!("model.layers.{index}.{name}"));
            named.push((a, &mut adapter.a));
            named.push((b, &mut adapter.b));
        }
        named
    });
    layers.collect()
}

/// The reference of a run that continues an adapter: the same base with a frozen copy of the adapter.
#[must_use]
pub fn frozen_reference(model: &mut Model) -> Model {
    let mut reference = model.share();
    let kind = model.place.kind;
    for (layer, frozen) in model.layers.iter_mut().zip(&mut reference.layers) {
        for ((_, part), (_, target)) in layer.parts().into_iter().zip(frozen.parts()) {
            if let (Part::Linear(linear), Part::Linear(target)) = (part, target) {
                target.adapter = linear.adapter.as_ref().map(|adapter| Adapter {
                    a: adapter.a.detach().copy().to_kind(kind),
                    b: adapter.b.detach().copy().to_kind(kind),
                    ..*adapter
                });
            }
        }
    }
    reference
}

/// Casts frozen adapters to the precision of the passes.
pub fn cast(model: &mut Model) {
    let kind = model.place.kind;
    for (_, part) in model.layers.iter_mut().flat_map(|layer| layer.parts()) {
        if let Part::Linear(Linear { adapter: Some(adapter), .. }) = part {
            (adapter.a, adapter.b) = (adapter.a.to_kind(kind), adapter.b.to_kind(kind));
        }
    }
}
