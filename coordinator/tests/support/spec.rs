//! Input for tests that drive the run's state machine directly, without a process or port.

use std::time::Duration;

use dyad_coordinator::run::RunSpec;
use dyad_coordinator::run::dataset::Datasets;
use dyad_coordinator::run::early_stopping::EarlyStopping;
use dyad_coordinator::run::membership::TrainerId;
use dyad_coordinator::run::training::Start;
use dyad_proto::wire::trainer_message::Body as Up;
use dyad_proto::wire::{Hello, MeasureReport, PairLength, PairVerdict};
use dyad_proto::{PROTOCOL_VERSION, RunConfig};

/// A run of two trainers over this many pairs, two pairs per step.
pub fn spec(pairs: usize) -> RunSpec {
    changed(pairs, |_| {})
}

/// The same, with two validation pairs.
pub fn evaluated_spec(pairs: usize, change: impl FnOnce(&mut RunConfig)) -> RunSpec {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("validation.jsonl");
    std::fs::write(&file, super::pairs(2)).unwrap();
    changed(pairs, |config| {
        config.validation_file = Some(file.display().to_string().into());
        change(config);
    })
}

fn changed(pairs: usize, change: impl FnOnce(&mut RunConfig)) -> RunSpec {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("train.jsonl");
    std::fs::write(&file, super::pairs(pairs)).unwrap();
    let mut config = RunConfig {
        model: "m".into(),
        training_file: file.display().to_string().into(),
        output_dir: "out".into(),
        batch_size: 2,
        ..RunConfig::default()
    };
    change(&mut config);
    let early_stopping = EarlyStopping::new(&config);
    RunSpec {
        run_id: "run-1".into(),
        config_json: config.to_json().unwrap(),
        command: vec!["launcher".into()],
        data: Datasets::load(&config).unwrap(),
        config,
        world_size: 2,
        join_timeout: Duration::from_secs(600),
        stall_timeout: None,
        start: Start { early_stopping, ..Start::default() },
        resume_from: String::new(),
        then: None,
        evaluation_only: None,
    }
}

/// A trainer's first message.
pub fn hello(id: TrainerId) -> Up {
    Up::Hello(Hello {
        name: format!("t{}", id.0),
        protocol_version: PROTOCOL_VERSION,
        device: "cpu".into(),
        launch_index: id.0 as u32,
        ..Hello::default()
    })
}

/// A report that keeps all pairs; prompts and outputs are one token long.
pub fn measured(pairs: usize) -> MeasureReport {
    let verdict = PairVerdict::Kept.into();
    let length = |id| PairLength {
        id,
        verdict,
        prompt_tokens: 1,
        chosen_tokens: 1,
        rejected_tokens: 1,
        tokens_hash_low: id,
        ..PairLength::default()
    };
    MeasureReport {
        split: 1,
        lengths: (0..pairs as u64).map(length).collect(),
        refusal: None,
        ..MeasureReport::default()
    }
}
