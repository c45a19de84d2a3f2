//! One optimizer step, layer by layer.
//!
//! Each decoder layer runs on a detached input and has its own graph. The backward pass gives each layer the gradient of its output. When
//! the lowest unit of a bucket is done in the step's last micro-batch, the bucket's all-reduce starts while lower layers still compute.
//! The gradients of embedding and head are computed in closed form.
//!
//! The files: `micro_steps` splits a rank's pairs, `passes` runs one micro-batch, `coupled` is the first pass that some objectives need,
//! `reference` gets the reference model's scores, and `step_statistics` adds up a step's sums. [`generation`] answers prompts.
//!
//! - TRN-E1: the loss is a sum over pairs divided by the number of pairs of *all* ranks and micro-batches, so that neither the
//!   world size nor the split into micro-batches changes the step.
//! - TRN-E2: every rank issues the same collectives in the same order, also when it has fewer pairs than others, or none.

mod coupled;
pub mod generation;
mod micro_steps;
mod passes;
mod reference;
mod step_statistics;

use std::sync::Arc;

use dyad_data::tokenized::Tokenized;
use dyad_proto::RunConfig;
use dyad_proto::names::phase;
use dyad_proto::run_config::Objective;
use dyad_proto::wire::{PreferenceSums, ReferenceLogps};
use tch::Device;

use self::coupled::by_micro_batch;
use self::micro_steps::{MicroBatchPairs, MicroStepPlan};
use self::passes::MicroStep;
use self::step_statistics::{StepStatistics, sums};
use crate::batch::{MicroBatch, PairLayout, TokenCounts};
use crate::cost::activation_memory::{LayerBytes, free_bytes, kept_layers, ranks_here};
use crate::error::EngineError;
use crate::model::lora::{self, Adapters};
use crate::model::{Model, moving_reference};
use crate::objective::head::{Scorer, Scoring, score_batch};
use crate::objective::statistics::{DeviceSums, HostSums};
use crate::objective::{Scored, StepObjective, StepSize};
use crate::observe::profile::summary::STEP;
use crate::observe::timing::Phases;
use crate::optimizer::Optimizer;
use crate::zero::parameters::{Parameters, WholeTensor};
use dyad_torch::comm::Communicator;
use dyad_torch::recorder::Span;
use dyad_torch::transfer::read;

/// Everything that trains on this rank.
#[derive(Debug)]
pub struct Engine {
    /// The model being trained.
    pub policy: Model,
    /// The frozen model that DPO compares the policy with.
    pub reference: Option<Model>,
    /// Trainable parameters of the policy.
    pub parameters: Parameters,
    /// The adapters of the policy, whose merged weights a moving reference follows.
    adapters: Option<Adapters>,
    communicator: Arc<dyn Communicator>,
    optimizer: Optimizer,
    settings: EngineSettings,
}

/// Settings from the run's configuration.
#[derive(Clone, Debug)]
struct EngineSettings {
    objective: Objective,
    /// The objective and its parameters; each step sets its size.
    evaluation: StepObjective,
    layout: PairLayout,
    /// Layout of a first pass, which decides the sizes of micro-batches.
    first_layout: PairLayout,
    micro_batch_tokens: usize,
    /// Layers from this index up keep their activations; those below recompute them.
    first_uncheckpointed_layer: usize,
    seed: u64,
    dropout: bool,
    /// Report the reference model's log-probabilities with each step.
    keeps_references: bool,
    /// With a moving reference: the policy's share in it, and the steps from one move to the next.
    moves_reference: Option<(f64, u64)>,
    /// The reference model has been freed; its scores come with the pairs.
    compares_with_known: bool,
}

/// This rank's share of a step.
#[derive(Clone, Debug)]
pub struct StepShare {
    /// Number of the step, from 1.
    pub step: u64,
    /// Pairs of this rank.
    pub pairs: Vec<Tokenized>,
    /// Reference log-probabilities of each pair, where they are known.
    pub references: Vec<Option<ReferenceLogps>>,
    /// Pairs over all ranks.
    pub global_pairs: u64,
    /// Completion tokens of the chosen sides over all ranks.
    pub global_chosen_tokens: u64,
}

/// Results of a step.
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
    /// Reference log-probabilities that this step computed, by pair; empty if the run does not keep them.
    pub references: Vec<Option<ReferenceLogps>>,
}

impl Engine {
    /// Assembles an engine, and connects sharded weights to the other ranks.
    #[must_use]
    pub fn new(
        mut policy: Model,
        reference: Option<Model>,
        parameters: Parameters,
        communicator: Arc<dyn Communicator>,
        config: &RunConfig,
    ) -> Self {
        parameters.link().connect(Arc::clone(&communicator));
        let dropout = config.lora && config.lora_dropout() > 0.0;
        let settings = EngineSettings {
            objective: config.objective(),
            evaluation: StepObjective::of(config),
            // With dropout both passes must draw the same masks.
            layout: if dropout { PairLayout::of_first_pass(config) } else { PairLayout::of(config) },
            first_layout: PairLayout::of_first_pass(config),
            micro_batch_tokens: config.micro_batch_tokens as usize,
            first_uncheckpointed_layer: first_uncheckpointed_layer(
                config,
                &mut policy,
                communicator.world_size(),
            ),
            seed: config.random_seed,
            dropout,
            keeps_references: config.keeps_references(),
            moves_reference: config
                .sync_ref_model
                .then(|| (config.ref_model_mixup_alpha(), config.ref_model_sync_steps())),
            compares_with_known: false,
        };
        let (optimizer, adapters) = (Optimizer::new(config), None);
        Self { policy, reference, parameters, adapters, communicator, optimizer, settings }
    }

    /// Tells a moving reference of the policy's adapters. A run that begins with trained adapters begins with them in its reference.
    pub fn follow(&mut self, adapters: Option<Adapters>) -> Result<(), EngineError> {
        self.adapters = adapters;
        if self.settings.moves_reference.is_some() && self.adapters.is_some() {
            self.move_reference(1.0)?;
        }
        Ok(())
    }

    fn move_reference(&mut self, alpha: f64) -> Result<(), EngineError> {
        let Some(reference) = &mut self.reference else { return Ok(()) };
        moving_reference::move_towards(reference, &mut self.policy, self.adapters.as_ref(), alpha)?;
        Ok(())
    }

    /// The tensors of a moving reference for a checkpoint. Every rank must call this.
    pub fn collect_reference(&mut self) -> Result<Vec<WholeTensor>, EngineError> {
        let moves = self.settings.moves_reference.is_some();
        let reference = self.reference.as_mut().filter(|_| moves);
        Ok(reference.map(moving_reference::collect).transpose()?.unwrap_or_default())
    }

    /// Forward, backward, reduce, clip, update.
    pub fn train_step(&mut self, share: &StepShare, learning_rate: f64) -> Result<StepResult, EngineError> {
        let _span = Span::enter(STEP);
        let mut phases = Phases::default();
        let mut totals = self.no_statistics();
        phases.measure("zero_grad", || self.parameters.begin_step());
        self.parameters.announce_rows(share.pairs.iter().flat_map(Tokenized::tokens))?;
        let budget = self.settings.micro_batch_tokens;
        let plan = self.plan(&share.pairs, &share.references, budget)?;
        let objective = self.objective(share);
        let coupled = self.coupled(&plan, &objective, share.step, &mut phases, &mut totals)?;
        for (index, micro_batch) in plan.micro_batches.iter().enumerate() {
            let known = coupled.as_ref().and_then(|all| all.get(index));
            let scoring = known.map_or(Scoring::Objective(&objective), |scored| {
                Scoring::Known(scored, objective.token_reading())
            });
            let work = MicroStep {
                pairs: &micro_batch.pairs,
                known: micro_batch.known,
                scoring,
                visits_reference: plan.visits_reference && coupled.is_none(),
                last: index + 1 == plan.micro_batches.len(),
                masks: self.masks(share.step, index),
            };
            self.micro_step(&work, &mut phases, &mut totals)?;
        }
        phases.measure(phase::ALL_REDUCE_WAIT, || self.parameters.finish_step())?;
        let grad_norm = phases
            .measure("optimizer", || self.optimizer.step(&mut self.parameters, share.step, learning_rate))?;
        if let Some((alpha, every)) = self.settings.moves_reference
            && share.step.is_multiple_of(every)
        {
            phases.measure("move_reference", || self.move_reference(alpha))?;
        }
        // Waits for the device (TRN-T1).
        let found = phases.measure("report", || totals.read(&grad_norm));
        let sums = sums(&totals, &found.sums, &share.pairs, self.settings.objective);
        let (grad_norm, references) = (found.grad_norm, found.references);
        Ok(StepResult { sums, grad_norm, phases, tokens: totals.tokens, references })
    }

    /// With an objective that couples the pairs of a step: the results of each micro-batch, from a first pass over all pairs.
    fn coupled(
        &self,
        plan: &MicroStepPlan<'_>,
        objective: &StepObjective,
        step: u64,
        phases: &mut Phases,
        totals: &mut StepStatistics,
    ) -> Result<Option<Vec<Scored>>, EngineError> {
        if !objective.couples_pairs() {
            return Ok(None);
        }
        let masks = |index| self.masks(step, index);
        let scored = phases.measure("first_pass", || self.score_coupled(plan, objective, masks, totals))?;
        let with_partners = objective.estimates_kl() && self.settings.layout == self.settings.first_layout;
        let scored = if with_partners { scored.with_partners() } else { scored };
        Ok(Some(by_micro_batch(&scored, plan)))
    }

    /// Scores pairs without training on them.
    pub fn evaluate(
        &self,
        pairs: &[Tokenized],
        references: &[Option<ReferenceLogps>],
    ) -> Result<PreferenceSums, EngineError> {
        let mut totals = self.no_statistics();
        let plan = self.plan(pairs, references, self.settings.micro_batch_tokens)?;
        let objective = &self.settings.evaluation;
        if objective.couples_pairs() {
            self.score_coupled(&plan, objective, |_| None, &mut totals)?;
            let found = HostSums::of(&read::<f64>(totals.sums.tensor()));
            return Ok(sums(&totals, &found, pairs, self.settings.objective));
        }
        for MicroBatchPairs { pairs, known } in &plan.micro_batches {
            let batch = MicroBatch::pack(pairs, self.settings.layout, self.device());
            let reference = self.reference_side(&batch, known, plan.visits_reference)?;
            let rows = self.policy.score_rows(&batch)?;
            let _heads = self.gather_heads(plan.visits_reference)?;
            let policy = Scorer { rows: &rows, weight: self.policy.head() };
            let scores =
                score_batch(&batch, Scoring::Objective(objective), policy, self.scored_by(&reference), None);
            totals.add(&scores, &reference, pairs);
        }
        let found = HostSums::of(&read::<f64>(totals.sums.tensor()));
        Ok(sums(&totals, &found, pairs, self.settings.objective))
    }

    /// Seed of a micro-batch's dropout masks: the same after a resume, different on each rank. `None` without dropout.
    fn masks(&self, step: u64, micro_batch: usize) -> Option<u64> {
        let stream = step * self.communicator.world_size() as u64 + self.communicator.rank() as u64;
        self.settings.dropout.then_some(self.settings.seed ^ (stream << 24) ^ ((micro_batch as u64) << 12))
    }

    fn device(&self) -> Device {
        self.policy.place.device
    }

    fn no_statistics(&self) -> StepStatistics {
        let sums = DeviceSums::zeros(self.device());
        StepStatistics {
            sums,
            kl_tokens: 0,
            kl_chosen_tokens: 0,
            tokens: TokenCounts::default(),
            references: Vec::new(),
        }
    }

    fn objective(&self, share: &StepShare) -> StepObjective {
        let (pairs, chosen_tokens) = (share.global_pairs as f64, share.global_chosen_tokens as f64);
        self.settings.evaluation.sized(StepSize { pairs, chosen_tokens })
    }
}

/// Index of the lowest layer that keeps its activations.
fn first_uncheckpointed_layer(config: &RunConfig, policy: &mut Model, world_size: usize) -> usize {
    let (place, layers) = (policy.place, policy.layers.len());
    let tokens = u64::from(config.micro_batch_tokens);
    let mut layer = LayerBytes::new(&policy.config, place, tokens);
    layer.kept += tokens * lora::stretched_values(policy) as u64 * place.kind.elt_size_in_bytes() as u64;
    let free = free_bytes(place.device, ranks_here(world_size));
    let kept = kept_layers(config.activation_checkpointing, layers, layer, free);
    tracing::info!(kept, layers, free_mib = free.map(|bytes| bytes >> 20), "activations kept");
    layers - kept
}
