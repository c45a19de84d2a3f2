//! The training itself: sends works within the window and takes reports, until every trainer has finished.

use std::time::Instant;

use dyad_proto::finished::fewer;
use dyad_proto::wire::coordinator_message::Body as Down;
use dyad_proto::wire::run_event::Body as EventBody;
use dyad_proto::wire::{CheckpointReport, Finish, Recorded, ReferenceProgress, RunPlan};
use dyad_proto::{Fault, counted};

use super::{Command, Run, Stage};
use crate::run::measuring::{SplitLengths, data_report};
use crate::run::membership::Standing;
use crate::run::references::References;
use crate::run::report::WorkReport;
use crate::run::schedule::Work;
use crate::run::sharding::{DataOrder, mixture};
use crate::run::training::{Done, KnownPairs, Training};

impl Run {
    pub(super) fn start_training(
        &mut self,
        lengths: SplitLengths,
        references: References,
    ) -> Result<(), Fault> {
        let spec = &self.spec;
        let mut report = data_report(&lengths);
        report.notes.splice(..0, spec.data.notes());
        let sha256 = spec.data.train.sha256();
        let world_size = spec.world_size as usize;
        let SplitLengths { train, validation } = lengths;
        let kept = train.kept();
        let order = DataOrder {
            dataset_sha256: sha256.to_owned(),
            random_seed: spec.config.random_seed,
            shuffle: spec.config.shuffle,
            mixture: mixture(spec.data.train.shares(), &kept)?,
            kept,
        };
        let known = KnownPairs { train, validation, references };
        let start = spec.start.clone();
        let mut training = Training::new(&spec.config, world_size, order, known, start, self.now);
        training.check_sizes(&spec.data)?;
        if let Some(rule) = spec.config.early_stopping() {
            let set = if spec.config.eval_steps.is_some() { "eval_steps" } else { "n_evals" };
            rule.check_evals(training.schedule().evals(), set)?;
        }
        report.total_steps = training.schedule().total_steps;
        report.steps_per_epoch = training.schedule().steps_per_epoch;
        report.start_step = spec.start.step;
        let plan = RunPlan {
            total_steps: report.total_steps,
            start_step: spec.start.step,
            resume_from: spec.resume_from.clone(),
            dataset_sha256: sha256.to_owned(),
            validation_sha256: spec.data.validation_sha256().to_owned(),
            steps_per_epoch: report.steps_per_epoch,
        };
        if !report.endless.is_empty() {
            tracing::warn!(
                stop_tokens = report.endless.as_str(),
                "no preferred output ends with a token that ends an answer: the model will not learn to stop"
            );
        }
        for (key, count, what) in [
            ("n_evals", spec.config.n_evals(), "an evaluation after every step"),
            ("n_checkpoints", spec.config.n_checkpoints, "a checkpoint after every step"),
        ] {
            // `launcher evaluate` has no steps.
            if plan.total_steps > 0 && u64::from(count) > plan.total_steps {
                tracing::warn!(
                    "{key} = {count} is more than the run's {}: {what}",
                    counted(plan.total_steps, "step")
                );
            }
        }
        for note in spec.config.unusual() {
            tracing::warn!("{note}");
        }
        if plan.start_step > plan.total_steps {
            return Err(fewer(
                &format!("{} has done {}", plan.resume_from, counted(plan.start_step, "step")),
                plan.total_steps,
            ));
        }
        self.emit(EventBody::Data(report));
        self.send_all(&Down::RunPlan(plan));
        self.work(Box::new(training))
    }

    /// Sends as many works as the window allows; after the last report, tells all ranks to finish.
    fn work(&mut self, mut training: Box<Training>) -> Result<(), Fault> {
        while let Some(messages) = training.next_assignments(&self.spec.data, self.now)? {
            for (place, message) in messages.into_iter().enumerate() {
                self.send(place, message);
            }
        }
        if training.finished() {
            self.stage = Stage::Finishing;
            let (best_step, early_stopped) = training.best();
            self.send_all(&Down::Finish(Finish { best_step: best_step.unwrap_or(0), early_stopped }));
        } else {
            self.stage = Stage::Training(training);
        }
        Ok(())
    }

    pub(super) fn reported(&mut self, place: usize, report: WorkReport) -> Result<(), Fault> {
        match std::mem::replace(&mut self.stage, Stage::Finishing) {
            Stage::Training(mut training) => {
                self.take(&mut training, place, report, false)?;
                self.work(training)
            }
            // A report on a work that was in progress when the early end began.
            Stage::Draining(mut draining) => {
                // Durable, because the step after which ranks save may be this one.
                let taken = self.take(&mut draining.training, place, report, true);
                self.stage = Stage::Draining(draining);
                taken
            }
            _ => Err(self.violation(place, "reported work out of turn")),
        }
    }

    fn take(
        &mut self,
        training: &mut Training,
        place: usize,
        report: WorkReport,
        durable: bool,
    ) -> Result<(), Fault> {
        if let WorkReport::Step(report) = &report {
            let member = self.roster.member_mut(place);
            member.step = member.step.max(report.step);
        }
        let scored = matches!(report, WorkReport::Reference(_));
        let mut done = training.record(place, report).map_err(|what| self.violation(place, &what))?;
        let told = done.iter_mut().map(|done| training.judge(done)).collect::<Result<Vec<_>, Fault>>()?;
        self.record(done, durable)?;
        told.into_iter().flatten().for_each(|told| self.emit(EventBody::EarlyStopping(told)));
        if scored {
            let (pairs, total) = training.reference_progress();
            self.emit(EventBody::Reference(ReferenceProgress { pairs, total }));
        }
        Ok(())
    }

    /// Records finished works. Rank 0 is told of a step only after its row, so that no checkpoint appears before the row of its step.
    fn record(&mut self, done: Vec<Done>, durable: bool) -> Result<(), Fault> {
        for mut done in done {
            done.durable |= durable;
            self.begins_well(&done)?;
            let Done { work, num_tokens, evaluations, .. } = done;
            self.commands.push(Command::Record(done));
            if let Work::Step(step) = work {
                self.trained = true;
                self.send(0, Down::Recorded(Recorded { step, num_tokens, evaluations }));
            }
        }
        Ok(())
    }

    /// Fails if the first row holds NaN or infinity: the first row replaces an earlier run's files, and such a run is not worth it.
    fn begins_well(&mut self, done: &Done) -> Result<(), Fault> {
        let Some(row) = done.row.as_ref().filter(|_| !self.recorded) else { return Ok(()) };
        if let Some((name, value)) = row.no_number() {
            return Err(Fault::failed(format!("{}: the {name} is {value}", done.work)).hint(
                "lower learning_rate, check the pairs of this step and the weights that the run started from, or train with \
                 dtype = \"float32\"; what an earlier run left in output_dir is untouched",
            ));
        }
        self.recorded = true;
        Ok(())
    }

    pub(super) fn checkpoint(&mut self, place: usize, report: CheckpointReport) -> Result<(), Fault> {
        if place != 0 {
            return Err(self.violation(place, "reported a checkpoint, which only rank 0 writes"));
        }
        self.saved = Some(report.clone());
        self.emit(EventBody::Checkpoint(report));
        Ok(())
    }

    pub(super) fn finished(&mut self, now: Instant, place: usize) -> Result<(), Fault> {
        if !matches!(self.stage, Stage::Finishing) && !self.drained() {
            return Err(self.violation(place, "said that it has finished before it was told to"));
        }
        let member = self.roster.member_mut(place);
        member.standing = Standing::Finished;
        let id = member.id;
        self.commands.push(Command::Close(id));
        if self.roster.members().iter().all(|member| member.standing == Standing::Finished) {
            let early = self.drain_outcome();
            self.end(now, early);
        }
        Ok(())
    }
}
