//! Brings a run's parameters back to where a checkpoint left them.

use std::path::Path;

use dyad_proto::Fault;
use tch::{Kind, Tensor};

use super::OPTIMIZER_FILE;
use crate::lora::ADAPTER_WEIGHTS;
use crate::model::weights::Weights;
use crate::parameters::Parameters;

/// Overwrites masters and moments, then the tensors that the model computes with.
pub fn restore(dir: &Path, parameters: &mut Parameters) -> Result<(), Fault> {
    let optimizer = Weights::open_files(dir, vec![dir.join(OPTIMIZER_FILE)])?;
    let adapter = dir.join(ADAPTER_WEIGHTS);
    let weights =
        if adapter.is_file() { Weights::open_files(dir, vec![adapter])? } else { Weights::open(dir)? };
    for one in parameters.iter() {
        let shape = one.master.size();
        let master = format!("{}.master", one.name);
        let master = match optimizer.contains(&master) {
            true => optimizer.tensor(&master, &shape)?,
            false => weights.tensor(&one.name, &shape)?,
        };
        overwrite(&one.master, &master);
        overwrite(&one.exp_avg, &optimizer.tensor(&format!("{}.exp_avg", one.name), &shape)?);
        overwrite(&one.exp_avg_sq, &optimizer.tensor(&format!("{}.exp_avg_sq", one.name), &shape)?);
    }
    parameters.publish();
    Ok(())
}

fn overwrite(target: &Tensor, source: &Tensor) {
    tch::no_grad(|| target.shallow_clone().copy_(&source.to_kind(Kind::Float)));
}
