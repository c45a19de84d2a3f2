//! Decoder-only language models, computed layer by layer without an autograd graph across layers.
//!
//! A family is one file, whose layers implement [`DecoderLayer`], and a line in [`family`]. Everything else (embedding, final norm, head,
//! adapters, gradients, checkpoints) works through that trait and the Hugging Face names it reports.
//!
//! - [`llama`], [`qwen2`]: the families. [`layer`]: the trait that they implement.
//! - [`attention`], [`mlp`], [`linear`], [`rotary`]: the parts of a layer. [`pass`]: the inputs that all layers of a pass share.
//! - [`moving_reference`]: a reference that follows the policy.
//! - [`lora`]: adapters; [`dora`]: their magnitudes; [`saved`]: modules that are trained whole beside them. [`weights`]: reading of model files.

pub mod attention;
pub mod dora;
mod family;
#[cfg(test)]
mod kernels_agree;
pub mod layer;
pub mod linear;
pub mod llama;
pub mod lora;
pub mod mlp;
pub mod moving_reference;
pub mod pass;
pub mod qwen2;
pub mod rotary;
pub mod saved;
pub mod weights;

use std::path::Path;
use std::rc::Rc;

use dyad_families::ModelConfig;
use dyad_proto::Fault;
use dyad_torch::comm::CommError;
use dyad_torch::ops::layer::rms_norm;
use dyad_torch::place::Place;
use tch::{Kind, Tensor};

use self::layer::{DecoderLayer, LayerSource, layer_tensors};
use self::pass::Pass;
use self::rotary::Rotary;
pub use self::weights::names::{EMBEDDING, FINAL_NORM, HEAD};
use self::weights::{Reading, Wanted, Weights};
use crate::batch::MicroBatch;
use crate::zero::parameters::Named;
use crate::zero::unit_weights::{GatheredWeights, Keep, Residence};

/// A language model: embedding, layers, final norm, head.
#[derive(Debug)]
pub struct Model {
    /// The model's `config.json`.
    pub config: ModelConfig,
    /// Precision of the passes and where they run.
    pub place: Place,
    /// `[vocab, hidden]`.
    pub embedding: Tensor,
    /// The decoder layers, first to last.
    pub layers: Vec<Box<dyn DecoderLayer>>,
    /// `[hidden]`.
    pub final_norm: Tensor,
    /// `[vocab, hidden]`; `None` if the embedding is also the head.
    pub untied_head: Option<Tensor>,
    /// Names of base tensors that are trained whole beside adapters. They are not those of the shared base.
    pub saved: Vec<String>,
    /// The buffers that hold the weights of its units. A unit without buffers holds its weights itself.
    pub residence: Residence,
}

/// Called with the tensors of each unit as soon as they are loaded; may replace them.
pub type TakeUnit<'a> = &'a mut dyn FnMut(usize, Vec<Named<'_>>);

impl Model {
    /// Loads a model folder in the given precision.
    pub fn load(dir: &Path, place: Place) -> Result<Self, Fault> {
        Self::load_units(dir, place, &Reading::default(), &mut |_, _| {})
    }

    /// Loads a model folder and gives each unit to `take`, so that a caller that copies tensors never holds two models at once.
    pub fn load_units(
        dir: &Path,
        place: Place,
        reading: &Reading,
        take: TakeUnit<'_>,
    ) -> Result<Self, Fault> {
        let config = ModelConfig::load(dir)?;
        if !reading.again {
            config.warnings.iter().for_each(|warning| tracing::warn!("{}: {warning}", dir.display()));
        }
        let family = family::of(&config)?;
        let weights = Weights::claim(dir, &wanted(&config)?, reading)?;
        let vocabulary = [config.vocab_size, config.hidden_size];
        let mut embedding = weights.load(EMBEDDING, &vocabulary, place)?;
        take(0, vec![(EMBEDDING.to_owned(), &mut embedding)]);
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            let source = LayerSource { weights: &weights, index, place };
            let mut layer = (family.load_layer)(&config, &source)?;
            take(index + 1, layer_tensors(index, layer.as_mut()));
            layers.push(layer);
        }
        let mut final_norm = weights.load(FINAL_NORM, &[config.hidden_size], place)?;
        // The files decide whether the head is tied: they are claimed without a head if it is the embedding.
        let mut untied_head =
            weights.contains(HEAD).then(|| weights.load(HEAD, &vocabulary, place)).transpose()?;
        take(layers.len() + 1, top_tensors(&mut final_norm, untied_head.as_mut()));
        let residence = Residence::of_units(layers.len() + 2);
        let saved = Vec::new();
        Ok(Self { embedding, layers, final_norm, untied_head, config, place, saved, residence })
    }

    /// Number of units: embedding, each layer, final norm with the untied head.
    #[must_use]
    pub fn unit_count(&self) -> usize {
        self.layers.len() + 2
    }

    /// Index of the unit with the final norm.
    #[must_use]
    pub fn top_unit(&self) -> usize {
        self.layers.len() + 1
    }

    /// Index of the unit with the head.
    #[must_use]
    pub fn head_unit(&self) -> usize {
        if self.untied_head.is_some() { self.top_unit() } else { 0 }
    }

    /// Gathers the weights of final norm and head. They stay until the result is dropped.
    pub fn gather_head(&self) -> Result<(GatheredWeights, GatheredWeights), CommError> {
        let top = self.residence.gather_unit(self.top_unit(), Some(self.head_unit()))?;
        Ok((top, self.residence.gather_unit(self.head_unit(), None)?))
    }

    /// The projection to the vocabulary, `[vocab, hidden]`.
    pub fn head(&self) -> &Tensor {
        self.untied_head.as_ref().unwrap_or(&self.embedding)
    }

    /// Another model over the same tensors, without adapters. Before adapters are attached it is the reference of a new LoRA run.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            config: self.config.clone(),
            place: self.place,
            embedding: self.embedding.shallow_clone(),
            layers: self.layers.iter().map(|layer| layer.share()).collect(),
            final_norm: self.final_norm.shallow_clone(),
            untied_head: self.untied_head.as_ref().map(Tensor::shallow_clone),
            saved: Vec::new(),
            residence: self.residence.clone(),
        }
    }

    /// A model of copied tensors: the frozen reference of full fine-tuning. It is sharded as the policy is; `keep` says whether it stays
    /// on the device or on the host.
    #[must_use]
    pub fn frozen_copy(&self, keep: Keep) -> Self {
        let mut copy = self.share();
        let mut residence = Residence::of_units(self.unit_count());
        for (flat, units) in self.residence.flats() {
            let mut tensors: Vec<&mut Tensor> = Vec::new();
            for (unit, named) in copy.units().into_iter().enumerate() {
                if units.contains(&unit) {
                    tensors.extend(named.into_iter().map(|(_, tensor)| tensor));
                }
            }
            let flat = Rc::new(flat.copy_for(&mut tensors, keep));
            units.iter().for_each(|&unit| residence.add(unit, &flat));
        }
        copy.residence = residence;
        copy
    }

    /// Every base tensor by unit, with its Hugging Face name.
    pub fn units(&mut self) -> Vec<Vec<Named<'_>>> {
        let mut units: Vec<Vec<Named<'_>>> = vec![vec![(EMBEDDING.to_owned(), &mut self.embedding)]];
        units.extend(
            self.layers.iter_mut().enumerate().map(|(index, layer)| layer_tensors(index, layer.as_mut())),
        );
        units.push(top_tensors(&mut self.final_norm, self.untied_head.as_mut()));
        units
    }

    /// Every base tensor with its Hugging Face name, in a fixed order: embedding, layers, final norm, head.
    pub fn named_tensors(&mut self) -> Vec<(String, &mut Tensor)> {
        self.units().into_iter().flatten().collect()
    }

    /// Rows of the embedding for packed tokens, `[tokens, hidden]`.
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        self.embedding.detach().index_select(0, tokens)
    }

    /// Rotary positions of packed tokens.
    #[must_use]
    pub fn rotary(&self, positions: &Tensor) -> Rotary {
        Rotary::new(&self.config, positions, self.place.kind)
    }

    /// Inputs of every layer for a micro-batch. The first model that passes over it computes the rotary positions.
    pub fn pass<'a>(&self, batch: &'a MicroBatch, training: bool) -> Pass<'a> {
        let rotary = batch.rotary.get_or_init(|| self.rotary(&batch.positions));
        Pass { segments: &batch.segments, varlen: batch.varlen.as_ref(), rotary, training }
    }

    /// Final norm of selected rows, ready for the head.
    pub fn normed_rows(&self, hidden: &Tensor, rows: &Tensor) -> Tensor {
        rms_norm(&hidden.index_select(0, rows), &self.final_norm, self.config.rms_norm_eps)
    }

    /// Hidden states that score the rows of a micro-batch, with no graph kept: `[rows, hidden]`.
    pub fn score_rows(&self, batch: &MicroBatch) -> Result<Tensor, CommError> {
        tch::no_grad(|| {
            let hidden = self.hidden_states(&batch.tokens, &self.pass(batch, false))?;
            let _top = self.residence.gather_unit(self.top_unit(), None)?;
            Ok(self.normed_rows(&hidden, &batch.rows))
        })
    }

    /// Output of the last layer, with no graph kept: `[tokens, hidden]`. For an empty batch, only helps gather the weights.
    pub fn hidden_states(&self, tokens: &Tensor, pass: &Pass<'_>) -> Result<Tensor, CommError> {
        tch::no_grad(|| {
            let embedding = self.residence.gather_unit(0, Some(1))?;
            let mut hidden = self.embed(tokens);
            drop(embedding);
            for (index, layer) in self.layers.iter().enumerate() {
                let _weights = self.residence.gather_unit(index + 1, Some(index + 2))?;
                if !pass.segments.is_empty() {
                    hidden = layer.forward(&hidden, pass).hidden;
                }
            }
            Ok(hidden)
        })
    }

    /// Number of base parameters.
    pub fn parameter_count(&mut self) -> u64 {
        self.named_tensors().iter().map(|(_, tensor)| tensor.numel() as u64).sum()
    }
}

fn top_tensors<'a>(final_norm: &'a mut Tensor, untied_head: Option<&'a mut Tensor>) -> Vec<Named<'a>> {
    let mut top = vec![(FINAL_NORM.to_owned(), final_norm)];
    top.extend(untied_head.map(|head| (HEAD.to_owned(), head)));
    top
}

/// Every tensor of a model, by its Hugging Face name.
fn wanted(config: &ModelConfig) -> Result<Wanted, Fault> {
    let below = (family::of(config)?.tensor_names)(config);
    let mut names = vec![EMBEDDING.to_owned(), FINAL_NORM.to_owned()];
    names.extend((!config.tie_word_embeddings).then(|| HEAD.to_owned()));
    let layers = 0..config.num_hidden_layers;
    names.extend(
        layers.flat_map(|index| below.iter().map(move |name| format!("model.layers.{index}.{name}"))),
    );
    Ok(Wanted::Model { names, tied: config.tie_word_embeddings })
}

/// The precision of this name in config.json; float32 for any other name.
#[must_use]
pub fn stored_kind(torch_dtype: &str) -> Kind {
    match torch_dtype {
        "bfloat16" => Kind::BFloat16,
        "float16" => Kind::Half,
        "float64" => Kind::Double,
        _ => Kind::Float,
    }
}
