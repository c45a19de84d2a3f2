//! The life of a trainer: it joins, connects, loads, does the work that the coordinator sends, and leaves.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dyad_data::tokenized::Tokenized;
use dyad_proto::checkpoint_state::{CheckpointState, RunIdentity};
use dyad_proto::fingerprint::{Fingerprint, as_map};
use dyad_proto::names::phase;
use dyad_proto::run_config::ReferenceLogps as Mode;
use dyad_proto::wire::coordinator_message::Body as Received;
use dyad_proto::wire::trainer_message::Body as Sent;
use dyad_proto::wire::{
    Assignment, CheckpointReport, EvaluationReport, Facts, Finish, PairReference, Phase, PreferenceSums,
    ReferenceLogps, ReferenceReport, StepReport,
};
use dyad_proto::{ErrorCode, Fault};
use dyad_telemetry::TARGET;
use tch::Device;

use crate::checkpoint::{
    load::{restore, saved_masters},
    read_state,
    rotate::{Kept, rotate},
    save::Saver,
};
use crate::cost::utilisation::ModelFlops;
use crate::engine::Engine;
use crate::error::EngineError;
use crate::facts::of_checkpoint;
use crate::load::Parts;
use crate::model::Model;
use crate::model::weights::Digested;
use crate::observe::profile::Profile;
use crate::observe::progress;
use crate::observe::timing::peak_resident_bytes;
use crate::observe::trace::{self, Beginning};
use crate::optimizer::learning_rate::LearningRate;
use crate::sampler::Sampler;
use crate::session::feed::{AssignedStep, ReadyWork, SampledPrompts};
use crate::session::{Handle, Identity, Session};
use crate::start::{Incoming, Started, next, start};
use dyad_torch::device::cuda_peak_bytes;
use dyad_torch::ops::layer::kernel_threads;

/// Joins the run at the coordinator and trains until it is over. Profiles a few steps if given a folder for profiles.
pub fn run(identity: &Identity, profile: Option<PathBuf>) -> Result<(), Fault> {
    dyad_sources::alive::tell(progress::advance);
    let (session, received) = Session::open(identity)?;
    let handle = session.handle();
    match dyad_torch::panics::caught(|| work(identity, &handle, received, profile)) {
        Ok(end) => {
            session.finish();
            match end {
                RunEnd::Complete => Ok(()),
                RunEnd::Drained(step) => {
                    Err(Fault::new(ErrorCode::Interrupted, format!("stopped on request after step {step}")))
                }
            }
        }
        Err(fault) => {
            if fault.code != ErrorCode::Interrupted {
                trace::fail(&fault.message);
            }
            session.fail(fault.clone());
            Err(fault)
        }
    }
}

/// How the work ended.
enum RunEnd {
    /// All work is done.
    Complete,
    /// The run ended early, after this step.
    Drained(u64),
}

fn work(
    identity: &Identity,
    handle: &Handle,
    received: mpsc::Receiver<Received>,
    profile: Option<PathBuf>,
) -> Result<RunEnd, Fault> {
    let Some((started, work)) = start(identity, handle, received)? else {
        tracing::info!("this run is complete: there is nothing to do");
        return Ok(RunEnd::Complete);
    };
    let _inside = started.span.clone().entered();
    let kind = started.parts.policy.place.kind;
    tracing::info!(threads = kernel_threads().unwrap_or(0), ?kind, "ready");
    let steps = started.plan.total_steps.saturating_sub(started.plan.start_step);
    let profile =
        profile.map(|dir| Profile::new(dir, started.place.rank, started.device, kind, steps)).transpose()?;
    RunningTrainer::new(started, handle.clone(), profile)?.work_off(&work)
}

/// Does the coordinator's work and reports the results.
struct RunningTrainer {
    engine: Engine,
    saver: Saver,
    schedule: LearningRate,
    state: CheckpointState,
    place: Assignment,
    device: Device,
    handle: Handle,
    backlog: VecDeque<ReadyWork>,
    profile: Option<Profile>,
    reference_logps: Mode,
    /// Step of the last checkpoint: the one that was resumed from, or the last one written.
    saved: u64,
    save_total_limit: Option<u32>,
    /// With early stopping: the step of the best evaluation so far; 0 if there is none.
    best_step: u64,
    /// Answers prompts at evaluations, if the run does.
    sampler: Option<Sampler>,
    /// Whether the run writes a model; otherwise it only evaluates.
    saves: bool,
    flops: ModelFlops,
}

impl RunningTrainer {
    fn new(started: Started, handle: Handle, profile: Option<Profile>) -> Result<Self, Fault> {
        let Started {
            config,
            place,
            device,
            parts,
            communicator,
            bucket_bytes,
            plan,
            backlog,
            facts,
            sampler,
            saves,
            ..
        } = started;
        let Parts { policy, reference, parameters, saver } = parts;
        let state = CheckpointState {
            step: plan.start_step,
            total_steps: plan.total_steps,
            bucket_bytes,
            num_tokens: None,
            evaluations: None,
            rotates: false,
            best_step: None,
            early_stopped: false,
            run: RunIdentity {
                random_seed: config.random_seed,
                batch_size: config.batch_size,
                world_size: place.world_size,
                fingerprint: Fingerprint {
                    dataset_sha256: plan.dataset_sha256,
                    validation_sha256: plan.validation_sha256,
                    steps_per_epoch: plan.steps_per_epoch,
                    config: as_map(&config),
                    facts: facts.into_iter().map(|fact| (fact.name, fact.value.into())).collect(),
                },
            },
        };
        let flops = ModelFlops::new(&config, &policy.config);
        let mut engine = Engine::new(policy, reference, parameters, communicator, &config);
        engine.follow(saver.adapter.as_ref().map(|saved| saved.adapters.clone()))?;
        if !plan.resume_from.is_empty() {
            handle.enter(Phase::Loading, plan.start_step);
            resume(Path::new(&plan.resume_from), &mut engine, config.sync_ref_model, &handle)?;
        }
        let schedule = LearningRate::new(&config, plan.total_steps);
        let (reference_logps, saved) = (config.reference_logps, plan.start_step);
        Ok(Self {
            engine,
            saver,
            schedule,
            state,
            place,
            device,
            handle,
            backlog,
            profile,
            reference_logps,
            saved,
            save_total_limit: config.save_total_limit,
            best_step: 0,
            sampler,
            saves,
            flops,
        })
    }

    fn work_off(&mut self, work: &Incoming) -> Result<RunEnd, Fault> {
        loop {
            let asked = Instant::now();
            let coming = match self.backlog.pop_front() {
                Some(early) => early,
                None => next(work)?,
            };
            let counts = matches!(
                coming,
                ReadyWork::Step(_) | ReadyWork::Evaluate { .. } | ReadyWork::Reference { .. }
            );
            if counts && !self.handle.begin_work() {
                return self.drain();
            }
            match coming {
                ReadyWork::Step(step) => self.train(step, asked.elapsed())?,
                ReadyWork::Evaluate { step, pairs, references, samples } => {
                    self.evaluate(step, (&pairs, &references), &samples)?
                }
                ReadyWork::Reference { chunk, ids, pairs } => self.score_references(chunk, &ids, &pairs)?,
                ReadyWork::Finish(how) => return self.finish(how).map(|()| RunEnd::Complete),
                ReadyWork::Drain => return self.drain(),
                ReadyWork::Connect(_) | ReadyWork::Plan(_) => {
                    return Err(Fault::failed("the coordinator sent a second plan"));
                }
            }
        }
    }

    /// One optimizer step, for whose pairs this rank has waited for `waited`.
    fn train(&mut self, assigned: AssignedStep, waited: Duration) -> Result<(), Fault> {
        let share = &assigned.share;
        let step = share.step;
        self.handle.enter(Phase::Training, step);
        let (start, started) = (Instant::now(), SystemTime::now());
        let _step = trace::begin(&Beginning {
            step,
            rank: self.place.rank,
            pairs: share.pairs.len(),
            traceparent: &assigned.traceparent,
            waited,
        });
        let flops = self.flops.of(&share.pairs, &share.references);
        if self.reference_logps == Mode::Precompute {
            self.engine.release_reference();
        }
        let learning_rate = self.schedule.rate(step);
        self.profiled(Profile::before_step);
        let mut result = self.engine.train_step(share, learning_rate)?;
        result.phases.add(phase::FETCH, waited.as_secs_f64());
        let step_seconds = start.elapsed().as_secs_f64();
        self.profiled(|profile| profile.after_step(result.tokens));
        tracing::debug!(step, phases = ?result.phases, "step");
        self.state.step = step;
        self.best_step = assigned.best_step;
        let reporting = trace::part("report");
        let sums_fault = not_finite(&result.sums);
        self.handle.send(Sent::StepReport(StepReport {
            generation: assigned.generation,
            step,
            sums: Some(result.sums),
            grad_norm: result.grad_norm,
            learning_rate,
            step_seconds,
            phase_seconds: result.phases.into_map(),
            peak_memory_bytes: self.peak_memory(),
            references: scored(&assigned.ids, &result.references),
            started_unix_nanos: (started - waited).duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
                as u64,
            flops,
        }));
        drop(reporting);
        if !result.grad_norm.is_finite() {
            return Err(Fault::failed(format!("step {step}: the gradient norm is {}", result.grad_norm))
                .hint("lower learning_rate, check the pairs of this step, or train with dtype = \"float32\"")
                .lasting());
        }
        if let Some(what) = sums_fault {
            return Err(Fault::failed(format!("step {step}: {what}")).hint(NOT_FINITE).lasting());
        }
        trace::end();
        if assigned.checkpoint {
            self.state.rotates = assigned.rotates;
            self.save(false)?;
        }
        Ok(())
    }

    /// Runs `act` on the profile, if there is one. If it fails, the run goes on without a profile.
    fn profiled(&mut self, act: impl FnOnce(&mut Profile) -> Result<(), Fault>) {
        let Some(mut profile) = self.profile.take() else { return };
        match act(&mut profile) {
            Ok(()) => self.profile = Some(profile),
            Err(fault) => tracing::warn!("the run goes on without a profile: {fault}"),
        }
    }

    /// Saves on rank 0; the other ranks send it their parts of sharded tensors.
    fn save(&mut self, is_final: bool) -> Result<(), Fault> {
        self.handle.enter(Phase::Saving, self.state.step);
        let began = Instant::now();
        let _span = tracing::info_span!(target: TARGET, "checkpoint", train.step = self.state.step).entered();
        let mut kept = self.engine.parameters.collect(!is_final).map_err(EngineError::from)?;
        if !is_final {
            kept.extend(self.engine.collect_reference()?);
        }
        if self.place.rank == 0 {
            let path = match is_final {
                true => self.saver.finish(&kept, &self.state)?,
                false => {
                    // Wait for the step's row: a resumed run begins after its checkpoint and would never write that row.
                    let recorded = || self.handle.wait_recorded(self.state.step);
                    self.saver.checkpoint(&kept, &self.state, recorded)?
                }
            };
            self.report_saved(&path, is_final, began.elapsed());
            if !is_final {
                let kept = Kept { best: self.best_step, limit: self.save_total_limit };
                rotate(self.saver.home.path(), self.state.step, kept);
            }
        }
        self.saved = self.state.step;
        Ok(())
    }

    /// Writes the model of an earlier step as the final one: that of the best evaluation.
    fn save_best(&mut self, step: u64) -> Result<(), Fault> {
        self.handle.enter(Phase::Saving, self.state.step);
        let began = Instant::now();
        self.state.best_step = Some(step);
        // Every rank takes part, for the names and shapes of all tensors.
        let kept = self.engine.parameters.collect(false).map_err(EngineError::from)?;
        if self.place.rank == 0 {
            let checkpoint = self.saver.home.path().join(format!("checkpoint-{step}"));
            let best = saved_masters(&checkpoint, &kept)?;
            let path = self.saver.finish(&best, &self.state)?;
            self.report_saved(&path, true, began.elapsed());
        }
        self.saved = self.state.step;
        Ok(())
    }

    /// Ends the run early. All ranks are at the same step here.
    fn drain(&mut self) -> Result<RunEnd, Fault> {
        if self.state.step > self.saved {
            self.state.rotates = true;
            self.save(false)?;
        }
        self.profiled(Profile::finish);
        Ok(RunEnd::Drained(self.state.step))
    }

    fn score_references(&mut self, chunk: u64, ids: &[u64], pairs: &[Tokenized]) -> Result<(), Fault> {
        self.handle.enter(Phase::Evaluating, 0);
        let references = self.engine.score_references(pairs)?;
        let finite = |logps: &ReferenceLogps| logps.chosen.is_finite() && logps.rejected.is_finite();
        if !references.iter().all(finite) {
            return Err(Fault::failed("a log-probability of the reference model is NaN or infinite")
                .hint(NOT_FINITE)
                .lasting());
        }
        let references: Vec<_> = references.into_iter().map(Some).collect();
        self.handle.send(Sent::ReferenceReport(ReferenceReport {
            generation: self.place.generation,
            chunk,
            references: scored(ids, &references),
        }));
        Ok(())
    }

    fn evaluate(
        &mut self,
        step: u64,
        (pairs, references): (&[Tokenized], &[Option<ReferenceLogps>]),
        samples: &SampledPrompts,
    ) -> Result<(), Fault> {
        self.handle.enter(Phase::Evaluating, step);
        let _span = tracing::info_span!(target: TARGET, "evaluate", train.step = step).entered();
        let start = Instant::now();
        let sums = self.engine.evaluate(pairs, references)?;
        let fault = not_finite(&sums);
        let seconds = start.elapsed().as_secs_f64();
        let samples = match &self.sampler {
            Some(sampler) if fault.is_none() => sampler.answers(&self.engine, samples)?,
            _ => Vec::new(),
        };
        self.handle.send(Sent::EvaluationReport(EvaluationReport {
            generation: self.place.generation,
            step,
            sums: Some(sums),
            seconds,
            samples,
        }));
        match fault {
            None => Ok(()),
            Some(what) => {
                Err(Fault::failed(format!("evaluation after step {step}: {what}")).hint(NOT_FINITE).lasting())
            }
        }
    }

    fn finish(&mut self, how: Finish) -> Result<(), Fault> {
        self.state.early_stopped = how.early_stopped;
        match how.best_step {
            _ if !self.saves => {}
            // The best model is the one that this trainer has.
            0 => self.save(true)?,
            step if step == self.state.step => self.save(true)?,
            step => self.save_best(step)?,
        }
        self.profiled(Profile::finish);
        Ok(())
    }

    fn report_saved(&self, path: &std::path::Path, is_final: bool, took: Duration) {
        let path = path.display().to_string();
        self.handle.send(Sent::CheckpointReport(CheckpointReport {
            step: self.state.step,
            path,
            r#final: is_final,
            seconds: took.as_secs_f64(),
        }));
    }

    fn peak_memory(&self) -> u64 {
        match self.device {
            Device::Cuda(index) => cuda_peak_bytes(index).unwrap_or(0),
            _ => peak_resident_bytes(),
        }
    }
}

const NOT_FINITE: &str =
    "lower learning_rate, check the weights that the run started from, or train with dtype = \"float32\"";

/// Describes the first sum that is not finite.
fn not_finite(sums: &PreferenceSums) -> Option<String> {
    let all = [
        ("loss", sums.loss),
        ("log-probability of the preferred outputs", sums.logps_chosen),
        ("log-probability of the other outputs", sums.logps_rejected),
        ("reward of the preferred outputs", sums.rewards_chosen),
        ("reward of the other outputs", sums.rewards_rejected),
        ("KL divergence", sums.kl_chosen + sums.kl_rejected),
        ("negative log-likelihood", sums.nll),
        ("entropy", sums.entropy),
    ];
    let (name, value) = all.into_iter().find(|(_, value)| !value.is_finite())?;
    Some(format!("the {name} is {value}"))
}

/// Restores a checkpoint, and reports a digest of it: each rank reads its own copy, and all copies must be the same.
fn resume(checkpoint: &Path, engine: &mut Engine, moves: bool, handle: &Handle) -> Result<(), Fault> {
    let step = read_state(checkpoint)?.step;
    let read = Digested::default();
    let moving = engine.reference.as_mut().filter(|_| moves);
    restore(checkpoint, &mut engine.parameters, moving, &read)?;
    handle.send(Sent::Facts(Facts { facts: of_checkpoint(step, &read) }));
    Ok(())
}

/// Reference log-probabilities with their pairs' ids, where the reference model was asked.
fn scored(ids: &[u64], references: &[Option<ReferenceLogps>]) -> Vec<PairReference> {
    let scored = ids.iter().zip(references).filter(|(_, logps)| logps.is_some());
    scored.map(|(&id, &logps)| PairReference { id, logps }).collect()
}

/// Loads a model for inference, on the CPU in float32.
pub fn load_for_inference(dir: &Path) -> Result<(Model, PathBuf), Fault> {
    dyad_torch::panics::caught(|| {
        crate::generate::load(dir, dyad_torch::place::Place { device: Device::Cpu, kind: tch::Kind::Float })
    })
}
