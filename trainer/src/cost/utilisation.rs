//! Model FLOPs utilisation: operations that the model needs for a step's pairs, and the device's peak.
//!
//! As in the PaLM paper (arXiv 2204.02311, appendix B): only operations that the mathematics needs are counted, so that layers
//! computed twice to save memory lower the utilisation. Shared prompts are counted once, because they are computed once.

use std::path::Path;

use dyad_data::tokenized::Tokenized;
use dyad_proto::RunConfig;
use dyad_proto::wire::{PairLength, ReferenceLogps};
use tch::Kind;

use crate::batch::PairLayout;
use crate::cost::flops::PassCost;
use dyad_families::ModelConfig;
use dyad_torch::place::Place;

/// Counts the operations of a run's steps.
#[derive(Clone, Debug)]
pub struct ModelFlops {
    cost: PassCost,
    /// Cost of the policy's forward and backward pass, in forward passes.
    policy: f64,
    /// Pairs without reference scores take one more forward pass.
    asks_reference: bool,
}

impl ModelFlops {
    /// For this run and model.
    #[must_use]
    pub fn new(config: &RunConfig, model: &ModelConfig) -> Self {
        Self {
            cost: PassCost::new(model, PairLayout::of(config)),
            // In the backward pass, gradients of inputs and of weights cost a forward pass each; adapters have few weights.
            policy: if config.lora { 2.0 } else { 3.0 },
            asks_reference: config.objective().needs_reference(),
        }
    }

    /// Operations for one rank's pairs in one step.
    #[must_use]
    pub fn of(&self, pairs: &[Tokenized], references: &[Option<ReferenceLogps>]) -> f64 {
        let passes = |known: &Option<ReferenceLogps>| {
            self.policy + if self.asks_reference && known.is_none() { 1.0 } else { 0.0 }
        };
        let pairs = pairs.iter().zip(references);
        pairs.map(|(pair, known)| self.cost.of(&length(pair)) as f64 * 1e3 * passes(known)).sum()
    }
}

fn length(pair: &Tokenized) -> PairLength {
    PairLength {
        prompt_tokens: pair.prompt.len() as u32,
        chosen_tokens: pair.chosen.len() as u32,
        rejected_tokens: pair.rejected.len() as u32,
        ..PairLength::default()
    }
}

/// Peak operations per second of the device: `DYAD_PEAK_FLOPS`, or the data sheet's value; 0 if neither is known.
#[must_use]
pub fn peak_flops(place: Place) -> f64 {
    let told = std::env::var("DYAD_PEAK_FLOPS").ok().and_then(|text| text.trim().parse::<f64>().ok());
    if let Some(told) = told.filter(|told| told.is_finite() && *told > 0.0) {
        return told;
    }
    match place.device.is_cuda() && place.kind == Kind::BFloat16 {
        true => gpu_model(Path::new("/proc/driver/nvidia/gpus")).map_or(0.0, |model| published(&model)),
        false => 0.0,
    }
}

/// Model name that the driver reports for this host's GPUs; `None` if they differ.
fn gpu_model(gpus: &Path) -> Option<String> {
    let mut models: Vec<String> = std::fs::read_dir(gpus)
        .ok()?
        .flatten()
        .filter_map(|gpu| {
            let text = dyad_proto::files::of_kernel(gpu.path().join("information")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
            Some(line.trim().to_owned())
        })
        .collect();
    models.sort();
    models.dedup();
    if models.len() == 1 { models.pop() } else { None }
}

/// Dense bfloat16 peak from the data sheets, for SXM parts: NVIDIA A100 312, H100 and H200 989 TFLOP/s. PCIe parts of the H100 have less.
fn published(model: &str) -> f64 {
    let has = |part: &str| model.contains(part);
    match () {
        () if has("H200") || (has("H100") && !has("PCIe") && !has("NVL")) => 989e12,
        () if has("A100") => 312e12,
        () => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpu_model_is_known_if_all_gpus_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let add = |bus: &str, model: &str| {
            std::fs::create_dir(dir.path().join(bus)).unwrap();
            let text = format!("Model: \t\t {model}\nIRQ:   \t\t 12\n");
            std::fs::write(dir.path().join(bus).join("information"), text).unwrap();
        };
        add("0000:01:00.0", "NVIDIA H100 80GB HBM3");
        add("0000:02:00.0", "NVIDIA H100 80GB HBM3");
        assert_eq!(published(&gpu_model(dir.path()).unwrap()), 989e12);
        add("0000:03:00.0", "NVIDIA A100-SXM4-80GB");
        assert_eq!(gpu_model(dir.path()), None);
        assert_eq!((published("NVIDIA A100-SXM4-80GB"), published("NVIDIA H100 PCIe")), (312e12, 0.0));
    }

    /// Adapters need no weight gradients, known pairs no reference pass.
    #[test]
    fn passes_are_counted_once_each() {
        let model: ModelConfig = {
            let json = r#"{"model_type":"llama","hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,
                "num_attention_heads":4,"num_key_value_heads":4,"vocab_size":320,"rms_norm_eps":1e-5,"max_position_embeddings":64}"#;
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("config.json"), json).unwrap();
            ModelConfig::load(dir.path()).unwrap()
        };
        let config = |lora| {
            RunConfig::from_json(&format!(
                r#"{{"model":"m","training_file":"f","output_dir":"o","lora":{lora}}}"#
            ))
            .unwrap()
        };
        let pair = Tokenized::new(vec![1; 9], vec![1; 5], vec![1; 4]);
        let forward = PassCost::new(&model, PairLayout::of(&config(false))).of(&length(&pair)) as f64 * 1e3;
        let flops =
            |lora, known| ModelFlops::new(&config(lora), &model).of(std::slice::from_ref(&pair), &[known]);
        assert_eq!(flops(false, None), 4.0 * forward);
        assert_eq!(flops(true, None), 3.0 * forward);
        assert_eq!(flops(false, Some(ReferenceLogps::default())), 3.0 * forward);
    }
}
