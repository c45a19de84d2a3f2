//! Starts a trainer: joins a run, connects the ranks and loads the models.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use dyad_data::pair_tokenizer::{CACHE_BYTES, PairTokenizer};
use dyad_data::reference_key::ReferenceModel;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::Rule;
use dyad_proto::wire::coordinator_message::Body as Received;
use dyad_proto::wire::trainer_message::Body as Sent;
use dyad_proto::wire::{
    Assignment, BootstrapOffer, EvaluationOnly, Fact, Facts, ModelReport, Phase, RunPlan, Waiting,
};
use dyad_proto::{Fault, RunConfig};
use dyad_telemetry::TARGET;
use tch::{Device, Tensor};

use crate::batch::PairLayout;
use crate::checkpoint::{Home, read_state};
use crate::cost::flops::PassCost;
use crate::cost::utilisation::peak_flops;
use crate::error::EngineError;
use crate::facts;
use crate::load::{Parts, RankLayout, Sources};
use crate::load::{evaluated, reading_ranks};
use crate::observe::gpu_meter;
use crate::observe::progress;
use crate::sampler::Sampler;
use crate::session::feed::{self, ReadyWork};
use crate::session::rendezvous::Rendezvous;
use crate::session::{Handle, Identity};
use crate::zero::ranges::Sharding;
use dyad_families::ModelConfig;
use dyad_torch::comm::measure::{USUAL_BUCKET, measure};
use dyad_torch::comm::{Communicator, narrow};
use dyad_torch::device;

/// Pieces of work that are ready to compute, in order.
pub type Incoming = mpsc::Receiver<Result<ReadyWork, Fault>>;

/// A trainer that is ready to work.
#[derive(Debug)]
pub struct Started {
    /// The checked configuration.
    pub config: RunConfig,
    /// This trainer's rank.
    pub place: Assignment,
    /// Where the passes run.
    pub device: Device,
    /// Models and parameters.
    pub parts: Parts,
    /// Whether the run writes a model; otherwise it only evaluates.
    pub saves: bool,
    /// The connected ranks.
    pub communicator: Arc<dyn Communicator>,
    /// Size of a bucket of gradients, in bytes.
    pub bucket_bytes: i64,
    /// The plan of the run.
    pub plan: RunPlan,
    /// Work that arrived during the start.
    pub backlog: VecDeque<ReadyWork>,
    /// Answers prompts at evaluations, if the run does.
    pub sampler: Option<Sampler>,
    /// Facts that decide this rank's results, as sent to the coordinator.
    pub facts: Vec<Fact>,
    /// Span of this trainer's part in the run, for traces.
    pub span: tracing::Span,
}

/// Joins, connects, loads. Later work arrives at the receiver. Returns `None` if the run is already complete.
pub fn start(
    identity: &Identity,
    handle: &Handle,
    received: mpsc::Receiver<Received>,
) -> Result<Option<(Started, Incoming)>, Fault> {
    let device = device::open(&identity.device)?;
    gpu_meter::watch(device);
    let Some(Joined { config, place, run, resume_from, evaluation_only }) = joined(&received)? else {
        return Ok(None);
    };
    let span = process_span(place, &run);
    let inside = span.clone().entered();
    tracing::info!(rank = place.rank, world_size = place.world_size, "joined");
    // Before loading, which takes long.
    let writes = place.rank == 0 && evaluation_only.is_none();
    let home = writes.then(|| Home::settled(Path::new(&config.output_dir))).transpose()?;
    let sources = checked_sources(&config, place.rank)?;
    let against = evaluation_only.as_ref().map(|only| evaluated::reference(&only.reference)).transpose()?;
    let load = || ChatTokenizer::load(sources.tokenizer(), &sources.base, config.template_date()?);
    let tokenizer = load()?;
    let model = ModelConfig::load(&sources.base)?;
    let embedding_rows = u32::try_from(model.vocab_size).unwrap_or(0);
    let rule = Rule::of(&config, sources.max_seq_length(&config)?, embedding_rows);
    let samples = config.n_samples > 0;
    let sampler = samples.then(load).transpose()?.map(|own| Sampler::new(own, &config, rule.max_len));
    // Before this trainer measures pairs with these files.
    let mut facts = facts::of_files(&config, &sources, device, rule.max_len)?;
    handle.send(Sent::Facts(Facts { facts: facts.clone() }));
    let cost = PassCost::new(&model, PairLayout::of(&config));
    let tokenizer = PairTokenizer::new(tokenizer, rule, CACHE_BYTES);
    let work = feed::start(received, tokenizer, cost, handle.clone())?;
    handle.enter(Phase::Rendezvous, 0);
    let connecting = tracing::info_span!(target: TARGET, "rendezvous").entered();
    let mut backlog = VecDeque::new();
    let board = handle.board(place.generation);
    let rendezvous = Rendezvous::new(device, place, &identity.coordinator, board)?;
    let communicator = connect(rendezvous, handle, &work, &mut backlog)?;
    let ranks = RankLayout {
        sharding: Sharding::new(&config, place.rank as usize, place.world_size as usize),
        bucket_bytes: bucket_bytes(communicator.as_ref(), device, &config, Path::new(&resume_from))?,
    };
    drop(connecting);
    handle.enter(Phase::Loading, 0);
    let loading = tracing::info_span!(target: TARGET, "load").entered();
    let began = Instant::now();
    let reading = reading_ranks::choose(&config, &sources, &communicator, device)?;
    let mut parts = match &against {
        None => Parts::load_by(&config, &sources, device, ranks, &reading)?,
        Some(other) => Parts::load_to_evaluate(&config, (&sources, other.as_ref()), device, ranks, &reading)?,
    };
    parts.saver.home = home.unwrap_or(parts.saver.home);
    let loaded = facts::of_weights(&mut parts.policy, &reading.digest.unwrap_or_default());
    facts.extend(loaded.iter().cloned());
    handle.send(Sent::Facts(Facts { facts: loaded }));
    tracing::info!(seconds = began.elapsed().as_secs_f32(), "loaded");
    let keeps = place.rank == 0 && config.keeps_references();
    let reference_key = keeps.then(|| reference_key(&config, &sources, &parts)).transpose()?;
    report(handle, &mut parts, began, reference_key.unwrap_or_default());
    drop(loading);
    let plan = plan_of_pairs(handle, &work, &mut backlog)?;
    drop(inside);
    let started = Started {
        saves: against.is_none(),
        config,
        place,
        device,
        parts,
        communicator,
        bucket_bytes: ranks.bucket_bytes,
        plan,
        backlog,
        sampler,
        facts,
        span,
    };
    Ok(Some((started, work)))
}

/// The run's files with their check sums. One rank checks every byte. If the weights of other ranks differ from its weights, the
/// comparison of facts reports it.
fn checked_sources(config: &RunConfig, rank: u32) -> Result<Sources, Fault> {
    let sources = Sources::resolve(config)?;
    let edited = sources.check_sums(rank == 0)?;
    edited.iter().filter(|_| rank == 0).for_each(|line| tracing::warn!("{line}"));
    Ok(sources)
}

/// Key of everything that the reference model's scores depend on.
fn reference_key(config: &RunConfig, sources: &Sources, parts: &Parts) -> Result<String, Fault> {
    let place = parts.policy.place;
    let device = if place.device.is_cuda() { "cuda" } else { "cpu" };
    let tails = config.ld_alpha.map(|weight| format!(" ld_alpha {weight}")).unwrap_or_default();
    let weights = [Some(&sources.base), sources.adapter.as_ref()];
    let key = ReferenceModel {
        weights: weights.into_iter().flatten().map(PathBuf::as_path).collect(),
        arithmetic: format!("{:?} {device}{tails}", place.kind),
    };
    key.key()
}

fn report(handle: &Handle, parts: &mut Parts, began: Instant, reference_key: String) {
    let bytes = parts.parameters.bytes();
    tracing::info!(
        weights_mib = bytes.weights >> 20,
        gradients_mib = bytes.gradients >> 20,
        optimizer_mib = bytes.optimizer >> 20,
        "kept between steps"
    );
    handle.send(Sent::ModelReport(ModelReport {
        architecture: parts.policy.config.model_type.clone(),
        parameters: parts.policy.parameter_count(),
        trainable_parameters: parts.parameters.count(),
        load_seconds: began.elapsed().as_secs_f64(),
        reference_key,
        peak_flops: peak_flops(parts.policy.place),
        precision: device::precision(parts.policy.place.kind).into(),
    }));
}

/// The span of this process, below the run's span, however the process was started.
fn process_span(place: Assignment, run: &str) -> tracing::Span {
    let span = tracing::info_span!(target: TARGET, "trainer", train.rank = place.rank, train.generation = place.generation);
    if let Some(run) = dyad_telemetry::parse(run) {
        dyad_telemetry::adopt(&span, &run);
    }
    span
}

/// What the coordinator tells this trainer when it joins.
struct Joined {
    /// Set if the run only evaluates.
    evaluation_only: Option<EvaluationOnly>,
    config: RunConfig,
    place: Assignment,
    /// The run's trace context.
    run: String,
    /// Checkpoint folder; empty for a fresh run.
    resume_from: String,
}

fn joined(received: &mpsc::Receiver<Received>) -> Result<Option<Joined>, Fault> {
    let mut welcomed = None;
    while let Ok(body) = progress::waiting(Waiting::Work, || received.recv()) {
        match (body, welcomed.take()) {
            (Received::Welcome(welcome), _) => {
                welcomed = Some((RunConfig::from_json(&welcome.run_config_json)?, welcome));
            }
            (Received::Assignment(place), Some((config, welcome))) if place.rank < place.world_size => {
                let (run, resume_from) = (welcome.traceparent, welcome.resume_from);
                let evaluation_only = welcome.evaluation_only;
                return Ok(Some(Joined { config, place, run, resume_from, evaluation_only }));
            }
            (Received::Finish(_), None) => return Ok(None),
            (Received::Assignment(_), Some(_)) => {
                return Err(Fault::failed("the coordinator gave this trainer a rank beyond the world size"));
            }
            _ => return Err(Fault::failed("the coordinator sent work before an assignment")),
        }
    }
    Err(ended())
}

/// Waits for the next work.
pub(crate) fn next(work: &Incoming) -> Result<ReadyWork, Fault> {
    progress::waiting(Waiting::Work, || work.recv()).map_err(|_| ended())?
}

/// The error for a stream that closes too early.
fn ended() -> Fault {
    Fault::failed("the stream of work ended early")
}

/// Connects to the other ranks; work that arrives before goes to the backlog.
fn connect(
    mut rendezvous: Rendezvous,
    handle: &Handle,
    work: &Incoming,
    backlog: &mut VecDeque<ReadyWork>,
) -> Result<Arc<dyn Communicator>, Fault> {
    if let Some(payload) = rendezvous.offer()? {
        handle.send(Sent::BootstrapOffer(BootstrapOffer { generation: rendezvous.generation(), payload }));
    }
    loop {
        match next(work)? {
            ReadyWork::Connect(ready) => {
                let communicator = rendezvous.connect(&ready)?;
                handle.set_communicator(communicator.clone());
                return Ok(communicator);
            }
            other => backlog.push_back(other),
        }
    }
}

/// Waits for the plan, which the coordinator makes of the lengths that all trainers measure.
fn plan_of_pairs(
    handle: &Handle,
    work: &Incoming,
    backlog: &mut VecDeque<ReadyWork>,
) -> Result<RunPlan, Fault> {
    handle.enter(Phase::Measuring, 0);
    let _measuring = tracing::info_span!(target: TARGET, "measure").entered();
    let early = backlog.iter().position(|work| matches!(work, ReadyWork::Plan(_)));
    if let Some(ReadyWork::Plan(plan)) = early.and_then(|index| backlog.remove(index)) {
        return Ok(plan);
    }
    loop {
        match next(work)? {
            ReadyWork::Plan(plan) => return Ok(plan),
            other => backlog.push_back(other),
        }
    }
}

/// Size of a bucket of gradients for the link between the ranks, in bytes. A resumed run keeps its size: other buckets would sum
/// gradients in another order.
fn bucket_bytes(
    communicator: &dyn Communicator,
    device: Device,
    config: &RunConfig,
    resume_from: &Path,
) -> Result<i64, EngineError> {
    if communicator.world_size() == 1 {
        return Ok(USUAL_BUCKET);
    }
    let saved = match communicator.rank() {
        // An unreadable state counts as none: restoring the checkpoint reports a better error.
        0 if !resume_from.as_os_str().is_empty() => {
            read_state(resume_from).map_or(0, |state| state.bucket_bytes)
        }
        _ => 0,
    };
    let told = Tensor::from_slice(&[saved]).to_device(device);
    communicator.broadcast(&told, 0)?.wait()?;
    let saved = told.int64_value(&[0]);
    if saved > 0 {
        return Ok(saved);
    }
    let speed = measure(communicator, device)?;
    let bytes = speed.bucket_bytes(communicator.piece_bytes(), narrow::kind(config.reduce_dtype));
    tracing::info!("link: {speed}; buckets of {} MiB", bytes >> 20);
    Ok(bytes)
}
