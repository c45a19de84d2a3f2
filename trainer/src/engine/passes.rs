//! One micro-batch forward and back, layer by layer.

use dyad_data::tokenize::Tokenized;
use dyad_proto::wire::ReferenceLogps;
use tch::{Kind, Tensor};

use super::tally::{ReferenceSide, Tally};
use super::{Engine, EngineError};
use crate::batch::{MicroBatch, TokenCounts};
use crate::comm::{CommError, Pending};
use crate::ext::grad;
use crate::head::{HeadGradients, Scorer, Scores, score_batch};
use crate::loss::Objective;
use crate::model::blocks::{Pass, Rotary};
use crate::model::fused::accumulate;
use crate::timing::Phases;

/// Reductions in flight, one for each bucket that is complete; absent where there is nobody to reduce with.
pub(super) type Reductions = Vec<Option<Box<dyn Pending>>>;

/// One micro-batch of a step.
pub(super) struct MicroStep<'a> {
    pub(super) pairs: &'a [&'a Tokenized],
    pub(super) known: &'a [Option<ReferenceLogps>],
    pub(super) objective: Objective,
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
    /// Adds one micro-batch's gradients; in the last one, starts each bucket's reduction as it completes.
    pub(super) fn micro_step(
        &mut self,
        work: &MicroStep<'_>,
        reductions: Option<&mut Reductions>,
        phases: &mut Phases,
        tally: &mut Tally,
    ) -> Result<(), EngineError> {
        let batch = MicroBatch::pack(work.pairs, self.settings.layout, self.device());
        let reference = phases.measure("forward_reference", || self.reference_side(&batch, work.known))?;
        let tape = phases.measure("forward_policy", || self.forward(&batch));
        let (scores, last_grad) =
            phases.measure("head", || self.head(&batch, work.objective, &tape.last, &reference))?;
        tally.add(&scores, &reference, work.pairs);
        if self.settings.keeps_references {
            tally.keep_references(&scores, work.pairs.len());
        }
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
        mut reductions: Option<&mut Reductions>,
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
    fn complete(&self, unit: usize, reductions: Option<&mut Reductions>) -> Result<(), EngineError> {
        let Some(reductions) = reductions else { return Ok(()) };
        if let Some(bucket) = self.parameters.buckets.iter().position(|bucket| bucket.units.start == unit) {
            reductions.push(self.reduce(bucket)?);
        }
        Ok(())
    }

    pub(super) fn reduce(&self, bucket: usize) -> Result<Option<Box<dyn Pending>>, CommError> {
        if self.communicator.world_size() == 1 {
            return Ok(None);
        }
        self.communicator.all_reduce(&self.parameters.buckets[bucket].grad).map(Some)
    }
}
