//! Small models, and engines of one rank that train them.
#![allow(dead_code, reason = "no test file uses everything")]

pub(crate) mod attention;
pub(crate) mod kernels;
pub(crate) mod steps;

use std::path::Path;
use std::sync::Arc;

use dyad_data::new_model::{NewModelOptions, create};
use dyad_proto::RunConfig;
use dyad_proto::run_config::Dtype;
use dyad_torch::comm::Communicator;
use dyad_torch::comm::board::LocalBoard;
use dyad_torch::comm::gloo::{Gloo, GlooOptions};
use tch::{Device, Kind, Tensor};
use trainer::engine::Engine;
use trainer::load::{Parts, RankLayout, Sources};
use trainer::model::EMBEDDING;

/// Writes `dir/model`: a llama with one small layer, as changed by `change`.
pub(crate) fn new_model(dir: &Path, change: impl FnOnce(&mut NewModelOptions)) {
    let line = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;
    std::fs::write(dir.join("pairs.jsonl"), line).unwrap();
    let mut options = NewModelOptions {
        out: dir.join("model"),
        texts: dir.join("pairs.jsonl"),
        vocab_size: 300,
        hidden_size: 64,
        layers: 1,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 96,
        max_positions: 1024,
        model_type: "llama".into(),
        seed: 1,
        overwrite: false,
    };
    change(&mut options);
    create(&options).unwrap();
}

/// Config and parts to train `dir/model` in float32, unless the caller says otherwise.
pub(crate) fn parts(dir: &Path, change: impl FnOnce(&mut RunConfig)) -> (RunConfig, Parts) {
    parts_on(Device::Cpu, dir, change)
}

/// The same on `device`.
pub(crate) fn parts_on(
    device: Device,
    dir: &Path,
    change: impl FnOnce(&mut RunConfig),
) -> (RunConfig, Parts) {
    let mut config = RunConfig {
        model: dir.join("model").display().to_string(),
        output_dir: dir.display().to_string(),
        dtype: Dtype::Float32,
        ..RunConfig::default()
    };
    change(&mut config);
    let sources = Sources::resolve(&config).unwrap();
    let parts = Parts::load(&config, &sources, device, RankLayout::ONE_RANK).unwrap();
    (config, parts)
}

/// An engine with this communicator.
pub(crate) fn engine_of((config, parts): (RunConfig, Parts), communicator: Arc<dyn Communicator>) -> Engine {
    Engine::new(parts.policy, parts.reference, parts.parameters, communicator, &config)
}

/// An engine of one rank over `dir/model`.
pub(crate) fn engine(dir: &Path, change: impl FnOnce(&mut RunConfig)) -> Engine {
    let alone = GlooOptions { generation: 1, interface_host: "127.0.0.1".into(), rank: 0, world_size: 1 };
    let gloo = Gloo::connect(Arc::new(LocalBoard::default()), &alone).unwrap();
    engine_of(parts(dir, change), Arc::new(gloo))
}

/// Gives `dir/model` an embedding of `rows` rows.
pub(crate) fn widen_vocabulary(dir: &Path, rows: i64) {
    let weights = dir.join("model/model.safetensors");
    let mut tensors = Tensor::read_safetensors(&weights).unwrap();
    for (name, tensor) in &mut tensors {
        if name == EMBEDDING {
            *tensor = Tensor::randn([rows, tensor.size()[1]], (Kind::Float, Device::Cpu)) * 0.02;
        }
    }
    let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Tensor::write_safetensors(&named, &weights).unwrap();
    let config = dir.join("model/config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    json["vocab_size"] = rows.into();
    std::fs::write(config, json.to_string()).unwrap();
}
