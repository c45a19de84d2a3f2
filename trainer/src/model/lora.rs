//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's conventions: initial values, names, merging. [`dyad_data::adapter`]
//! decides which layers have one, and with which rank and scale.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dyad_data::adapter::base::NamedBase;
use dyad_data::adapter::python_regex::PythonRegex;
use dyad_data::adapter::targets::{Adapted, Modules, Targets, check_effect, check_names, target_modules};
use dyad_data::adapter::{ADAPTER_CONFIG, AdapterConfig, Init};
use dyad_proto::run_config::LoraModules;
use dyad_proto::{Fault, RunConfig, counted};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::model::Model;
use crate::model::dora::{self, Dora};
use crate::model::layer::Part;
use crate::model::linear::{Adapter, Linear};
use crate::model::saved;
use crate::model::weights::names::{ADAPTER_PREFIX, EMBEDDING, FINAL_NORM, HEAD, MAGNITUDE};
use crate::model::weights::{Reading, Wanted, Weights};
use crate::zero::parameters::Named;
use dyad_torch::place::Place;

/// The adapters of a model, for training, generation, resuming and merging.
#[derive(Clone, Debug)]
pub struct Adapters {
    config: AdapterConfig,
    modules: Modules,
    layers: Vec<Adapted>,
    /// Base tensors that are trained whole.
    saved: Vec<String>,
    /// Adapter folder that the weights come from; `None` for new adapters.
    start: Option<PathBuf>,
}

impl Adapters {
    /// Adapters of a run: new ones, or those of the folder that it starts from.
    pub fn of_run(config: &RunConfig, start: Option<&Path>, model: &mut Model) -> Result<Self, Fault> {
        let adapters = if let Some(dir) = start {
            let mut adapters = Self::of_folder(dir, model)?;
            adapters.refuse_overridden(config, dir)?;
            adapters.config.lora_dropout = dropout(config, &adapters.config);
            adapters
        } else {
            let modules = modules(model);
            let (config, layers, saved) = asked(config, &modules)?;
            let saved = saved::tensors_of(&saved, model);
            Self { config, modules, layers, saved, start: None }
        };
        if config.merge_adapter && adapters.config.lora_bias {
            adapters.refuse_merge_without_biases(model)?;
        }
        Ok(adapters)
    }

    /// Adapters of a PEFT folder.
    fn of_folder(dir: &Path, model: &mut Model) -> Result<Self, Fault> {
        let modules = modules(model);
        let config = AdapterConfig::load(dir)?;
        let path = dir.join(ADAPTER_CONFIG);
        config.warnings.iter().for_each(|warning| tracing::warn!("{}: {warning}", path.display()));
        let in_file = |fault: Fault| in_key(&path.display().to_string(), fault);
        let layers = config.select(&modules).map_err(in_file)?;
        let saved = saved::tensors_of(&config.saved(&modules).map_err(in_file)?, model);
        Ok(Self { config, modules, layers, saved, start: Some(dir.to_owned()) })
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
        let flags = [
            ("use_rslora", config.use_rslora, own.use_rslora),
            ("use_dora", config.use_dora, own.use_dora),
            ("lora_bias", config.lora_bias, own.lora_bias),
        ];
        for (key, asked, found) in flags {
            if let Some(asked) = asked.filter(|asked| *asked != found) {
                return differs(key, asked.to_string(), found.to_string());
            }
        }
        let fields = config.adapter_fields()?;
        for (key, found) in
            [("rank_pattern", own.rank_pattern.to_json()), ("alpha_pattern", own.alpha_pattern.to_json())]
        {
            if let Some(asked) = fields.get(key).filter(|asked| !same_patterns(asked, &found)) {
                return differs(key, asked.to_string(), found.to_string());
            }
        }
        if let Some(asked) = config.modules_to_save.as_ref().filter(|asked| **asked != own.modules_to_save) {
            return differs("modules_to_save", format!("{asked:?}"), format!("{:?}", own.modules_to_save));
        }
        if let Some(way) = fields.get("init_lora_weights") {
            return differs("init_lora_weights", way.to_string(), "its weights already".to_owned());
        }
        self.refuse_other_layers(config, &fields, &differs)
    }

    /// The part of [`Self::refuse_overridden`] about the keys that choose layers.
    fn refuse_other_layers(
        &self,
        config: &RunConfig,
        fields: &Map<String, Value>,
        differs: &dyn Fn(&str, String, String) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let text = config.lora_trainable_modules.as_ref().map(|text| (MODULES, format!("{text:?}")));
        let others = ["exclude_modules", "layers_to_transform", "layers_pattern"].into_iter();
        let mut set =
            text.into_iter().chain(others.filter_map(|key| Some((key, fields.get(key)?.to_string()))));
        let Some((key, value)) = set.next() else { return Ok(()) };
        let (_, asked, _) = asked(config, &self.modules)?;
        if asked.iter().map(|layer| &layer.name).ne(self.layers.iter().map(|layer| &layer.name)) {
            let found = target_modules(&self.layers, &self.modules);
            let shown = found.iter().take(7).cloned().collect::<Vec<_>>().join(",");
            return differs(key, value, format!("{}: {shown}", counted(self.layers.len(), "layer")));
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

    /// The tensor of this name with its adapter merged into it, `None` if it has no adapter. `find` returns a tensor of the adapters by
    /// name.
    pub fn merged(&self, name: &str, own: &Tensor, find: &dyn Fn(&str) -> Option<Tensor>) -> Option<Tensor> {
        if self.saved.iter().any(|saved| saved == name) {
            return find(&saved::stored_name(name));
        }
        let (module, kind) = name.rsplit_once('.')?;
        let layer = self.layers.iter().find(|layer| layer.name == module)?;
        let part = |part: &str| find(&tensor_name(module, part));
        if kind == "bias" {
            return Some(own + part(BIAS)? * layer.scale);
        }
        let (a, b) = (part(A)?, part(B)?);
        let whole = own + b.matmul(&a) * layer.scale;
        let Some(magnitude) = part(MAGNITUDE) else { return Some(whole) };
        let adapted = dora::Adapted { weight: own, a: &a, b: &b, scale: layer.scale };
        let stretch = Dora::new(magnitude).stretch(adapted, Kind::Float);
        Some(&whole + &whole * stretch.unsqueeze(1))
    }

    /// Names of all tensors of the adapters.
    #[must_use]
    pub fn tensor_names(&self) -> Vec<String> {
        let adapters =
            self.layers.iter().flat_map(|layer| self.parts().map(move |part| tensor_name(&layer.name, part)));
        adapters.chain(self.saved.iter().map(|name| saved::stored_name(name))).collect()
    }

    /// Whether the head and the embedding of a tied model differ after training.
    #[must_use]
    pub fn unties_head(&self) -> bool {
        self.saved.iter().any(|name| name == HEAD || name == EMBEDDING)
    }

    /// What each adapted layer has.
    fn parts(&self) -> impl Iterator<Item = &'static str> {
        let bias = self.config.lora_bias.then_some(BIAS);
        let magnitude = self.config.use_dora.then_some(MAGNITUDE);
        [A, B].into_iter().chain(bias).chain(magnitude)
    }

    /// Fails if the merged model could not hold the adapters' biases.
    fn refuse_merge_without_biases(&self, model: &mut Model) -> Result<(), Fault> {
        for (index, layer) in model.layers.iter_mut().enumerate() {
            for (name, part) in layer.parts() {
                let name = format!("model.layers.{index}.{name}");
                let adapted = self.layers.iter().any(|layer| layer.name == name);
                if let Part::Linear(Linear { bias: None, .. }) = part
                    && adapted
                {
                    return Err(Fault::input(format!(
                        "merge_adapter is set, but {name} has no bias that could take the adapter's (lora_bias)"
                    ))
                    .hint("remove merge_adapter or lora_bias; PEFT refuses the merge as well"));
                }
            }
        }
        Ok(())
    }
}

const MODULES: &str = "lora_trainable_modules";

/// Ends of the names of an adapted layer's tensors.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const BIAS: &str = ".lora_B.bias";

/// PEFT's name of a tensor of an adapted layer.
fn tensor_name(layer: &str, part: &str) -> String {
    format!("{ADAPTER_PREFIX}{layer}{part}")
}

/// The adapter that the run's keys ask for, its layers, and the modules that are trained whole.
fn asked(config: &RunConfig, modules: &Modules) -> Result<(AdapterConfig, Vec<Adapted>, Vec<String>), Fault> {
    let targets = targets(config, modules)?;
    let mut keys = config.adapter_fields()?;
    keys.insert("r".into(), config.lora_r().into());
    keys.insert("lora_alpha".into(), config.lora_alpha().into());
    keys.insert("lora_dropout".into(), config.lora_dropout().into());
    let in_keys = |fault: Fault| {
        let fault = in_key("the configuration's keys of adapters", fault);
        if fault.hint.is_empty() { fault.hint("docs/config.md has the keys of adapters") } else { fault }
    };
    let asked = AdapterConfig::of_run(keys, targets).map_err(in_keys)?;
    let layers = asked.select(modules).map_err(|fault| in_key(MODULES, fault))?;
    check_effect(&asked, &layers, modules).map_err(in_keys)?;
    let saved = asked.saved(modules).map_err(in_keys)?;
    Ok((asked, layers, saved))
}

/// Whether two objects have the same patterns with the same numbers in the same order.
fn same_patterns(a: &Value, b: &Value) -> bool {
    let list = |patterns: &Value| -> Vec<(String, Option<f64>)> {
        let fields = patterns.as_object().into_iter().flatten();
        fields.map(|(pattern, value)| (pattern.clone(), value.as_f64())).collect()
    };
    list(a) == list(b)
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
    let adapters = Adapters::of_folder(dir, model)?;
    attach(model, &adapters, 0, &Reading::default(), None)?;
    Ok(adapters)
}

/// The folder of a model, from which new adapters take tensors.
#[derive(Clone, Copy, Debug)]
pub struct BaseFolder<'a> {
    /// Where it is.
    pub dir: &'a Path,
    /// True if this rank keeps only a part of the model's weights.
    pub sharded: bool,
}

/// Puts float32 adapters on the chosen layers, and float32 copies in the place of modules that are trained whole: those of the start
/// folder, or fresh ones, drawn as PEFT draws them. Fresh ones may need the base.
pub fn attach(
    model: &mut Model,
    adapters: &Adapters,
    seed: u64,
    reading: &Reading,
    base: Option<BaseFolder<'_>>,
) -> Result<(), Fault> {
    let source = AdapterSource::new(adapters, reading, base, model.untied_head.is_none())?;
    let place = model.place;
    let chosen: HashMap<&str, &Adapted> =
        adapters.layers.iter().map(|layer| (layer.name.as_str(), layer)).collect();
    // Drawn on the CPU for every device, so that all ranks and machines start with the same values.
    tch::manual_seed(seed as i64);
    for (index, layer) in model.layers.iter_mut().enumerate() {
        for (name, part) in layer.parts() {
            let Part::Linear(linear) = part else { continue };
            if let Some(layer) = chosen.get(format!("model.layers.{index}.{name}").as_str()) {
                linear.adapter = Some(source.adapter(layer, linear, place)?);
            }
        }
    }
    saved::replace(model, &adapters.saved, &|name, shape| source.saved(name, shape, place.device))
}

/// Where the tensors of adapters come from.
struct AdapterSource<'a> {
    adapters: &'a Adapters,
    /// The folder that the run starts from.
    start: Option<Weights>,
    /// Tensors of the base that new adapters need: copies of modules that are trained whole, and for new magnitudes the weights of the
    /// adapted layers, if this rank does not keep them whole.
    base: Option<Weights>,
    /// True if the head of the base is its embedding.
    tied: bool,
    shapes_alone: bool,
}

impl<'a> AdapterSource<'a> {
    fn new(
        adapters: &'a Adapters,
        reading: &Reading,
        base: Option<BaseFolder<'_>>,
        tied: bool,
    ) -> Result<Self, Fault> {
        let wanted = Wanted::Adapter { names: adapters.tensor_names() };
        let start = adapters.start.as_ref().map(|dir| Weights::claim(dir, &wanted, reading)).transpose()?;
        let norms = adapters.config.use_dora && base.is_some_and(|base| base.sharded);
        let adapted = adapters.layers.iter().filter(|_| norms).map(|layer| format!("{}.weight", layer.name));
        let copied = adapters.saved.iter().map(|name| stored_in_base(name, tied).to_owned());
        let mut names: Vec<String> = adapted.chain(copied).collect();
        names.sort();
        names.dedup();
        let again = Reading { again: true, digest: None, ..reading.clone() };
        let base = match base {
            Some(base) if start.is_none() && !names.is_empty() => {
                Some(Weights::claim(base.dir, &Wanted::Model { names, tied }, &again)?)
            }
            _ => None,
        };
        Ok(Self { adapters, start, base, tied, shapes_alone: reading.shapes_alone })
    }

    /// A module's tensor that is trained whole.
    fn saved(&self, name: &str, shape: &[i64], device: Device) -> Result<Tensor, Fault> {
        let tensor = match (&self.start, &self.base) {
            (Some(start), _) => start.tensor(&saved::stored_name(name), shape)?,
            (None, Some(base)) => base.tensor(stored_in_base(name, self.tied), shape)?,
            (None, None) => Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false),
        };
        Ok(match self.shapes_alone {
            true => tensor,
            false => tensor.to_kind(Kind::Float).to_device(device),
        })
    }

    fn adapter(&self, layer: &Adapted, linear: &Linear, place: Place) -> Result<Adapter, Fault> {
        let Adapted { name, rank, scale } = layer;
        let (outputs, inputs) = (linear.weight.size()[0], linear.weight.size()[1]);
        let config = &self.adapters.config;
        let fresh = Fresh { init: &config.init, rank: *rank };
        let tensor = |part: &str, shape: &[i64], fresh: &dyn Fn() -> Tensor| {
            let tensor = match &self.start {
                Some(weights) => weights.tensor(&tensor_name(name, part), shape)?,
                None if self.shapes_alone => {
                    Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
                }
                None => fresh(),
            };
            Ok::<_, Fault>(match self.shapes_alone {
                true => tensor,
                false => tensor.to_kind(Kind::Float).to_device(place.device),
            })
        };
        let a = tensor(A, &[*rank, inputs], &|| fresh.a(inputs))?;
        let b = tensor(B, &[outputs, *rank], &|| fresh.b(outputs))?;
        let bias = config.lora_bias.then(|| tensor(BIAS, &[outputs], &|| fresh.bias(outputs))).transpose()?;
        let dora = match (config.use_dora, &self.start) {
            (false, _) => None,
            (true, None) if !self.shapes_alone => {
                let weight = format!("{name}.weight");
                let whole = self.base.as_ref().filter(|base| base.contains(&weight));
                let whole = whole.map(|base| base.load(&weight, &[outputs, inputs], place)).transpose()?;
                let weight = whole.as_ref().unwrap_or(&linear.weight);
                let (a, b) = (a.to_kind(place.kind), b.to_kind(place.kind));
                Some(Dora::fresh(dora::Adapted { weight, a: &a, b: &b, scale: *scale }))
            }
            (true, _) => Some(Dora::new(tensor(MAGNITUDE, &[outputs], &|| b.select(1, 0))?)),
        };
        Ok(Adapter { a, b, bias, dora, scale: *scale, dropout: config.lora_dropout })
    }
}

/// New tensors of a layer, drawn as PEFT draws them. Kaiming's uniform distribution with a = sqrt(5) is uniform within 1/sqrt(inputs).
/// Where B is zero, training starts at the base model.
struct Fresh<'a> {
    init: &'a Init,
    rank: i64,
}

impl Fresh<'_> {
    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn a(&self, inputs: i64) -> Tensor {
        match self.init {
            Init::Gaussian => Tensor::randn([self.rank, inputs], Self::OPTIONS) / self.rank as f64,
            Init::Uniform | Init::NotZero | Init::Past(_) => Self::uniform(&[self.rank, inputs], inputs),
        }
    }

    fn b(&self, outputs: i64) -> Tensor {
        self.zero_or_uniform(&[outputs, self.rank])
    }

    fn bias(&self, outputs: i64) -> Tensor {
        self.zero_or_uniform(&[outputs])
    }

    fn zero_or_uniform(&self, shape: &[i64]) -> Tensor {
        match self.init {
            Init::NotZero => Self::uniform(shape, self.rank),
            Init::Uniform | Init::Gaussian | Init::Past(_) => Tensor::zeros(shape, Self::OPTIONS),
        }
    }

    fn uniform(shape: &[i64], inputs: i64) -> Tensor {
        let bound = 1.0 / (inputs as f64).sqrt();
        Tensor::empty(shape, Self::OPTIONS).uniform_(-bound, bound)
    }
}

/// Name in the base's files of a tensor that is copied.
fn stored_in_base(name: &str, tied: bool) -> &str {
    if tied && name == HEAD { EMBEDDING } else { name }
}

/// The tensors that a run with adapters trains, by unit, with PEFT's names.
pub fn named_tensors(model: &mut Model) -> Vec<Vec<Named<'_>>> {
    let Model { saved, embedding, layers, final_norm, untied_head, .. } = model;
    let whole = |name: &str| saved.iter().any(|saved| saved == name);
    let kept = |name: String, tensor| whole(&name).then(|| (saved::stored_name(&name), tensor));
    let mut units: Vec<Vec<Named<'_>>> = vec![kept(EMBEDDING.to_owned(), embedding).into_iter().collect()];
    for (index, layer) in layers.iter_mut().enumerate() {
        let mut named: Vec<Named<'_>> = Vec::new();
        for (name, part) in layer.parts() {
            let module = format!("model.layers.{index}.{name}");
            let of = |part: &str| tensor_name(&module, part);
            match part {
                Part::Norm(weight) => named.extend(kept(format!("{module}.weight"), weight)),
                Part::Linear(linear) => {
                    if let Some(adapter) = linear.adapter.as_mut() {
                        named.push((of(A), &mut adapter.a));
                        named.push((of(B), &mut adapter.b));
                        named.extend(adapter.bias.as_mut().map(|bias| (of(BIAS), bias)));
                        named.extend(adapter.dora.as_mut().map(|dora| (of(MAGNITUDE), &mut dora.magnitude)));
                    }
                    named.extend(kept(format!("{module}.weight"), &mut linear.weight));
                    named.extend(linear.bias.as_mut().and_then(|bias| kept(format!("{module}.bias"), bias)));
                }
            }
        }
        units.push(named);
    }
    let head = untied_head.as_mut().and_then(|head| kept(HEAD.to_owned(), head));
    units.push(kept(FINAL_NORM.to_owned(), final_norm).into_iter().chain(head).collect());
    units
}

/// Values per token that the magnitudes of a layer add to what its backward pass keeps.
pub fn stretched_values(model: &mut Model) -> i64 {
    let parts = model.layers.first_mut().map(|layer| layer.parts()).unwrap_or_default();
    let outputs = |part: &(&str, Part<'_>)| match &part.1 {
        Part::Linear(linear) => {
            let stretched = linear.adapter.as_ref().is_some_and(|adapter| adapter.dora.is_some());
            if stretched { linear.weight.size()[0] } else { 0 }
        }
        Part::Norm(_) => 0,
    };
    parts.iter().map(outputs).sum()
}

/// The reference of a run that continues an adapter: the same base with a frozen copy of the adapter.
#[must_use]
pub fn frozen_reference(model: &mut Model) -> Model {
    let mut reference = model.share();
    let kind = model.place.kind;
    for (layer, frozen) in model.layers.iter_mut().zip(&mut reference.layers) {
        for ((_, part), (_, target)) in layer.parts().into_iter().zip(frozen.parts()) {
            if let (Part::Linear(linear), Part::Linear(target)) = (part, target) {
                target.adapter = linear.adapter.as_ref().map(|adapter| adapter.frozen(kind));
            }
        }
    }
    saved::freeze(&mut reference, &model.saved);
    reference
}

/// Casts frozen adapters to the precision of the passes.
pub fn cast(model: &mut Model) {
    let kind = model.place.kind;
    for (_, part) in model.layers.iter_mut().flat_map(|layer| layer.parts()) {
        if let Part::Linear(Linear { adapter: Some(adapter), .. }) = part {
            *adapter = adapter.frozen(kind);
        }
    }
    let saved = model.saved.clone();
    saved::freeze(model, &saved);
}
