//! One optimizer step, layer by layer.
//!
//! Each decoder layer runs on a detached input and keeps a graph of its own; the walk back hands each layer the gradient of
//! its output. When the lowest unit of a bucket is done in the step's last micro-batch, the bucket's all-reduce starts while
//! lower layers still compute. Embedding and head have their gradients in closed form.
//!
//! - E-1: the loss is a sum over pairs divided by the number of pairs of *all* ranks and micro-batches, so that neither the
//!   world size nor the split into micro-batches changes the step.
//! - E-2: every rank issues one all-reduce per bucket and step, in bucket order, also when it has no pairs.

use std::sync::Arc;

use dyad_data::tokenize::Tokenized;
use dyad_proto::run_config::TrainingMethod;
use dyad_proto::wire::{PreferenceSums, ReferenceLogps};
use dyad_proto::{ErrorCode, Fault, RunConfig};
use tch::{Device, Kind, Tensor};

use crate::batch::{Layout, MicroBatch, TokenCounts, micro_batches};
use crate::comm::{CommError, Communicator, Pending};
use crate::ext::{TorchError, grad};
use crate::head::{HeadGradients, Reference, Scorer, Scores, score_batch, sequence_logps};
use crate::loss::{Objective, STATISTICS};
use crate::model::Model;
use crate::model::blocks::{Pass, Rotary};
use crate::model::fused::accumulate;
use crate::optimizer::Optimizer;
use crate::parameters::Parameters;
use crate::profile::recorder::Span;
use crate::profile::summary::STEP;
use crate::timing::Phases;

/// Everything that trains on this rank.
#[derive(Debug)]
pub struct Engine {
    /// The model being trained.
    pub policy: Model,
    /// The frozen model that DPO holds against it.
    pub reference: Option<Model>,
    /// Trainable parameters of the policy.
    pub parameters: Parameters,
    communicator: Arc<dyn Communicator>,
    optimizer: Optimizer,
    settings: Settings,
}

/// What the engine needs of the run's configuration.
#[derive(Clone, Copy, Debug)]
struct Settings {
    method: TrainingMethod,
    loss_type: dyad_proto::run_config::LossType,
    beta: f64,
    layout: Layout,
    micro_batch_tokens: usize,
    checkpointing: bool,
    seed: u64,
    dropout: bool,
    /// The reference model is gone; its scores come with the pairs.
    compares_with_known: bool,
}

/// Micro-batches of a forward pass alone are so many times larger.
const REFERENCE_BATCH: usize = 4;

/// This rank's share of a step.
#[derive(Clone, Debug)]
pub struct Share {
    /// Number of the step, from 1.
    pub step: u64,
    /// Pairs of this rank.
    pub pairs: Vec<Tokenized>,
    /// What the reference model says of each, where that is known.
    pub references: Vec<Option<ReferenceLogps>>,
    /// Pairs over all ranks.
    pub global_pairs: u64,
    /// Completion tokens of the chosen sides over all ranks.
    pub global_chosen_tokens: u64,
    /// Learning rate of the step.
    pub learning_rate: f64,
}

/// What a step found.
#[derive(Debug)]
pub struct StepResult {
    /// This rank's sums.
    pub sums: PreferenceSums,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Seconds by phase.
    pub phases: Phases,
    /// Tokens of this rank's passes.
    pub tokens: TokenCounts,
    /// What the reference model said of each pair, where it was asked.
    pub references: Vec<Option<ReferenceLogps>>,
}

/// A step failed in libtorch or between the ranks.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] TorchError),
    /// The reference model has been freed, and a pair came without its scores.
    #[error("a pair came without reference log-probabilities after the reference model was freed")]
    NoReference,
    /// A collective broke; the cause is most likely elsewhere.
    #[error(transparent)]
    Communicator(#[from] CommError),
}

impl From<EngineError> for Fault {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Torch(_) | EngineError::NoReference => Self::failed(error.to_string()),
            EngineError::Communicator(_) => Self::new(ErrorCode::Echo, error.to_string())
                .hint("another trainer went away, or the network between the hosts broke"),
        }
    }
}

/// What the micro-batches of a step add up to.
#[derive(Debug)]
struct Tally {
    /// Sums of [`crate::loss`].
    statistics: Tensor,
    /// Completion tokens that the reference model was run on.
    kl_tokens: u64,
    tokens: TokenCounts,
    /// What the reference model said of each pair, where it was asked.
    references: Vec<Option<ReferenceLogps>>,
}

/// One micro-batch's way forward: what the walk back needs.
struct Tape {
    /// Input of each layer, a leaf.
    inputs: Vec<Tensor>,
    /// Output of each layer with its graph; absent where it is recomputed.
    outputs: Vec<Option<Tensor>>,
    /// Output of the last layer.
    last: Tensor,
    /// Positions of its tokens.
    rotary: Rotary,
}

impl Engine {
    /// Puts the parts together.
    #[must_use]
    pub fn new(
        policy: Model,
        reference: Option<Model>,
        parameters: Parameters,
        communicator: Arc<dyn Communicator>,
        config: &RunConfig,
    ) -> Self {
        let settings = Settings {
            method: config.training_method,
            loss_type: config.loss_type,
            beta: config.dpo_beta,
            layout: Layout::of(config),
            micro_batch_tokens: config.micro_batch_tokens as usize,
            checkpointing: config.activation_checkpointing,
            seed: config.random_seed,
            dropout: config.lora && config.lora_dropout > 0.0,
            compares_with_known: false,
        };
        Self { policy, reference, parameters, communicator, optimizer: Optimizer::new(config), settings }
    }

    /// Forward, backward, reduce, clip, update.
    pub fn train_step(&mut self, share: &Share) -> Result<StepResult, EngineError> {
        let _span = Span::enter(STEP);
        let mut phases = Phases::default();
        let mut tally = self.no_tally();
        phases.measure("zero_grad", || self.parameters.zero_grad());
        if self.settings.dropout {
            // The same step draws the same masks after a resume; ranks differ because their pairs do.
            let stream = share.step * self.communicator.world_size() as u64 + self.communicator.rank() as u64;
            tch::manual_seed((self.settings.seed ^ (stream << 20)) as i64);
        }
        let batches = micro_batches(&share.pairs, self.settings.layout, self.settings.micro_batch_tokens);
        let mut reductions = Vec::new();
        let mut references = &share.references[..];
        for (index, pairs) in batches.iter().enumerate() {
            let last = index + 1 == batches.len();
            let (known, rest) = references.split_at(pairs.len());
            references = rest;
            let work = MicroStep { pairs, known, objective: self.objective(share) };
            self.micro_step(&work, last.then_some(&mut reductions), &mut phases, &mut tally)?;
        }
        if batches.is_empty() {
            for bucket in 0..self.parameters.buckets.len() {
                reductions.push(self.reduce(bucket)?);
            }
        }
        phases.measure("all_reduce_wait", || reductions.into_iter().flatten().try_for_each(Pending::wait))?;
        let grad_norm = phases.measure("optimizer", || {
            self.optimizer.step(&mut self.parameters, share.step, share.learning_rate)
        })?;
        let sums = sums(&tally, &share.pairs, self.settings.method);
        Ok(StepResult { sums, grad_norm, phases, tokens: tally.tokens, references: tally.references })
    }

    /// Scores pairs without learning from them.
    pub fn evaluate(
        &self,
        pairs: &[Tokenized],
        references: &[Option<ReferenceLogps>],
    ) -> Result<PreferenceSums, EngineError> {
        let mut tally = self.no_tally();
        let mut references = references;
        for micro in micro_batches(pairs, self.settings.layout, self.settings.micro_batch_tokens) {
            let (known, rest) = references.split_at(micro.len());
            references = rest;
            let batch = MicroBatch::pack(&micro, self.settings.layout, self.device());
            let reference = self.reference_side(&batch, known)?;
            let rows = self.policy.score_rows(&batch);
            let policy = Scorer { rows: &rows, weight: self.policy.head() };
            let scores =
                score_batch(&batch, self.objective_of(1.0, 1.0), policy, self.scored_by(&reference), None);
            tally.add(&scores, &reference, &micro);
        }
        Ok(sums(&tally, pairs, self.settings.method))
    }

    /// What the reference model says of pairs, before it is freed.
    pub fn score_references(&self, pairs: &[Tokenized]) -> Result<Vec<ReferenceLogps>, EngineError> {
        let model = self.reference.as_ref().ok_or(EngineError::NoReference)?;
        let mut references = Vec::new();
        // Nothing is kept for a backward pass, so larger micro-batches fit.
        let budget = REFERENCE_BATCH * self.settings.micro_batch_tokens;
        for micro in micro_batches(pairs, self.settings.layout, budget) {
            let batch = MicroBatch::pack(&micro, self.settings.layout, self.device());
            let rows = model.score_rows(&batch);
            references.extend(by_pair(&sequence_logps(&batch, Scorer { rows: &rows, weight: model.head() })));
        }
        Ok(references)
    }

    /// Frees the reference model; from here on every pair must come with its scores.
    pub fn release_reference(&mut self) {
        self.reference = None;
        self.settings.compares_with_known = self.settings.method == TrainingMethod::Dpo;
    }

    /// The reference's part in a micro-batch: what is known of every pair, or else its rows.
    fn reference_side(
        &self,
        batch: &MicroBatch,
        known: &[Option<ReferenceLogps>],
    ) -> Result<ReferenceSide, EngineError> {
        let all: Option<Vec<ReferenceLogps>> = known.iter().copied().collect();
        match (all, &self.reference) {
            (Some(known), _) if self.settings.method == TrainingMethod::Dpo => {
                let interleaved: Vec<f64> =
                    known.iter().flat_map(|logps| [logps.chosen, logps.rejected]).collect();
                Ok(ReferenceSide::Known(Tensor::from_slice(&interleaved).to_device(self.device())))
            }
            (_, Some(model)) => Ok(ReferenceSide::Rows(model.score_rows(batch))),
            (_, None) if self.settings.compares_with_known => Err(EngineError::NoReference),
            (_, None) => Ok(ReferenceSide::Absent),
        }
    }

    fn scored_by<'a>(&'a self, side: &'a ReferenceSide) -> Reference<'a> {
        match (side, &self.reference) {
            (ReferenceSide::Known(logps), _) => Reference::Known(logps),
            (ReferenceSide::Rows(rows), Some(model)) => {
                Reference::Model(Scorer { rows, weight: model.head() })
            }
            (ReferenceSide::Rows(_), None) | (ReferenceSide::Absent, _) => Reference::Absent,
        }
    }

    fn device(&self) -> Device {
        self.policy.place.device
    }

    fn no_tally(&self) -> Tally {
        let statistics = Tensor::zeros([STATISTICS as i64], (Kind::Double, self.device()));
        Tally { statistics, kl_tokens: 0, tokens: TokenCounts::default(), references: Vec::new() }
    }

    fn objective(&self, share: &Share) -> Objective {
        self.objective_of(share.global_pairs as f64, share.global_chosen_tokens as f64)
    }

    fn objective_of(&self, global_pairs: f64, global_tokens: f64) -> Objective {
        match self.settings.method {
            TrainingMethod::Dpo => Objective::Preference {
                loss_type: self.settings.loss_type,
                beta: self.settings.beta,
                global_pairs,
            },
            TrainingMethod::Sft => Objective::Likelihood { global_tokens },
        }
    }

    /// Adds one micro-batch's gradients; in the last one, starts each bucket's reduction as it completes.
    fn micro_step(
        &mut self,
        work: &MicroStep<'_>,
        reductions: Option<&mut Vec<Option<Box<dyn Pending>>>>,
        phases: &mut Phases,
        tally: &mut Tally,
    ) -> Result<(), EngineError> {
        let batch = MicroBatch::pack(work.pairs, self.settings.layout, self.device());
        let reference = phases.measure("forward_reference", || self.reference_side(&batch, work.known))?;
        let tape = phases.measure("forward_policy", || self.forward(&batch));
        let (scores, last_grad) =
            phases.measure("head", || self.head(&batch, work.objective, &tape.last, &reference))?;
        tally.add(&scores, &reference, work.pairs);
        tally.tokens += TokenCounts::of(work.pairs, self.settings.layout);
        phases.measure("backward", || self.backward(&batch, tape, last_grad, reductions))
    }

    fn forward(&self, batch: &MicroBatch) -> Tape {
        let rotary = self.policy.rotary(&batch.positions);
        let pass = Pass { segments: &batch.segments, rotary: &rotary, training: true };
        let mut hidden = self.policy.embed(&batch.tokens);
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for (index, layer) in self.policy.layers.iter().enumerate() {
            // Below the lowest trainable unit nobody asks for a gradient.
            let needs_grad = (0..=index).any(|unit| !self.parameters.units[unit].is_empty());
            let input = hidden.detach().set_requires_grad(needs_grad);
            let output = match self.settings.checkpointing {
                true => tch::no_grad(|| layer.forward(&input, &pass)),
                false => layer.forward(&input, &pass),
            };
            hidden = output.detach();
            inputs.push(input);
            outputs.push((!self.settings.checkpointing).then_some(output));
        }
        Tape { inputs, outputs, last: hidden, rotary }
    }

    /// Scores the batch; returns the statistics and the gradient of the last layer's output.
    fn head(
        &mut self,
        batch: &MicroBatch,
        objective: Objective,
        last: &Tensor,
        reference: &ReferenceSide,
    ) -> Result<(Scores, Tensor), EngineError> {
        let last = last.detach().set_requires_grad(true);
        let rows = self.policy.normed_rows(&last, &batch.rows);
        let flat_rows = rows.detach();
        let top = self.parameters.units.len() - 1;
        let head_unit = if self.policy.untied_head.is_some() { top } else { 0 };
        // The head is the last parameter of its unit: alone in the embedding's, after the norm in the top one.
        let weight = self.parameters.units[head_unit].last().map(|parameter| &parameter.grad);
        let mut gradients = HeadGradients { rows: flat_rows.empty_like(), weight };
        let policy = Scorer { rows: &flat_rows, weight: self.policy.head() };
        let scores = score_batch(batch, objective, policy, self.scored_by(reference), Some(&mut gradients));
        let norm = self.parameters.units[top].first();
        let inputs: Vec<&Tensor> = [&last].into_iter().chain(norm.map(|parameter| &parameter.leaf)).collect();
        let mut result = grad(&[&rows], &[&gradients.rows], &inputs)?;
        if let (Some(norm), Some(Some(norm_grad))) = (norm, result.get(1)) {
            accumulate(&norm.grad, norm_grad);
        }
        Ok((scores, result.swap_remove(0).unwrap_or_else(|| last.zeros_like())))
    }

    fn backward(
        &mut self,
        batch: &MicroBatch,
        mut tape: Tape,
        last_grad: Tensor,
        mut reductions: Option<&mut Vec<Option<Box<dyn Pending>>>>,
    ) -> Result<(), EngineError> {
        let pass = Pass { segments: &batch.segments, rotary: &tape.rotary, training: true };
        let mut output_grad = Some(last_grad);
        let top = self.parameters.units.len() - 1;
        self.complete(top, reductions.as_deref_mut())?;
        for index in (0..self.policy.layers.len()).rev() {
            // Popped, so that a layer's activations are freed as soon as it is done.
            if let (Some(input), Some(kept)) = (tape.inputs.pop(), tape.outputs.pop())
                && let Some(gradient) =
                    output_grad.take().filter(|_| input.requires_grad() || self.trains(index + 1))
            {
                let output = kept.unwrap_or_else(|| self.policy.layers[index].forward(&input, &pass));
                output_grad = self.layer_backward(index + 1, &input, &output, &gradient)?;
            }
            self.complete(index + 1, reductions.as_deref_mut())?;
        }
        if let (Some(gradient), Some(embedding)) = (output_grad, self.parameters.units[0].first()) {
            let mut total = embedding.grad.shallow_clone();
            let _ = tch::no_grad(|| total.index_add_(0, &batch.tokens, &gradient.to_kind(Kind::Float)));
        }
        self.complete(0, reductions)
    }

    fn trains(&self, unit: usize) -> bool {
        !self.parameters.units[unit].is_empty()
    }

    /// Adds one layer's parameter gradients to its bucket and returns the gradient of its input.
    fn layer_backward(
        &self,
        unit: usize,
        input: &Tensor,
        output: &Tensor,
        output_grad: &Tensor,
    ) -> Result<Option<Tensor>, EngineError> {
        let parameters = &self.parameters.units[unit];
        let mut wanted: Vec<&Tensor> = parameters.iter().map(|parameter| &parameter.leaf).collect();
        if input.requires_grad() {
            wanted.push(input);
        }
        let mut gradients = grad(&[output], &[output_grad], &wanted)?;
        let input_grad = if input.requires_grad() { gradients.pop().flatten() } else { None };
        for (parameter, gradient) in parameters.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                accumulate(&parameter.grad, &gradient);
            }
        }
        Ok(input_grad)
    }

    /// Starts the reduction of the bucket that this unit completes, in the step's last micro-batch.
    fn complete(
        &self,
        unit: usize,
        reductions: Option<&mut Vec<Option<Box<dyn Pending>>>>,
    ) -> Result<(), EngineError> {
        let Some(reductions) = reductions else { return Ok(()) };
        if let Some(bucket) = self.parameters.buckets.iter().position(|bucket| bucket.units.start == unit) {
            reductions.push(self.reduce(bucket)?);
        }
        Ok(())
    }

    fn reduce(&self, bucket: usize) -> Result<Option<Box<dyn Pending>>, CommError> {
        if self.communicator.world_size() == 1 {
            return Ok(None);
        }
        self.communicator.all_reduce(&self.parameters.buckets[bucket].grad).map(Some)
    }
}

/// One micro-batch of a step.
struct MicroStep<'a> {
    pairs: &'a [&'a Tokenized],
    known: &'a [Option<ReferenceLogps>],
    objective: Objective,
}

/// What a micro-batch is compared with.
#[derive(Debug)]
enum ReferenceSide {
    Absent,
    /// Rows of the reference model, ready for its head.
    Rows(Tensor),
    /// Log-probabilities from before. `[sequences]`
    Known(Tensor),
}

impl Tally {
    fn add(&mut self, scores: &Scores, reference: &ReferenceSide, pairs: &[&Tokenized]) {
        self.statistics += &scores.statistics;
        if matches!(reference, ReferenceSide::Rows(_)) {
            self.kl_tokens +=
                pairs.iter().map(|pair| (pair.chosen.len() + pair.rejected.len()) as u64).sum::<u64>();
        }
        match &scores.reference_logps {
            Some(logps) => self.references.extend(by_pair(logps).into_iter().map(Some)),
            None => self.references.extend(pairs.iter().map(|_| None)),
        }
    }
}

/// Interleaved log-probabilities, chosen and rejected, by pair. Waits for the device.
fn by_pair(logps: &Tensor) -> Vec<ReferenceLogps> {
    let values = Vec::<f64>::try_from(logps.to_device(Device::Cpu)).unwrap_or_default();
    let pairs = values.chunks_exact(2);
    pairs.map(|pair| ReferenceLogps { chosen: pair[0], rejected: pair[1] }).collect()
}

/// Reads the device's statistics once and adds what the host knows.
fn sums(tally: &Tally, pairs: &[Tokenized], method: TrainingMethod) -> PreferenceSums {
    let statistics = tally.statistics.to_device(Device::Cpu);
    let values: Vec<f64> = Vec::<f64>::try_from(statistics).unwrap_or_default();
    let value = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let count = |lengths: &dyn Fn(&Tokenized) -> usize| pairs.iter().map(lengths).sum::<usize>() as u64;
    let (completion_tokens, tokens) = match method {
        TrainingMethod::Dpo => (
            count(&|pair| pair.chosen.len() + pair.rejected.len()),
            count(&|pair| 2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len()),
        ),
        TrainingMethod::Sft => {
            (count(&|pair| pair.chosen.len()), count(&|pair| pair.prompt.len() + pair.chosen.len()))
        }
    };
    PreferenceSums {
        pairs: pairs.len() as u64,
        loss: value(0),
        rewards_chosen: value(1),
        rewards_rejected: value(2),
        rewards_correct: value(3) as u64,
        logps_chosen: value(4),
        logps_rejected: value(5),
        logps_correct: value(6) as u64,
        kl: value(7),
        completion_tokens,
        tokens,
        kl_tokens: tally.kl_tokens,
    }
}
