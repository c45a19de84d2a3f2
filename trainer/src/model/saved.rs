//! Modules that are trained whole beside adapters, such as embedding and head: PEFT's `modules_to_save`. The policy has copies of them;
//! the reference model and the base keep the originals.

use dyad_proto::Fault;
use tch::Tensor;

use super::Model;
use super::weights::names::{ADAPTER_PREFIX, EMBEDDING, HEAD};

/// PEFT's name of a base tensor that is saved with an adapter.
#[must_use]
pub fn stored_name(name: &str) -> String {
    format!("{ADAPTER_PREFIX}{name}")
}

/// The base tensors of these modules, in the model's order.
pub fn tensors_of(modules: &[String], model: &mut Model) -> Vec<String> {
    let tied = model.untied_head.is_none().then(|| HEAD.to_owned());
    let names = model.named_tensors().into_iter().map(|(name, _)| name).chain(tied);
    let of_one = |name: &String| {
        name.rsplit_once('.').is_some_and(|(module, _)| modules.iter().any(|one| one == module))
    };
    names.filter(of_one).collect()
}

/// Returns a copy of the tensor of this name and shape.
pub type CopyOf<'a> = dyn Fn(&str, &[i64]) -> Result<Tensor, Fault> + 'a;

/// Puts copies in the place of these tensors. `copy` returns one by name and shape. On a tied model, as in PEFT, a trained embedding
/// leaves the head as it is, and a trained head leaves the embedding.
pub fn replace(model: &mut Model, names: &[String], copy: &CopyOf<'_>) -> Result<(), Fault> {
    let trains = |name: &str| names.iter().any(|one| one == name);
    if model.untied_head.is_none() && (trains(EMBEDDING) || trains(HEAD)) {
        tracing::warn!(
            "the model's head is its embedding, but modules_to_save trains {}: from now on they differ, as in PEFT",
            match (trains(EMBEDDING), trains(HEAD)) {
                (true, true) => "both apart",
                (true, false) => "only the embedding",
                _ => "only the head",
            }
        );
        model.untied_head = Some(model.embedding.shallow_clone());
    }
    for (name, tensor) in model.named_tensors() {
        if trains(&name) {
            *tensor = copy(&name, &tensor.size())?;
        }
    }
    model.saved = names.to_vec();
    Ok(())
}

/// Replaces these tensors by frozen copies in the precision of the passes.
pub(super) fn freeze(model: &mut Model, names: &[String]) {
    let kind = model.place.kind;
    for (name, tensor) in model.named_tensors() {
        if names.contains(&name) {
            *tensor = tensor.detach().copy().to_kind(kind);
        }
    }
}
