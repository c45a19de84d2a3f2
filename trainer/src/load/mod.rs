//! Loads the models and trainable parameters of a run. [`reading_ranks`] decides which ranks read the files; [`evaluated`] loads models that
//! are only evaluated.

pub mod evaluated;
pub mod reading_ranks;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use dyad_data::adapter::{self, ADAPTER_CONFIG};
use dyad_data::files::is_there;
use dyad_data::tokenizer::class_without_model;
use dyad_proto::{Fault, RunConfig, lfs, manifest};
use dyad_sources::hub;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::Home;
use crate::checkpoint::save::{SavedAdapter, Saver};
use crate::model::lora::{self, Adapters, BaseFolder};
use crate::model::weights::listed;
use crate::model::weights::{Digested, Reading};
use crate::model::{Model, moving_reference, stored_kind};
use crate::zero::parameters::{Keeping, Named, Parameters};
use crate::zero::ranges::{Layout, Sharding};
use crate::zero::unit_weights::{Keep, Link, UnitWeights};
use dyad_families::ModelConfig;
use dyad_torch::comm::measure::USUAL_BUCKET;
use dyad_torch::comm::narrow;
use dyad_torch::device::compute_kind;
use dyad_torch::ops::attention_kernel::announce;
use dyad_torch::place::Place;

/// Local folders that a run starts from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Whole model whose weights the run starts from.
    pub base: PathBuf,
    /// Adapter on top of it that the run continues.
    pub adapter: Option<PathBuf>,
    /// Folders that may hold the tokenizer; the first with a tokenizer.json wins.
    pub companions: Vec<PathBuf>,
}

impl Sources {
    /// Finds or downloads `model` and `from_checkpoint`. Without `model`, `from_checkpoint` is the model, or an adapter that names it.
    pub fn resolve(config: &RunConfig) -> Result<Self, Fault> {
        Self::resolve_by(config, &hub::resolve_at)
    }

    /// The same; `find` returns the folder of a name at a revision.
    pub fn resolve_by(
        config: &RunConfig,
        find: &dyn Fn(&str, &str) -> Result<PathBuf, Fault>,
    ) -> Result<Self, Fault> {
        let revision = config.model_revision.as_deref().unwrap_or(hub::MAIN);
        let start = config.from_checkpoint.as_deref().map(|start| find(start, hub::MAIN)).transpose()?;
        let adapter = start.clone().filter(|dir| adapter::is_adapter(dir));
        if let (Some(dir), false) = (&adapter, config.lora) {
            return Err(Fault::input(format!(
                "from_checkpoint {} is an adapter, but lora is false",
                dir.display()
            ))
            .hint("set lora = true to continue the adapter, or start from its merged model"));
        }
        let model = match (config.model.is_empty(), &adapter, &start) {
            (false, ..) | (true, None, None) => find(&config.model, revision)?,
            (true, Some(dir), _) => {
                let base = adapter::Base::required(dir)?;
                find(&base.name, base.revision.as_deref().unwrap_or(hub::MAIN))?
            }
            (true, None, Some(dir)) => dir.clone(),
        };
        if adapter::is_adapter(&model) {
            if is_there(&model.join("config.json")) {
                return Err(Fault::input(format!(
                    "{} holds a whole model (config.json) and an adapter ({ADAPTER_CONFIG})",
                    model.display()
                ))
                .hint("transformers would load the adapter's base; keep the two in folders of their own"));
            }
            return Err(Fault::input(format!("model {} is an adapter, not a whole model", model.display()))
                .hint(
                    "name the base model in `model` and the adapter in `from_checkpoint`, with lora = true",
                ));
        }
        let base = start.clone().filter(|_| adapter.is_none()).unwrap_or_else(|| model.clone());
        let mut companions: Vec<PathBuf> = start.into_iter().chain([model]).collect();
        companions.dedup();
        companions.iter().try_for_each(|dir| lfs::refuse_pointers_in(dir))?;
        companions.iter().take(companions.len() - 1).for_each(|dir| warn_of_half_a_tokenizer(dir));
        Ok(Self { base, adapter, companions })
    }

    /// Checks folders that a run of Dyad wrote against their checksums; returns what was edited since. Without `bytes` only sizes are
    /// compared.
    pub fn check_sums(&self, bytes: bool) -> Result<Vec<String>, Fault> {
        let folders = [Some(&self.base), self.adapter.as_ref()];
        let checked = folders.into_iter().flatten().map(|dir| manifest::check_start(dir, bytes));
        Ok(checked.collect::<Result<Vec<_>, Fault>>()?.into_iter().flatten().collect())
    }

    /// Folder of the tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Path {
        self.companions.iter().find(|dir| is_there(&dir.join("tokenizer.json"))).unwrap_or(&self.base)
    }

    /// Most tokens of a sequence: the run's `max_seq_length`, else the model's limit.
    pub fn max_seq_length(&self, config: &RunConfig) -> Result<usize, Fault> {
        let limit = ModelConfig::load(&self.base)?.max_position_embeddings.max(1) as usize;
        let asked = config.max_seq_length.map_or(limit, |length| length as usize);
        if asked > limit {
            tracing::warn!(
                max_seq_length = asked,
                max_position_embeddings = limit,
                "longer than the model was made for"
            );
        }
        Ok(asked)
    }
}

/// Warns if a folder has tokenizer files but no tokenizer.json: they are ignored, because they belong to a tokenizer in the same folder.
fn warn_of_half_a_tokenizer(dir: &Path) {
    let there = |name: &&&str| is_there(&dir.join(name));
    if is_there(&dir.join("tokenizer.json")) {
        return;
    }
    let found: Vec<&str> = hub::TOKENIZER_COMPANIONS.iter().filter(there).copied().collect();
    if !found.is_empty() {
        tracing::warn!(
            "{} has no tokenizer.json: its {} are passed over, and tokenizer and template are those of `model`",
            dir.display(),
            listed(&found)
        );
    }
}

/// Settings on which the ranks have agreed.
#[derive(Clone, Copy, Debug)]
pub struct RankLayout {
    /// What is sharded over the ranks.
    pub sharding: Sharding,
    /// Size of a bucket of gradients, in bytes.
    pub bucket_bytes: i64,
}

impl RankLayout {
    /// Settings of a run with one rank.
    pub const ONE_RANK: Self = Self { sharding: Sharding::NONE, bucket_bytes: USUAL_BUCKET };
}

/// Everything that is loaded for a run.
#[derive(Debug)]
pub struct Parts {
    /// The model that trains.
    pub policy: Model,
    /// The frozen model that DPO compares the policy with.
    pub reference: Option<Model>,
    /// Trainable parameters of the policy.
    pub parameters: Parameters,
    /// Writes checkpoints of the policy.
    pub saver: Saver,
}

impl Parts {
    /// Loads everything onto the device; of sharded tensors, only this rank's part.
    pub fn load(
        config: &RunConfig,
        sources: &Sources,
        device: Device,
        ranks: RankLayout,
    ) -> Result<Self, Fault> {
        Self::load_by(config, sources, device, ranks, &Reading::default())
    }

    /// The same; `reading` says which rank reads the files.
    pub fn load_by(
        config: &RunConfig,
        sources: &Sources,
        device: Device,
        RankLayout { sharding, bucket_bytes }: RankLayout,
        reading: &Reading,
    ) -> Result<Self, Fault> {
        let place = Place { device, kind: compute_kind(config.dtype, device) };
        let compares = config.objective().needs_reference();
        let keeping = Keeping {
            compute: place.kind,
            sharding,
            travels_as: narrow::kind(config.reduce_dtype),
            link: Link::default(),
            optim: config.optim,
            bucket_bytes,
            offload_optimizer: config.offload_optimizer,
        };
        let (policy, reference, parameters, adapter) = match config.lora {
            true => adapters(config, (sources, reading), place, compares, keeping)?,
            false => {
                let keep = if config.offload_reference { Keep::Host } else { Keep::Device };
                full((sources, reading), place, compares.then_some(keep), keeping)?
            }
        };
        policy.config.refuse_dropout()?;
        announce(policy.config.head_dim, place)?;
        let saver = Saver {
            home: Home::new(Path::new(&config.output_dir)),
            tokenizer: sources.tokenizer().to_owned(),
            tokenizer_class: class_without_model(sources.tokenizer())?,
            base: sources.base.clone(),
            stored: stored_kind(&policy.config.torch_dtype),
            adapter,
            merge: config.merge_adapter,
            not_finite: reading.digest.as_ref().map(Digested::not_finite).unwrap_or_default(),
        };
        warn_of_not_finite(&saver.not_finite, &sources.base);
        Ok(Self { policy, reference, parameters, saver })
    }
}

/// Only warns, because other trainers accept such a model: often these are rows of the embedding that no token uses.
fn warn_of_not_finite(names: &BTreeSet<String>, dir: &Path) {
    if names.is_empty() {
        return;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    tracing::warn!("NaN or infinite numbers are in the weights of {}: {}", dir.display(), listed(&names));
}

type Loaded = (Model, Option<Model>, Parameters, Option<SavedAdapter>);

/// Folders, and how to read them.
type Origin<'a> = (&'a Sources, &'a Reading);

fn full(
    (sources, reading): Origin<'_>,
    place: Place,
    reference: Option<Keep>,
    keeping: Keeping,
) -> Result<Loaded, Fault> {
    let wide = Place { kind: Kind::Float, ..place };
    let (mut policy, parameters) = if keeping.sharding.of_weights() {
        let units = ModelConfig::load(&sources.base)?.num_hidden_layers + 2;
        let mut parameters = Parameters::none(units, keeping);
        let mut take = |unit: usize, tensors: Vec<Named<'_>>| parameters.adopt_unit(unit, tensors);
        (Model::load_units(&sources.base, wide, reading, &mut take)?, parameters)
    } else {
        let mut policy = Model::load_units(&sources.base, wide, reading, &mut |_, _| {})?;
        let parameters = Parameters::adopt(policy.units(), keeping);
        (policy, parameters)
    };
    policy.place = place;
    parameters.reside(&mut policy.residence);
    let reference = reference.map(|keep| policy.frozen_copy(keep));
    Ok((policy, reference, parameters, None))
}

fn adapters(
    config: &RunConfig,
    (sources, reading): Origin<'_>,
    place: Place,
    compares: bool,
    keeping: Keeping,
) -> Result<Loaded, Fault> {
    let mut policy = base((sources, reading), place, &keeping)?;
    let adapters = Adapters::of_run(config, sources.adapter.as_deref(), &mut policy)?;
    let name = base_name(config, sources);
    if let Some(warning) = adapter::base::mismatch(adapters.base(), &name, &sources.base) {
        tracing::warn!("{warning}");
    }
    // The reference of new adapters is the base.
    let fixed = compares && !config.sync_ref_model;
    let untouched = (fixed && sources.adapter.is_none()).then(|| policy.share());
    let tied = policy.untied_head.is_none();
    let base = BaseFolder { dir: &sources.base, sharded: keeping.sharding.of_weights() };
    lora::attach(&mut policy, &adapters, config.random_seed, reading, Some(base))?;
    if tied && policy.untied_head.is_some() {
        // The head may still be the base's embedding, which lies in the buffer of another unit.
        let top = policy.top_unit();
        policy.residence.unit(0).to_vec().iter().for_each(|flat| policy.residence.add(top, flat));
    }
    let of_adapter = (fixed && sources.adapter.is_some()).then(|| lora::frozen_reference(&mut policy));
    let moving =
        (compares && config.sync_ref_model).then(|| moving_reference::copy_of(&policy, Keep::Device));
    let reference = untouched.or(of_adapter).or(moving);
    // Adapters are small: every rank keeps them whole.
    let sharding = keeping.sharding.whole_weights();
    let parameters = Parameters::adopt(lora::named_tensors(&mut policy), Keeping { sharding, ..keeping });
    parameters.reside(&mut policy.residence);
    Ok((policy, reference, parameters, Some(SavedAdapter { adapters, base: name })))
}

/// Name of the model under the adapters.
fn base_name(config: &RunConfig, sources: &Sources) -> String {
    let named = match &sources.adapter {
        Some(dir) if config.model.is_empty() => adapter::Base::of(dir).ok().flatten().map(|base| base.name),
        Some(_) => Some(config.model.clone()),
        None => config.from_checkpoint.is_none().then(|| config.model.clone()),
    };
    named.unwrap_or_else(|| sources.base.display().to_string())
}

/// The frozen model under the adapters; with sharded weights, this rank's part of each unit.
fn base((sources, reading): Origin<'_>, place: Place, keeping: &Keeping) -> Result<Model, Fault> {
    if !keeping.sharding.of_weights() {
        return Model::load_units(&sources.base, place, reading, &mut |_, _| {});
    }
    let mut flats = Vec::new();
    let mut take = |unit: usize, mut tensors: Vec<Named<'_>>| {
        let mut tensors: Vec<&mut Tensor> = tensors.iter_mut().map(|(_, tensor)| &mut **tensor).collect();
        let sizes: Vec<(i64, bool)> =
            tensors.iter().map(|tensor| (tensor.numel() as i64, tensor.dim() > 1)).collect();
        let layout = Layout::new(&sizes, keeping.sharding);
        flats.push((
            unit,
            UnitWeights::adopt(&mut tensors, layout, place.kind, keeping.sharding, &keeping.link),
        ));
    };
    let mut model = Model::load_units(&sources.base, place, reading, &mut take)?;
    for (unit, flat) in flats {
        model.residence.add(unit, &Rc::new(flat));
    }
    Ok(model)
}
