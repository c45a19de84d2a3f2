//! A decoder layer of any family: what it computes, its parts, and how it is loaded.

use std::fmt;

use dyad_families::ModelConfig;
use dyad_proto::Fault;
use dyad_torch::place::Place;
use tch::Tensor;

use super::linear::Linear;
use super::pass::Pass;
use super::weights::Weights;

/// One decoder layer of any family.
pub trait DecoderLayer: fmt::Debug {
    /// `[tokens, hidden]` -> `[tokens, hidden]`.
    fn forward(&self, hidden: &Tensor, pass: &Pass<'_>) -> LayerOutput;

    /// Every part with its Hugging Face name below the layer, in a fixed order.
    fn parts(&mut self) -> Vec<(&'static str, Part<'_>)>;

    /// Another layer over the same tensors, without adapters.
    fn share(&self) -> Box<dyn DecoderLayer>;
}

type LoadLayer = fn(&ModelConfig, &LayerSource<'_>) -> Result<Box<dyn DecoderLayer>, Fault>;

/// How layers of a family are named and loaded.
#[derive(Debug)]
pub(crate) struct Family {
    /// `model_type` of `config.json`; `dyad_families` reads the fields of the same name.
    pub model_type: &'static str,
    /// Names of a layer's tensors below the layer.
    pub tensor_names: fn(&ModelConfig) -> Vec<String>,
    /// Loads a layer.
    pub load_layer: LoadLayer,
}

/// Output of a layer.
#[derive(Debug)]
pub struct LayerOutput {
    /// `[tokens, hidden]`.
    pub hidden: Tensor,
    /// A term that the layer adds to the step's loss, e.g. that of a router: a scalar with its coefficient, divided as the step's loss
    /// is. `[]`
    pub aux_loss: Option<Tensor>,
}

impl From<Tensor> for LayerOutput {
    fn from(hidden: Tensor) -> Self {
        Self { hidden, aux_loss: None }
    }
}

/// A part of a layer that holds parameters.
#[derive(Debug)]
pub enum Part<'a> {
    /// A linear layer, e.g. `self_attn.q_proj`.
    Linear(&'a mut Linear),
    /// A norm's weight, e.g. `input_layernorm`.
    Norm(&'a mut Tensor),
}

/// Where one layer's tensors come from.
#[derive(Debug)]
pub struct LayerSource<'a> {
    /// The model's files.
    pub weights: &'a Weights,
    /// Which layer it is, from 0.
    pub index: usize,
    /// Precision and device of the tensors.
    pub place: Place,
}

impl LayerSource<'_> {
    /// Loads a tensor named below the layer.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, Fault> {
        self.weights.load(&format!("model.layers.{}.{name}", self.index), shape, self.place)
    }

    /// Loads a linear layer.
    pub fn linear(&self, name: &str, outputs: i64, inputs: i64, bias: bool) -> Result<Linear, Fault> {
        let weight = self.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[outputs])).transpose()?;
        Ok(Linear { weight, bias, adapter: None })
    }
}

/// Base tensors of one layer with their full names.
pub fn layer_tensors(index: usize, layer: &mut dyn DecoderLayer) -> Vec<(String, &mut Tensor)> {
    let mut named = Vec::new();
    for (name, part) in layer.parts() {
        let prefix = format!("model.layers.{index}.{name}");
        match part {
            Part::Norm(weight) => named.push((format!("{prefix}.weight"), weight)),
            Part::Linear(linear) => {
                named.push((format!("{prefix}.weight"), &mut linear.weight));
                named.extend(linear.bias.as_mut().map(|bias| (format!("{prefix}.bias"), bias)));
            }
        }
    }
    named
}
