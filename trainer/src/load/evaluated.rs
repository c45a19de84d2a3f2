//! Loads a model that is only evaluated, and the model that it is compared with: no gradients, no moments, no copies.

use std::path::Path;

use dyad_proto::{Fault, RunConfig};
use tch::Device;

use super::{Parts, RankLayout, Sources, base};
use crate::checkpoint::Home;
use crate::checkpoint::save::Saver;
use crate::model::weights::Reading;
use crate::model::{Model, lora, stored_kind};
use crate::zero::parameters::{Keeping, Parameters};
use crate::zero::unit_weights::Link;
use dyad_torch::comm::narrow;
use dyad_torch::device::compute_kind;
use dyad_torch::ops::attention_kernel::announce;
use dyad_torch::place::Place;

/// Folders of the model to compare with; `None` for an empty name: the base of an adapter, or the model itself.
pub fn reference(name: &str) -> Result<Option<Sources>, Fault> {
    if name.is_empty() {
        return Ok(None);
    }
    // An adapter is accepted only with `lora`, and a whole model in any case.
    let config = RunConfig { from_checkpoint: Some(name.to_owned()), lora: true, ..RunConfig::default() };
    Sources::resolve(&config).map(Some)
}

impl Parts {
    /// Loads the model of the run and the one to compare with, if the objective has one. Nothing of them is trained.
    pub fn load_to_evaluate(
        config: &RunConfig,
        (sources, against): (&Sources, Option<&Sources>),
        device: Device,
        RankLayout { sharding, bucket_bytes }: RankLayout,
        reading: &Reading,
    ) -> Result<Self, Fault> {
        let place = Place { device, kind: compute_kind(config.dtype, device) };
        let keeping = Keeping {
            compute: place.kind,
            sharding,
            travels_as: narrow::kind(config.reduce_dtype),
            link: Link::default(),
            optim: config.optim,
            bucket_bytes,
            offload_optimizer: false,
        };
        let policy = frozen((sources, reading), place, &keeping)?;
        let reference = match (config.objective().needs_reference(), against) {
            (false, _) => None,
            // Without the adapter, if the model has one.
            (true, None) => Some(policy.share()),
            (true, Some(against)) => Some(compared(&policy, against, place, &keeping)?),
        };
        announce(policy.config.head_dim, place)?;
        let saver = Saver {
            home: Home::new(Path::new(&config.output_dir)),
            tokenizer: sources.tokenizer().to_owned(),
            tokenizer_class: None,
            base: sources.base.clone(),
            stored: stored_kind(&policy.config.torch_dtype),
            adapter: None,
            merge: false,
            not_finite: Default::default(),
        };
        let parameters = Parameters::none(policy.unit_count(), keeping);
        Ok(Self { policy, reference, parameters, saver })
    }
}

fn compared(policy: &Model, against: &Sources, place: Place, keeping: &Keeping) -> Result<Model, Fault> {
    against.check_sums(true)?.iter().for_each(|line| tracing::warn!("{line}"));
    let reference = frozen((against, &Reading::default()), place, keeping)?;
    let (ours, theirs) = (policy.config.vocab_size, reference.config.vocab_size);
    if ours != theirs {
        return Err(Fault::input(format!(
            "the model has a vocabulary of {ours}, and the reference {} one of {theirs}",
            against.base.display()
        ))
        .hint("compare models with the same tokenizer"));
    }
    Ok(reference)
}

/// A whole model, with its adapter if the sources have one.
fn frozen((sources, reading): (&Sources, &Reading), place: Place, keeping: &Keeping) -> Result<Model, Fault> {
    let mut model = base((sources, reading), place, keeping)?;
    if let Some(adapter) = &sources.adapter {
        lora::attach_folder(&mut model, adapter)?;
        lora::cast(&mut model);
    }
    model.config.refuse_dropout()?;
    Ok(model)
}
