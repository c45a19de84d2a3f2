//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in PEFT's conventions: which layers, initial values, names, merging.

use std::path::{Path, PathBuf};

use dyad_proto::{Fault, RunConfig};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::model::blocks::{Adapter, Linear};
use crate::model::weights::{Reading, Weights};
use crate::model::{Model, Part};
use crate::parameters::Named;

/// File that makes a folder a PEFT adapter.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Weights of a PEFT adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Shape of the adapters of a run.
#[derive(Clone, Debug)]
pub struct LoraSpec {
    /// Rank.
    pub r: i64,
    /// Scale numerator.
    pub alpha: f64,
    /// Dropout probability on the input.
    pub dropout: f64,
    /// Names of the adapted layers, e.g. `q_proj`; empty for all linear layers.
    pub modules: Vec<String>,
    /// Adapter folder to continue from.
    pub start: Option<PathBuf>,
}

/// `adapter_config.json`, the fields that matter here.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PeftConfig {
    /// Always `LORA`.
    pub peft_type: String,
    /// Rank.
    pub r: i64,
    /// Scale numerator.
    pub lora_alpha: f64,
    /// Dropout probability on the input.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Names of the adapted layers: a list, or one string.
    pub target_modules: serde_json::Value,
    /// The model underneath.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// Always `none`.
    #[serde(default = "none")]
    pub bias: String,
    /// Always `CAUSAL_LM`.
    #[serde(default)]
    pub task_type: Option<String>,
    /// Rank-stabilised scaling; not supported.
    #[serde(default)]
    pub use_rslora: bool,
    /// Weight-decomposed adapters; not supported.
    #[serde(default)]
    pub use_dora: bool,
    /// Saved for inference, as PEFT does.
    #[serde(default)]
    pub inference_mode: bool,
}

fn none() -> String {
    "none".into()
}

impl PeftConfig {
    /// Reads an adapter folder.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join(ADAPTER_CONFIG);
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Fault::input(format!("cannot read {}: {error}", path.display())))?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|error| Fault::input(format!("{}: {error}", path.display())))?;
        let unsupported = if config.peft_type != "LORA" {
            Some(format!("peft_type {}", config.peft_type))
        } else if config.use_rslora || config.use_dora {
            Some("rsLoRA or DoRA".into())
        } else if config.bias != "none" {
            Some(format!("bias \"{}\"", config.bias))
        } else {
            None
        };
        match unsupported {
            Some(what) => Err(Fault::input(format!("{}: {what} is not supported", path.display()))),
            None => Ok(config),
        }
    }
}

impl LoraSpec {
    /// From the run's configuration; an adapter folder to start from decides rank, scale and modules.
    pub fn new(config: &RunConfig, start: Option<&Path>) -> Result<Self, Fault> {
        if let Some(dir) = start {
            return Ok(Self {
                dropout: config.lora_dropout,
                ..Self::from_peft(&PeftConfig::load(dir)?, dir)
            });
        }
        let modules = match config.lora_trainable_modules.trim() {
            "all-linear" => Vec::new(),
            list => {
                list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
            }
        };
        Ok(Self {
            r: config.lora_r.into(),
            alpha: config.lora_alpha(),
            dropout: config.lora_dropout,
            modules,
            start: None,
        })
    }

    /// The adapters that a PEFT folder holds, without dropout.
    #[must_use]
    pub fn from_peft(peft: &PeftConfig, dir: &Path) -> Self {
        Self {
            r: peft.r,
            alpha: peft.lora_alpha,
            dropout: 0.0,
            modules: module_names(&peft.target_modules),
            start: Some(dir.to_owned()),
        }
    }

    /// What PEFT is told about these adapters; the modules are filled in when they are saved.
    #[must_use]
    pub fn peft_config(&self, base: &str) -> PeftConfig {
        PeftConfig {
            peft_type: "LORA".into(),
            r: self.r,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            target_modules: serde_json::Value::Null,
            base_model_name_or_path: Some(base.to_owned()),
            bias: none(),
            task_type: Some("CAUSAL_LM".into()),
            use_rslora: false,
            use_dora: false,
            inference_mode: true,
        }
    }

    fn adapts(&self, name: &str) -> bool {
        let short = name.rsplit('.').next().unwrap_or(name);
        self.modules.is_empty() || self.modules.iter().any(|module| module == short || module == name)
    }
}

fn module_names(value: &serde_json::Value) -> Vec<String> {
    match value {
        serde_json::Value::Array(names) => {
            names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
        }
        serde_json::Value::String(name) if name != "all-linear" => vec![name.clone()],
        _ => Vec::new(),
    }
}

/// Puts float32 adapters on the chosen layers: those of the start folder, or fresh ones (A uniform as PEFT draws it, B zero).
pub fn attach(model: &mut Model, spec: &LoraSpec, seed: u64, reading: &Reading) -> Result<(), Fault> {
    let start = spec
        .start
        .as_ref()
        .map(|dir| Weights::open_files_by(dir, vec![dir.join(ADAPTER_WEIGHTS)], reading))
        .transpose()?;
    let device = model.place.device;
    // Drawn on the CPU whatever the device, so that every rank and every machine starts alike.
    tch::manual_seed(seed as i64);
    let mut known = Vec::new();
    let mut adapted = 0;
    for (index, layer) in model.layers.iter_mut().enumerate() {
        for (name, part) in layer.parts() {
            let Part::Linear(linear) = part else { continue };
            known.push(name);
            if !spec.adapts(name) {
                continue;
            }
            let (outputs, inputs) = (linear.weight.size()[0], linear.weight.size()[1]);
            let (a, b) = match &start {
                Some(weights) => {
                    let stem = format!("base_model.model.model.layers.{index}.{name}");
                    (
                        weights.tensor(&format!("{stem}.lora_A.weight"), &[spec.r, inputs])?,
                        weights.tensor(&format!("{stem}.lora_B.weight"), &[outputs, spec.r])?,
                    )
                }
                None => fresh(spec.r, inputs, outputs),
            };
            let place = |tensor: Tensor| tensor.to_kind(Kind::Float).to_device(device);
            let scale = spec.alpha / spec.r as f64;
            linear.adapter = Some(Adapter { a: place(a), b: place(b), scale, dropout: spec.dropout });
            adapted += 1;
        }
    }
    if adapted == 0 {
        known.sort_unstable();
        known.dedup();
        return Err(Fault::input(format!("lora_trainable_modules {:?} match no linear layer", spec.modules))
            .hint(format!("layers of this model: {}", known.join(", "))));
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
            let stem = format!("base_model.model.model.layers.{index}.{name}");
            named.push((format!("{stem}.lora_A.weight"), &mut adapter.a));
            named.push((format!("{stem}.lora_B.weight"), &mut adapter.b));
        }
        named
    });
    layers.collect()
}

/// `scale B A`, what an adapter adds to the weight of this name; `find` gives its tensors by their names.
pub fn update_of(weight: &str, scale: f64, find: &dyn Fn(&str) -> Option<Tensor>) -> Option<Tensor> {
    let stem = format!("base_model.model.{}", weight.strip_suffix(".weight")?);
    let (a, b) = (find(&format!("{stem}.lora_A.weight"))?, find(&format!("{stem}.lora_B.weight"))?);
    Some(b.matmul(&a) * scale)
}

/// The reference of a run that continues an adapter: the same base, the adapter as it is now, frozen.
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

/// Brings adapters that are not trained to the precision of the passes.
pub fn cast(model: &mut Model) {
    let kind = model.place.kind;
    for (_, part) in model.layers.iter_mut().flat_map(|layer| layer.parts()) {
        if let Part::Linear(Linear { adapter: Some(adapter), .. }) = part {
            (adapter.a, adapter.b) = (adapter.a.to_kind(kind), adapter.b.to_kind(kind));
        }
    }
}

/// Names of the adapted layers, for `target_modules`.
pub fn adapted_modules(model: &mut Model) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (name, part) in model.layers.iter_mut().flat_map(|layer| layer.parts()) {
        if matches!(part, Part::Linear(linear) if linear.adapter.is_some()) {
            names.push(name.rsplit('.').next().unwrap_or(name).to_owned());
        }
    }
    names.sort();
    names.dedup();
    names
}
