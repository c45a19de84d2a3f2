//! The works of a run: assigns them to the ranks and adds up the ranks' reports. Pure.
//!
//! - CRD-T1: every rank gets every work, in the same order, even without a pair of its own: collectives need all ranks.
//! - CRD-T2: no rank holds more than `WINDOW` works that it has not reported.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use dyad_proto::wire;
use dyad_proto::wire::coordinator_message::Body;
use dyad_proto::wire::{
    EvaluationAssignment, ReferenceAssignment, SampleAnswer, Split, StepAssignment, StepReport,
};
use dyad_proto::{Fault, MAX_MESSAGE_BYTES, RunConfig, counted};

use prost::Message;

use crate::run::dataset::{Dataset, Datasets};
use crate::run::early_stopping::EarlyStopping;
use crate::run::measuring::Lengths;
use crate::run::metrics_row::{MetricsRow, StepContext, evaluation_row, step_row, total};
use crate::run::references::{Known, PairKey, References};
use crate::run::report::WorkReport;
use crate::run::saving::Saving;
use crate::run::schedule::{Schedule, Work};
use crate::run::sharding::{DataOrder, batch_place, split_over_ranks};

/// The only generation of the communicator so far.
pub const GENERATION: u64 = 1;

/// Most works that are sent and not done: a trainer tokenises and packs the next ones while it computes.
const WINDOW: usize = 4;

/// Where the run starts or continues.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// Steps done.
    pub step: u64,
    /// Tokens trained on.
    pub num_tokens: u64,
    /// Evaluations that have a row.
    pub evaluations: u64,
    /// Whether the evaluation due after `step` was done.
    pub evaluated: bool,
    /// State of early stopping, of a run that does.
    pub early_stopping: Option<EarlyStopping>,
}

/// Lengths and reference scores of the pairs, known before training.
#[derive(Debug)]
pub struct KnownPairs {
    /// Lengths of the training pairs, of which at least one is kept.
    pub train: Lengths,
    /// Lengths of the validation pairs.
    pub validation: Lengths,
    /// Known reference scores of both.
    pub references: References,
}

/// A work that was sent and that not all ranks have reported.
#[derive(Debug)]
struct PendingStep {
    work: Work,
    /// Number of its pairs over all ranks.
    pairs: u64,
    /// Whether a checkpoint follows.
    saved: bool,
    /// The reports by rank.
    reports: Vec<Option<WorkReport>>,
    /// Number of ranks that have not reported.
    missing: usize,
}

/// A work that all ranks have done.
#[derive(Debug)]
pub struct Done {
    /// Which work.
    pub work: Work,
    /// Its metrics; `None` for reference scores.
    pub row: Option<MetricsRow>,
    /// New reference log-probabilities.
    pub references: Vec<Known>,
    /// The ranks' reports on an optimizer step, in rank order; empty for other works.
    pub reports: Vec<StepReport>,
    /// Sample answers of an evaluation, in the order of the validation file.
    pub samples: Vec<SampleAnswer>,
    /// Tokens trained on so far.
    pub num_tokens: u64,
    /// Evaluations so far.
    pub evaluations: u64,
    /// Whether the row must be synced to the disk, because a checkpoint follows.
    pub durable: bool,
}

/// State of the works of a run.
#[derive(Debug)]
pub struct Training {
    config: RunConfig,
    world_size: usize,
    schedule: Schedule,
    saving: Saving,
    early_stopping: Option<EarlyStopping>,
    /// Early stopping has left out steps.
    early_stopped: bool,
    /// The next step or evaluation to send.
    upcoming: Option<Work>,
    references: References,
    pending: VecDeque<PendingStep>,
    /// Number of works sent so far.
    sent: u64,
    order: DataOrder,
    lengths: Lengths,
    validation: Lengths,
    /// The epoch used last and its order, kept so that it is shuffled once per epoch and not once per step.
    epoch: (u64, Vec<u64>),
    /// Validation pairs by rank, the same at each evaluation.
    evaluation_shares: Vec<Vec<u64>>,
    /// Validation pairs whose prompts are answered at each evaluation.
    samples: Vec<u64>,
    num_tokens: u64,
    evaluations: u64,
}

impl Training {
    /// The works over the measured pairs, from `start` on.
    #[must_use]
    pub fn new(
        config: &RunConfig,
        world_size: usize,
        order: DataOrder,
        known: KnownPairs,
        start: Start,
        now: Instant,
    ) -> Self {
        let KnownPairs { train, validation, mut references } = known;
        let schedule = Schedule::new(config, order.kept.len());
        references.plan(&order.kept, &validation.kept());
        let evaluated = validation.weigh(&validation.kept(), config.objective());
        let samples = validation.kept().into_iter().take(config.n_samples as usize).collect();
        let stops = start.early_stopping.as_ref().is_some_and(EarlyStopping::stops);
        let first = schedule.first(start.step, start.evaluated);
        Self {
            early_stopped: stops && first.is_some(),
            upcoming: first.filter(|_| !stops),
            schedule,
            early_stopping: start.early_stopping,
            saving: Saving::new(config, now),
            references,
            pending: VecDeque::new(),
            sent: 0,
            epoch: (0, order.epoch(0)),
            order,
            lengths: train,
            validation,
            evaluation_shares: split_over_ranks(&evaluated, world_size),
            samples,
            num_tokens: start.num_tokens,
            evaluations: start.evaluations,
            config: config.clone(),
            world_size,
        }
    }

    /// Number of pairs scored before the first step so far, and of all pairs to score there.
    #[must_use]
    pub fn reference_progress(&self) -> (u64, u64) {
        self.references.progress()
    }

    /// The schedule of the run.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Number of works sent, and of those that every rank has reported.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.sent, self.sent - self.pending.len() as u64)
    }

    /// Whether all works are sent and every rank has reported them.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.upcoming.is_none() && self.pending.is_empty()
    }

    /// The next work as one message per rank; `None` if the window is full or nothing can be sent now.
    pub fn next_assignments(&mut self, data: &Datasets, now: Instant) -> Result<Option<Vec<Body>>, Fault> {
        if self.pending.len() >= WINDOW {
            return Ok(None);
        }
        let Some(work) = self.next_work() else { return Ok(None) };
        let (pairs, messages) = match work {
            Work::Reference(chunk) => self.reference(chunk, data)?,
            Work::Step(step) => self.step(step, data, now)?,
            Work::Evaluation(step) => self.evaluation(step, data)?,
        };
        messages.iter().try_for_each(|message| check_size(work, message))?;
        let (reports, missing) = (vec![None; self.world_size], self.world_size);
        let saved = messages.iter().any(|message| matches!(message, Body::Step(step) if step.checkpoint));
        self.pending.push_back(PendingStep { work, pairs, saved, reports, missing });
        self.sent += 1;
        Ok(Some(messages))
    }

    /// With early stopping: the step of the best evaluation so far, and whether the run stops before its last step.
    #[must_use]
    pub fn best(&self) -> (Option<u64>, bool) {
        let best = self.early_stopping.as_ref().and_then(EarlyStopping::best).map(|best| best.step);
        (best, self.early_stopped)
    }

    /// Takes a finished evaluation into account, if the run may stop early: adds the state to its row, and sends no further work if the
    /// run stops.
    pub fn judge(&mut self, done: &mut Done) -> Result<Option<wire::EarlyStopping>, Fault> {
        let (Work::Evaluation(step), Some(stopping), Some(row)) =
            (done.work, &mut self.early_stopping, &mut done.row)
        else {
            return Ok(None);
        };
        let told = stopping.judge(step, row)?;
        // After the last step there is nothing to stop.
        self.early_stopped |= stopping.stops() && self.upcoming.take().is_some();
        Ok(told.map(|told| wire::EarlyStopping { stops: self.early_stopped, ..told }))
    }

    /// Whether a work that decides about further work is in progress.
    fn undecided(&self) -> bool {
        let evaluates = |pending: &PendingStep| matches!(pending.work, Work::Evaluation(_));
        self.early_stopping.is_some() && self.pending.iter().any(evaluates)
    }

    /// The next work to send. Steps wait until all reference chunks are reported, because they need the scores. With early stopping they
    /// also wait for the evaluation before them.
    fn next_work(&mut self) -> Option<Work> {
        if let Some(chunk) = self.references.next_chunk() {
            return Some(Work::Reference(chunk));
        }
        if self.pending.iter().any(|pending| matches!(pending.work, Work::Reference(_))) {
            return None;
        }
        if self.undecided() {
            return None;
        }
        let work = self.upcoming?;
        self.upcoming = self.schedule.after(work);
        Some(work)
    }

    fn reference(&self, chunk: u64, data: &Datasets) -> Result<(u64, Vec<Body>), Fault> {
        let (split, ids) = self.references.chunk(chunk);
        let share = |rank| ids.iter().skip(rank).step_by(self.world_size).copied();
        let assignment = |rank| {
            let pairs = data.pairs(split, share(rank))?;
            let split = split.into();
            Ok(Body::Reference(ReferenceAssignment { generation: GENERATION, chunk, pairs, split }))
        };
        Ok((ids.len() as u64, (0..self.world_size).map(assignment).collect::<Result<_, Fault>>()?))
    }

    /// Ids of a step's pairs, in batch order and by rank.
    fn shares(&mut self, step: u64) -> (&[u64], Vec<Vec<u64>>) {
        let (epoch, places) = batch_place(step, self.order.kept.len(), self.config.batch_size);
        if self.epoch.0 != epoch {
            self.epoch = (epoch, self.order.epoch(epoch));
        }
        let batch = &self.epoch.1[places];
        let weighed = self.lengths.weigh(batch, self.config.objective());
        (batch, split_over_ranks(&weighed, self.world_size))
    }

    /// With an objective that estimates the KL divergence: for each of these ids, the one before it in the batch, the last one for the
    /// first. Otherwise none.
    fn partners(&self, batch: &[u64], share: &[u64]) -> Vec<u64> {
        if !self.config.objective().estimates_kl() {
            return Vec::new();
        }
        let before = batch.iter().zip(batch.iter().cycle().skip(batch.len().saturating_sub(1)));
        let partner: HashMap<u64, u64> = before.map(|(&id, &partner)| (id, partner)).collect();
        share.iter().filter_map(|id| partner.get(id).copied()).collect()
    }

    /// Fails before the first step if the message of a later one would be too large.
    pub fn check_sizes(&mut self, data: &Datasets) -> Result<(), Fault> {
        let sizes = |split| {
            let sizes = data.of(split).into_iter().flat_map(Dataset::record_bytes);
            // A record may also be the partner of another one.
            let copies = if self.config.objective().estimates_kl() { 2 } else { 1 };
            sizes.map(|bytes| copies * (bytes + AROUND_PAIR)).collect::<Vec<usize>>()
        };
        let of = |sizes: &[usize], ids: &[u64]| -> usize { ids.iter().map(|&id| sizes[id as usize]).sum() };
        let (train, validation) = (sizes(Split::Train), sizes(Split::Validation));
        for share in &self.evaluation_shares {
            check_bytes(Work::Evaluation(0), of(&validation, share))?;
        }
        let mut largest: Vec<usize> = self.order.kept.iter().map(|&id| train[id as usize]).collect();
        let most = (self.config.batch_size as usize).min(largest.len());
        if most < largest.len() {
            largest.select_nth_unstable_by(most, |a, b| b.cmp(a));
        }
        if largest[..most].iter().sum::<usize>() <= MAX_MESSAGE_BYTES - AROUND_MESSAGE {
            return Ok(());
        }
        for step in (1..=self.schedule.total_steps).take(WEIGHED_STEPS) {
            for share in self.shares(step).1 {
                check_bytes(Work::Step(step), of(&train, &share))?;
            }
        }
        Ok(())
    }

    fn step(&mut self, step: u64, data: &Datasets, now: Instant) -> Result<(u64, Vec<Body>), Fault> {
        let (checkpoint, rotates) = self.checkpoint(step, now);
        let best_step = self.best().0.unwrap_or(0);
        let (batch, shares) = self.shares(step);
        let (batch, global_pairs) = (batch.to_vec(), batch.len() as u64);
        let global_chosen_tokens = self.lengths.chosen_tokens(&batch);
        let assignment = |share: Vec<u64>| {
            Ok(Body::Step(StepAssignment {
                generation: GENERATION,
                step,
                epoch: self.schedule.epoch(step),
                partners: data.pairs(Split::Train, self.partners(&batch, &share))?,
                pairs: self.references.attach(Split::Train, data.pairs(Split::Train, share)?),
                global_pairs,
                global_chosen_tokens,
                checkpoint,
                rotates,
                best_step,
                // The observer fills it in.
                traceparent: String::new(),
            }))
        };
        Ok((global_pairs, shares.into_iter().map(assignment).collect::<Result<_, Fault>>()?))
    }

    /// Whether the step is saved, and whether only because of the time or of an evaluation, which may turn out to be the best.
    fn checkpoint(&mut self, step: u64, now: Instant) -> (bool, bool) {
        let asked = self.schedule.saves(step);
        // The last step writes `final`.
        let judged = self.early_stopping.is_some() && self.schedule.evaluates(step);
        let rotates = !asked && step < self.schedule.total_steps && (judged || self.saving.is_due(now));
        if asked || rotates {
            self.saving.ordered(now);
        }
        (asked || rotates, rotates)
    }

    fn evaluation(&self, step: u64, data: &Datasets) -> Result<(u64, Vec<Body>), Fault> {
        let sample_slots = self.samples.len().div_ceil(self.world_size) as u32;
        let evaluated = self.validation.kept();
        let assignment = |(rank, share): (usize, &Vec<u64>)| {
            let pairs = data.pairs(Split::Validation, share.iter().copied())?;
            let pairs = self.references.attach(Split::Validation, pairs);
            let partners = data.pairs(Split::Validation, self.partners(&evaluated, share))?;
            let answered = self.samples.iter().skip(rank).step_by(self.world_size).copied();
            let samples = data.pairs(Split::Validation, answered)?;
            let generation = GENERATION;
            let evaluation =
                EvaluationAssignment { generation, step, pairs, partners, samples, sample_slots };
            Ok(Body::Evaluation(evaluation))
        };
        let pairs = self.evaluation_shares.iter().map(|share| share.len() as u64).sum();
        let shares = self.evaluation_shares.iter().enumerate();
        Ok((pairs, shares.map(assignment).collect::<Result<_, Fault>>()?))
    }

    /// Takes a report and returns the works that it completes. The error says how the rank broke the protocol.
    pub fn record(&mut self, rank: usize, report: WorkReport) -> Result<Vec<Done>, String> {
        let work = report.work();
        if report.generation() != GENERATION {
            return Err(format!("reported {work} in generation {}, not {GENERATION}", report.generation()));
        }
        let Some(pending) = self.pending.iter_mut().find(|pending| pending.work == work) else {
            return Err(format!("reported {work}, which it does not hold"));
        };
        if pending.reports[rank].replace(report).is_some() {
            return Err(format!("reported {work} twice"));
        }
        pending.missing -= 1;
        let mut done = Vec::new();
        while self.pending.front().is_some_and(|first| first.missing == 0) {
            if let Some(first) = self.pending.pop_front() {
                done.push(self.complete(first)?);
            }
        }
        Ok(done)
    }

    fn complete(&mut self, pending: PendingStep) -> Result<Done, String> {
        let reports: Vec<WorkReport> = pending.reports.into_iter().flatten().collect();
        let Self { references, lengths, validation, .. } = self;
        let key = |split, id| pair_key(lengths, validation, split, id);
        let references = references.learn(pending.work, &reports, key)?;
        if matches!(pending.work, Work::Reference(_)) {
            return Ok(Done {
                work: pending.work,
                row: None,
                references,
                reports: Vec::new(),
                samples: Vec::new(),
                num_tokens: self.num_tokens,
                evaluations: self.evaluations,
                durable: false,
            });
        }
        let sums = total(reports.iter().filter_map(WorkReport::sums));
        if sums.pairs != pending.pairs {
            let (work, expected) = (pending.work, pending.pairs);
            return Err(format!(
                "completed {work}, in which the ranks counted {} of {expected}",
                counted(sums.pairs, "pair")
            ));
        }
        let mut steps = Vec::new();
        let mut evaluations = Vec::new();
        for report in reports {
            match report {
                WorkReport::Step(report) => steps.push(report),
                WorkReport::Evaluation(report) => evaluations.push(report),
                WorkReport::Reference(_) => {}
            }
        }
        let mut samples: Vec<SampleAnswer> =
            evaluations.iter_mut().flat_map(|report| std::mem::take(&mut report.samples)).collect();
        samples.sort_by_key(|sample| sample.id);
        if !evaluations.is_empty() && !samples.iter().map(|sample| sample.id).eq(self.samples.iter().copied())
        {
            return Err(format!("completed {} with answers to other prompts than were asked", pending.work));
        }
        let objective = self.config.objective();
        let row = match pending.work {
            Work::Evaluation(_) | Work::Reference(_) => evaluation_row(&evaluations, objective),
            Work::Step(step) => {
                let epoch = self.schedule.epoch(step);
                step_row(&steps, StepContext { objective, epoch, tokens_before: self.num_tokens })
            }
        };
        match pending.work {
            Work::Step(_) => self.num_tokens += sums.tokens,
            Work::Evaluation(_) | Work::Reference(_) => self.evaluations += 1,
        }
        Ok(Done {
            work: pending.work,
            row: Some(row),
            references,
            reports: steps,
            samples,
            num_tokens: self.num_tokens,
            evaluations: self.evaluations,
            durable: pending.saved,
        })
    }
}

/// Most steps whose messages are checked before training; later ones are checked when they are sent.
const WEIGHED_STEPS: usize = 100_000;

/// Upper bound on the bytes of a pair in a message, apart from its text.
const AROUND_PAIR: usize = 64;

/// The key of a record in either file; `None` if there is no such record.
pub(crate) fn pair_key(train: &Lengths, validation: &Lengths, split: Split, id: u64) -> Option<PairKey> {
    if split == Split::Validation { validation.key(split, id) } else { train.key(split, id) }
}

fn check_size(work: Work, message: &Body) -> Result<(), Fault> {
    match message {
        Body::Step(step) => check_bytes(work, step.encoded_len()),
        Body::Evaluation(evaluation) => check_bytes(work, evaluation.encoded_len()),
        Body::Reference(reference) => check_bytes(work, reference.encoded_len()),
        _ => Ok(()),
    }
}

/// Upper bound on the bytes of a message, apart from its pairs.
const AROUND_MESSAGE: usize = 256;

fn check_bytes(work: Work, bytes: usize) -> Result<(), Fault> {
    if bytes + AROUND_MESSAGE <= MAX_MESSAGE_BYTES {
        return Ok(());
    }
    let what = match work {
        Work::Step(_) => "batch_size",
        Work::Evaluation(_) => "the number of validation pairs",
        Work::Reference(_) => "the length of the pairs",
    };
    let (bytes, limit) = (bytes >> 20, MAX_MESSAGE_BYTES >> 20);
    Err(Fault::input(format!(
        "one trainer's share of {work} is {bytes} MiB of text; at most {limit} MiB can be sent"
    ))
    .hint(format!("lower {what}, or use more trainers")))
}
