//! Restores a run's parameters from a checkpoint.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;

use dyad_data::adapter::ADAPTER_WEIGHTS;

use super::OPTIMIZER_FILE;
use crate::model::weights::{Digested, Weights};
use crate::model::{Model, moving_reference};
use crate::optimizer::states::MASTER;
use crate::zero::parameters::{Parameters, WholeTensor};
use dyad_proto::Fault;
use dyad_proto::manifest::Manifest;

/// Overwrites this rank's part of masters and moments, then the tensors that the model computes with, then a `moving` reference. Fails if the checkpoint has a
/// tensor that the run does not train. Adds every tensor of the checkpoint to `read`, whatever part of it this rank keeps.
pub fn restore(
    dir: &Path,
    parameters: &mut Parameters,
    moving: Option<&mut Model>,
    read: &Digested,
) -> Result<(), Fault> {
    let optimizer = Weights::open_files(dir, vec![dir.join(OPTIMIZER_FILE)])?.counted(read);
    let adapter = dir.join(ADAPTER_WEIGHTS);
    let weights =
        if adapter.is_file() { Weights::open_files(dir, vec![adapter])? } else { Weights::open(dir)? };
    let weights = weights.counted(read);
    let asked = RefCell::new(HashSet::new());
    parameters.restore(&|name, suffix, shape| {
        let full = format!("{name}.{suffix}");
        asked.borrow_mut().extend([name.to_owned(), full.clone()]);
        match (optimizer.contains(&full), suffix) {
            (true, _) => optimizer.tensor(&full, shape),
            (false, MASTER) => weights.tensor(name, shape),
            (false, _) => Err(other_moments(dir, &optimizer, name)),
        }
    })?;
    let mut asked = asked.into_inner();
    if let Some(reference) = moving {
        asked.extend(moving_reference::restore(reference, &optimizer)?);
    }
    let spare = |name: &&str| !asked.contains(*name);
    match [optimizer.names(), weights.names()].concat().into_iter().filter(spare).min() {
        None => Ok(()),
        Some(name) => {
            Err(Fault::input(format!("{} holds {name}, which this run does not train", dir.display()))
                .hint("resume with the model and the lora keys of the run that has left the checkpoint"))
        }
    }
}

/// The masters that a checkpoint of this run holds, with the names and shapes of `kept`. The checkpoint may be an old one: its bytes are
/// verified first.
pub fn saved_masters(dir: &Path, kept: &[WholeTensor]) -> Result<Vec<WholeTensor>, Fault> {
    let damaged = |what: &dyn std::fmt::Display| {
        Fault::failed(format!("{}, the checkpoint of the best evaluation: {what}", dir.display()))
            .hint("leave output_dir alone while a run writes to it; --resume goes on from another checkpoint")
    };
    match Manifest::read(dir).map_err(|damage| damaged(&damage))? {
        Some(manifest) => manifest.verify(dir).map_err(|damage| damaged(&damage))?,
        None => return Err(damaged(&"it is missing")),
    }
    let optimizer = Weights::open_files(dir, vec![dir.join(OPTIMIZER_FILE)])?;
    let adapter = dir.join(ADAPTER_WEIGHTS);
    let weights =
        if adapter.is_file() { Weights::open_files(dir, vec![adapter])? } else { Weights::open(dir)? };
    let master = |one: &WholeTensor| {
        let full = format!("{}.{MASTER}", one.name);
        let shape = one.tensor.size();
        let tensor = match optimizer.contains(&full) {
            true => optimizer.tensor(&full, &shape),
            false => weights.tensor(&one.name, &shape),
        };
        Ok(WholeTensor { name: one.name.clone(), suffix: MASTER, tensor: tensor? })
    };
    kept.iter().filter(|one| one.suffix == MASTER).map(master).collect()
}

fn other_moments(dir: &Path, optimizer: &Weights, name: &str) -> Fault {
    let saved =
        ["exp_avg", "exp_avg_8bit"].into_iter().find(|kind| optimizer.contains(&format!("{name}.{kind}")));
    match saved {
        Some(kind) => {
            let optim = if kind == "exp_avg" { "adamw" } else { "adamw_8bit" };
            Fault::input(format!("{} was saved with optim = \"{optim}\"", dir.display()))
                .hint("resume with the same optim, or start a new run with from_checkpoint")
        }
        None => Fault::input(format!("{} has no moments of {name}", dir.join(OPTIMIZER_FILE).display()))
            .hint("the checkpoint is incomplete, or of another model"),
    }
}
