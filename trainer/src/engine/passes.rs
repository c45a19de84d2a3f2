//! Forward and backward pass of one micro-batch, layer by layer.

use dyad_data::tokenized::Tokenized;
use dyad_proto::wire::ReferenceLogps;
use tch::{Kind, Tensor};

use super::Engine;
use super::reference::ReferenceSide;
use super::step_statistics::StepStatistics;
use crate::batch::{MicroBatch, TokenCounts};
use crate::error::EngineError;
use crate::model::layer::LayerOutput;
use crate::model::pass::Pass;
use crate::model::{EMBEDDING, FINAL_NORM, HEAD};
use crate::objective::head::{HeadGradients, Scorer, Scores, Scoring, score_batch};
use crate::objective::statistics::{DeviceSums, Statistic};
use crate::observe::timing::Phases;
use crate::zero::unit_weights::GatheredWeights;
use dyad_torch::autograd::{grad, grad_into};
use dyad_torch::ops::layer::accumulate;

/// One micro-batch of a step.
pub(super) struct MicroStep<'a> {
    pub(super) pairs: &'a [&'a Tokenized],
    pub(super) known: &'a [Option<ReferenceLogps>],
    /// The objective, or its results from a first pass, with which the statistics have been added up.
    pub(super) scoring: Scoring<'a>,
    /// True if some rank needs the reference model in this step.
    pub(super) visits_reference: bool,
    /// True for the last micro-batch of the step.
    pub(super) last: bool,
    /// Seed of the dropout masks.
    pub(super) masks: Option<u64>,
}

/// Results of a micro-batch's forward pass that its backward pass needs.
pub(super) struct Tape {
    /// Input of each layer, a leaf of its graph.
    inputs: Vec<Tensor>,
    /// Output of each layer with its graph; `None` where it is recomputed.
    outputs: Vec<Option<LayerOutput>>,
    /// Output of the last layer.
    pub(super) last: Tensor,
    /// Sum of the layers' own terms of the loss.
    aux_loss: Option<Tensor>,
    /// The embedding's weights, if the embedding is also the head.
    head: Option<GatheredWeights>,
    /// The last layer's weights, with which the backward pass begins.
    top_layer: Option<GatheredWeights>,
}

impl Engine {
    /// Adds one micro-batch's gradients; starts each bucket's reduction as it completes.
    pub(super) fn micro_step(
        &mut self,
        work: &MicroStep<'_>,
        phases: &mut Phases,
        totals: &mut StepStatistics,
    ) -> Result<(), EngineError> {
        let batch = MicroBatch::pack(work.pairs, self.settings.layout, self.device());
        let reference = match work.scoring {
            Scoring::Known(..) => ReferenceSide::Absent,
            Scoring::Objective(_) => phases.measure("forward_reference", || {
                self.reference_side(&batch, work.known, work.visits_reference)
            })?,
        };
        let mut tape = phases.measure("forward_policy", || self.forward(&batch, work.masks))?;
        let (scores, last_grad) =
            phases.measure("head", || self.head(&batch, work, &tape.last, &reference))?;
        tape.head = None;
        totals.add(&scores, &reference, work.pairs);
        if let Some(aux_loss) = tape.aux_loss.take() {
            totals.sums.add(&DeviceSums::of(&[(Statistic::AuxLoss, aux_loss)], self.device()));
        }
        if self.settings.keeps_references && matches!(work.scoring, Scoring::Objective(_)) {
            totals.keep_references(scores.reference_logps, work.pairs.len());
        }
        totals.tokens += TokenCounts::of(work.pairs, self.settings.layout);
        phases.measure("backward", || self.backward(&batch, work, tape, last_grad))
    }

    /// Runs a layer. Seeds the dropout masks, so that a recomputation draws the same ones.
    fn layer(&self, index: usize, input: &Tensor, pass: &Pass<'_>, masks: Option<u64>) -> LayerOutput {
        if let Some(seed) = masks {
            tch::manual_seed((seed ^ index as u64) as i64);
        }
        self.policy.layers[index].forward(input, pass)
    }

    pub(super) fn forward(&self, batch: &MicroBatch, masks: Option<u64>) -> Result<Tape, EngineError> {
        let pass = self.policy.pass(batch, true);
        let residence = &self.policy.residence;
        let embedding = residence.gather_unit(0, Some(1))?;
        let mut hidden = self.policy.embed(&batch.tokens);
        let head = (self.policy.head_unit() == 0).then_some(embedding);
        let (layers, mut top_layer) = (self.policy.layers.len(), None);
        let mut aux_loss: Option<Tensor> = None;
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for index in 0..layers {
            let weights = residence.gather_unit(index + 1, Some(index + 2))?;
            // Below the lowest trainable unit no gradient is needed.
            let needs_grad = (0..=index).any(|unit| self.trains(unit));
            let input = hidden.detach().set_requires_grad(needs_grad);
            let kept = index >= self.settings.first_uncheckpointed_layer && !batch.is_empty();
            let output = match (kept, batch.is_empty()) {
                (_, true) => input.shallow_clone().into(),
                (true, _) => self.layer(index, &input, &pass, masks),
                (false, _) => tch::no_grad(|| self.layer(index, &input, &pass, masks)),
            };
            hidden = output.hidden.detach();
            if let Some(term) = &output.aux_loss {
                let term = term.detach().to_kind(Kind::Double);
                aux_loss = Some(aux_loss.map_or_else(|| term.shallow_clone(), |sum| sum + &term));
            }
            inputs.push(input);
            outputs.push(kept.then_some(output));
            top_layer = (index + 1 == layers).then_some(weights);
        }
        Ok(Tape { inputs, outputs, last: hidden, aux_loss, head, top_layer })
    }

    /// Scores the batch; returns the statistics and the gradient of the last layer's output.
    fn head(
        &mut self,
        batch: &MicroBatch,
        work: &MicroStep<'_>,
        last: &Tensor,
        reference: &ReferenceSide,
    ) -> Result<(Scores, Tensor), EngineError> {
        let _heads = self.gather_heads(work.visits_reference)?;
        let (top, head_unit) = (self.policy.top_unit(), self.policy.head_unit());
        self.parameters.open(top)?;
        self.parameters.open(head_unit)?;
        let last = last.detach().set_requires_grad(true);
        if batch.is_empty() {
            return Ok((Scores::none(self.device()), last.zeros_like()));
        }
        let rows = self.policy.normed_rows(&last, &batch.rows);
        let flat_rows = rows.detach();
        let head = if head_unit == 0 { EMBEDDING } else { HEAD };
        let weight = self.parameters.find(head_unit, head).map(|parameter| &parameter.grad);
        let mut gradients = HeadGradients { rows: flat_rows.empty_like(), weight };
        let policy = Scorer { rows: &flat_rows, weight: self.policy.head() };
        let scored_by = self.scored_by(reference);
        let scores = score_batch(batch, work.scoring, policy, scored_by, Some(&mut gradients));
        let norm = self.parameters.find(top, FINAL_NORM);
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
        work: &MicroStep<'_>,
        mut tape: Tape,
        last_grad: Tensor,
    ) -> Result<(), EngineError> {
        let pass = self.policy.pass(batch, true);
        let mut output_grad = Some(last_grad);
        self.parameters.complete(self.policy.top_unit(), work.last)?;
        if self.policy.head_unit() == 0 {
            self.parameters.complete_tied_head(work.last)?;
        }
        for index in (0..self.policy.layers.len()).rev() {
            // Popped, so that a layer's activations are freed as soon as it is done.
            if let (Some(input), Some(kept)) = (tape.inputs.pop(), tape.outputs.pop())
                && let Some(gradient) =
                    output_grad.take().filter(|_| input.requires_grad() || self.trains(index + 1))
            {
                let _weights = self.policy.residence.gather_unit(index + 1, (index > 0).then_some(index))?;
                self.parameters.open(index + 1)?;
                output_grad = match batch.is_empty() {
                    true => Some(gradient),
                    false => {
                        let output = kept.unwrap_or_else(|| self.layer(index, &input, &pass, work.masks));
                        self.layer_backward(index + 1, &input, &output, &gradient)?
                    }
                };
            }
            tape.top_layer = None;
            self.parameters.complete(index + 1, work.last)?;
        }
        if let Some(gradient) = output_grad.filter(|_| self.trains(0)) {
            self.parameters.add_looked_up(&batch.tokens, &gradient)?;
        }
        self.parameters.complete(0, work.last)?;
        Ok(())
    }

    fn trains(&self, unit: usize) -> bool {
        !self.parameters.units[unit].is_empty()
    }

    /// Adds one layer's parameter gradients to its bucket and returns the gradient of its input.
    fn layer_backward(
        &self,
        unit: usize,
        input: &Tensor,
        output: &LayerOutput,
        output_grad: &Tensor,
    ) -> Result<Option<Tensor>, EngineError> {
        let parameters = &self.parameters.units[unit];
        let mut wanted: Vec<&Tensor> = parameters.iter().map(|parameter| &parameter.leaf).collect();
        if input.requires_grad() {
            wanted.push(input);
        }
        let sinks: Vec<&Tensor> = parameters.iter().map(|parameter| &parameter.grad).collect();
        // The layer's own loss term enters the loss with factor 1.
        let one = output.aux_loss.as_ref().map(Tensor::ones_like);
        let outputs: Vec<&Tensor> = [&output.hidden].into_iter().chain(&output.aux_loss).collect();
        let output_grads: Vec<&Tensor> = [output_grad].into_iter().chain(&one).collect();
        let mut gradients = grad_into(&outputs, &output_grads, &wanted, &sinks)?;
        let input_grad = if input.requires_grad() { gradients.pop().flatten() } else { None };
        for (parameter, gradient) in parameters.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                accumulate(&parameter.grad, &gradient);
            }
        }
        Ok(input_grad)
    }
}
