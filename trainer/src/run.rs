//! A trainer's life: join, load, connect, work off what the coordinator sends, leave.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use dyad_data::reference_key::ReferenceModel;
use dyad_data::tokenize::{Rule, Tokenized};
use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::run_config::{ReferenceLogps as Mode, TrainingMethod};
use dyad_proto::wire::coordinator_message::Body as Received;
use dyad_proto::wire::trainer_message::Body as Sent;
use dyad_proto::wire::{
    Assignment, BootstrapOffer, CheckpointReport, EvaluationReport, ModelReport, PairReference, Phase,
    ReferenceLogps, ReferenceReport, RunPlan, StepReport,
};
use dyad_proto::{Fault, RunConfig};
use tch::{Device, Tensor};

use crate::batch::Layout;
use crate::checkpoint::{State, load::restore, save::Saver, saved_bucket_bytes};
use crate::comm::Communicator;
use crate::comm::measure::{USUAL_BUCKET, measure};
use crate::cost::PassCost;
use crate::device;
use crate::engine::{Engine, EngineError, Share};
use crate::ext::cuda_peak_bytes;
use crate::feed::{self, Step, Work};
use crate::layout::Sharding;
use crate::load::{Among, Parts, Sources};
use crate::model::{Model, ModelConfig};
use crate::profile::Profile;
use crate::rendezvous::Rendezvous;
use crate::schedule::Schedule;
use crate::session::{Handle, Identity, Session};
use crate::timing::peak_resident_bytes;

/// Joins the run at the coordinator and trains until it is over; profiles a few steps where a folder for that is given.
pub fn run(identity: &Identity, profile: Option<PathBuf>) -> Result<(), Fault> {
    let (session, received) = Session::open(identity)?;
    let handle = session.handle();
    match crate::panics::caught(|| work(identity, &handle, received, profile)) {
        Ok(()) => {
            session.finish();
            Ok(())
        }
        Err(fault) => {
            session.fail(fault.clone());
            Err(fault)
        }
    }
}

fn work(
    identity: &Identity,
    handle: &Handle,
    received: mpsc::Receiver<Received>,
    profile: Option<PathBuf>,
) -> Result<(), Fault> {
    let device = device::open(&identity.device)?;
    let (config, place) = joined(&received)?;
    tracing::info!(rank = place.rank, world_size = place.world_size, "joined");
    let sources = Sources::resolve(&config)?;
    let tokenizer = ChatTokenizer::load(sources.tokenizer())?;
    let preferred_only = config.training_method == TrainingMethod::Sft;
    let rule = Rule { max_len: sources.max_seq_length(&config)?, preferred_only };
    let cost = PassCost::new(&ModelConfig::load(&sources.base)?, Layout::of(&config));
    let work = feed::start(received, tokenizer, rule, cost, handle.clone())?;
    handle.enter(Phase::Rendezvous, 0);
    let mut backlog = VecDeque::new();
    let rendezvous = Rendezvous::new(device, place, &identity.coordinator)?;
    let communicator = connect(rendezvous, handle, &work, &mut backlog)?;
    let among = Among {
        sharding: Sharding::new(&config, place.rank as usize, place.world_size as usize),
        bucket_bytes: bucket_bytes(communicator.as_ref(), device, &config)?,
    };
    handle.enter(Phase::Loading, 0);
    let start = Instant::now();
    let mut parts = Parts::load(&config, &sources, device, among)?;
    let bytes = parts.parameters.bytes();
    tracing::info!(
        weights_mib = bytes.weights >> 20,
        gradients_mib = bytes.gradients >> 20,
        optimizer_mib = bytes.optimizer >> 20,
        "kept between steps"
    );
    let mut reference_key = String::new();
    if place.rank == 0 && config.keeps_references() {
        let place = parts.policy.place;
        reference_key = ReferenceModel {
            weights: [Some(&sources.base), sources.adapter.as_ref()]
                .into_iter()
                .flatten()
                .map(PathBuf::as_path)
                .collect(),
            tokenizer: sources.tokenizer(),
            arithmetic: format!("{:?} {}", place.kind, if place.device.is_cuda() { "cuda" } else { "cpu" }),
            max_seq_length: rule.max_len,
        }
        .key()?;
    }
    handle.send(Sent::ModelReport(ModelReport {
        architecture: parts.policy.config.model_type.clone(),
        parameters: parts.policy.parameter_count(),
        trainable_parameters: parts.parameters.count(),
        load_seconds: start.elapsed().as_secs_f64(),
        reference_key,
    }));
    handle.enter(Phase::Measuring, 0);
    let ready = Ready {
        communicator,
        plan: planned(&work, &mut backlog)?,
        backlog,
        bucket_bytes: among.bucket_bytes,
    };
    let kind = parts.policy.place.kind;
    let mut trainer = Trainer::new(&config, place, parts, ready, handle.clone())?;
    trainer.profile = profile.map(|dir| Profile::new(dir, place.rank, device, kind));
    trainer.work_off(&work)
}

fn joined(received: &mpsc::Receiver<Received>) -> Result<(RunConfig, Assignment), Fault> {
    let mut config = None;
    for body in received {
        match (body, config.take()) {
            (Received::Welcome(welcome), _) => config = Some(RunConfig::from_json(&welcome.run_config_json)?),
            (Received::Assignment(place), Some(config)) => return Ok((config, place)),
            _ => return Err(Fault::failed("the coordinator sent work before an assignment")),
        }
    }
    Err(ended())
}

fn ended() -> Fault {
    Fault::failed("the stream of work ended early")
}

/// Connected ranks, the plan, and what arrived before both were there.
struct Ready {
    communicator: Arc<dyn Communicator>,
    plan: RunPlan,
    backlog: VecDeque<Work>,
    bucket_bytes: i64,
}

/// Meets the other ranks; what arrives before goes to the backlog.
fn connect(
    mut rendezvous: Rendezvous,
    handle: &Handle,
    work: &mpsc::Receiver<Result<Work, Fault>>,
    backlog: &mut VecDeque<Work>,
) -> Result<Arc<dyn Communicator>, Fault> {
    if let Some(payload) = rendezvous.offer()? {
        handle.send(Sent::BootstrapOffer(BootstrapOffer { generation: rendezvous.generation(), payload }));
    }
    loop {
        match work.recv().map_err(|_| ended())?? {
            Work::Connect(ready) => {
                let communicator = rendezvous.connect(&ready)?;
                handle.set_communicator(communicator.clone());
                return Ok(communicator);
            }
            other => backlog.push_back(other),
        }
    }
}

fn planned(
    work: &mpsc::Receiver<Result<Work, Fault>>,
    backlog: &mut VecDeque<Work>,
) -> Result<RunPlan, Fault> {
    let early = backlog.iter().position(|work| matches!(work, Work::Plan(_)));
    if let Some(Work::Plan(plan)) = early.and_then(|index| backlog.remove(index)) {
        return Ok(plan);
    }
    loop {
        match work.recv().map_err(|_| ended())?? {
            Work::Plan(plan) => return Ok(plan),
            other => backlog.push_back(other),
        }
    }
}

/// What the link between the ranks wants. A run that is resumed keeps what it had: gradients that are grouped otherwise are
/// summed in another order.
fn bucket_bytes(
    communicator: &dyn Communicator,
    device: Device,
    config: &RunConfig,
) -> Result<i64, EngineError> {
    if communicator.world_size() == 1 {
        return Ok(USUAL_BUCKET);
    }
    let saved = match communicator.rank() {
        0 => saved_bucket_bytes(Path::new(&config.output_dir)).unwrap_or(0),
        _ => 0,
    };
    let told = Tensor::from_slice(&[saved]).to_device(device);
    communicator.broadcast(&told, 0)?.wait()?;
    let saved = told.int64_value(&[0]);
    if saved > 0 {
        return Ok(saved);
    }
    let speed = measure(communicator, device)?;
    let bytes = speed.bucket_bytes();
    tracing::info!("link: {speed}; buckets of {} MiB", bytes >> 20);
    Ok(bytes)
}

/// Everything that turns work into reports.
struct Trainer {
    engine: Engine,
    saver: Saver,
    schedule: Schedule,
    state: State,
    place: Assignment,
    device: Device,
    handle: Handle,
    backlog: VecDeque<Work>,
    profile: Option<Profile>,
    reference_logps: Mode,
}

impl Trainer {
    fn new(
        config: &RunConfig,
        place: Assignment,
        parts: Parts,
        ready: Ready,
        handle: Handle,
    ) -> Result<Self, Fault> {
        let Parts { policy, reference, parameters, saver } = parts;
        let plan = ready.plan;
        let state = State {
            step: plan.start_step,
            total_steps: plan.total_steps,
            dataset_sha256: plan.dataset_sha256,
            random_seed: config.random_seed,
            batch_size: config.batch_size,
            world_size: place.world_size,
            bucket_bytes: ready.bucket_bytes,
        };
        let device = policy.place.device;
        let mut engine = Engine::new(policy, reference, parameters, ready.communicator, config);
        if !plan.resume_from.is_empty() {
            restore(&PathBuf::from(&plan.resume_from), &mut engine.parameters)?;
        }
        let schedule = Schedule::new(config, plan.total_steps);
        Ok(Self {
            engine,
            saver,
            schedule,
            state,
            place,
            device,
            handle,
            backlog: ready.backlog,
            profile: None,
            reference_logps: config.reference_logps,
        })
    }

    fn work_off(&mut self, work: &mpsc::Receiver<Result<Work, Fault>>) -> Result<(), Fault> {
        loop {
            let next = match self.backlog.pop_front() {
                Some(next) => next,
                None => work.recv().map_err(|_| ended())??,
            };
            match next {
                Work::Step(step) => self.train(step)?,
                Work::Evaluate { step, pairs, references } => self.evaluate(step, &pairs, &references)?,
                Work::Reference { chunk, ids, pairs } => self.score_references(chunk, &ids, &pairs)?,
                Work::Finish => return self.finish(),
                Work::Connect(_) | Work::Plan(_) => {
                    return Err(Fault::failed("the coordinator sent a second plan"));
                }
            }
        }
    }

    fn train(&mut self, step: Step) -> Result<(), Fault> {
        self.handle.enter(Phase::Training, step.step);
        let start = Instant::now();
        if self.reference_logps == Mode::Precompute {
            self.engine.release_reference();
        }
        let learning_rate = self.schedule.rate(step.step);
        let share = Share {
            step: step.step,
            pairs: step.pairs,
            references: step.references,
            global_pairs: step.global_pairs,
            global_chosen_tokens: step.global_chosen_tokens,
            learning_rate,
        };
        if let Some(profile) = &mut self.profile {
            profile.before_step()?;
        }
        let result = self.engine.train_step(&share)?;
        let step_seconds = start.elapsed().as_secs_f64();
        if let Some(profile) = &mut self.profile {
            profile.after_step(result.tokens)?;
        }
        tracing::debug!(step = step.step, phases = ?result.phases, "step");
        self.state.step = step.step;
        self.handle.send(Sent::StepReport(StepReport {
            generation: step.generation,
            step: step.step,
            sums: Some(result.sums),
            grad_norm: result.grad_norm,
            learning_rate,
            step_seconds,
            phase_seconds: result.phases.into_map(),
            peak_memory_bytes: self.peak_memory(),
            references: scored(&step.ids, &result.references),
        }));
        if !result.grad_norm.is_finite() {
            return Err(Fault::failed(format!(
                "step {}: the gradient norm is {}",
                step.step, result.grad_norm
            ))
            .hint("lower learning_rate, check the pairs of this step, or train with dtype = \"float32\""));
        }
        if step.checkpoint { self.save(false) } else { Ok(()) }
    }

    /// Rank 0 writes; the others bring it their parts of what is sharded.
    fn save(&mut self, is_final: bool) -> Result<(), Fault> {
        self.handle.enter(Phase::Saving, self.state.step);
        let kept = self.engine.parameters.collect(!is_final).map_err(EngineError::from)?;
        if self.place.rank == 0 {
            let path = match is_final {
                true => self.saver.finish(&mut self.engine.policy, &kept)?,
                false => self.saver.checkpoint(&mut self.engine.policy, &kept, &self.state)?,
            };
            self.report_saved(&path, is_final);
        }
        Ok(())
    }

    fn score_references(&mut self, chunk: u64, ids: &[u64], pairs: &[Tokenized]) -> Result<(), Fault> {
        self.handle.enter(Phase::Evaluating, 0);
        let references: Vec<_> = self.engine.score_references(pairs)?.into_iter().map(Some).collect();
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
        pairs: &[Tokenized],
        references: &[Option<ReferenceLogps>],
    ) -> Result<(), Fault> {
        self.handle.enter(Phase::Evaluating, step);
        let start = Instant::now();
        let sums = self.engine.evaluate(pairs, references)?;
        self.handle.send(Sent::EvaluationReport(EvaluationReport {
            generation: self.place.generation,
            step,
            sums: Some(sums),
            seconds: start.elapsed().as_secs_f64(),
        }));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Fault> {
        if let Some(profile) = &mut self.profile {
            profile.finish()?;
        }
        self.save(true)
    }

    fn report_saved(&self, path: &std::path::Path, is_final: bool) {
        let path = path.display().to_string();
        self.handle.send(Sent::CheckpointReport(CheckpointReport {
            step: self.state.step,
            path,
            r#final: is_final,
        }));
    }

    fn peak_memory(&self) -> u64 {
        match self.device {
            Device::Cuda(index) => cuda_peak_bytes(index).unwrap_or(0),
            _ => peak_resident_bytes(),
        }
    }
}

/// What the reference model said, by pair, where it was asked.
fn scored(ids: &[u64], references: &[Option<ReferenceLogps>]) -> Vec<PairReference> {
    let scored = ids.iter().zip(references).filter(|(_, logps)| logps.is_some());
    scored.map(|(&id, &logps)| PairReference { id, logps }).collect()
}

/// Loads a model for inference alone.
pub fn load_for_inference(dir: &std::path::Path) -> Result<Model, Fault> {
    crate::panics::caught(|| {
        crate::generate::load(
            dir,
            crate::model::weights::Place { device: Device::Cpu, kind: tch::Kind::Float },
        )
    })
}
